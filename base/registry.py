"""The tables of everything that a config names, and the one way to look a name up.

A table is a plain dict, name -> constructor or function. The tables stand here, empty, so that
`base` can check configs against them; the rooms fill them (`models`, `data_loader`, `trainer`,
`attacks`), and `experiment` imports all rooms. An entry of your own is registered by an assignment,
`NORM_LAYERS["frn"] = FilterResponseNorm`.

What a config may say about an entry follows from its signature, its type hints and the `Args:` of
its docstring; see `base.config.arguments`. What else the project asks of an entry is an attribute
of the class or function, see `property_of`; each table names those that its entries may have, with
their defaults. Entries of every table may have `config_names`, a dictionary: argument -> its name
in configs where that is another one, or None where configs may not give it. Classes of layers may
have `no_weight_decay`, the names of parameters that weight decay leaves out, and
`buffers_follow_weights` (False): whether their buffers move with the weights alone. Other buffers
are running statistics, which several processes exchange after every update."""

from collections.abc import Callable, Iterable, Mapping
from difflib import SequenceMatcher
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from base.errors import ConfigError
from base.text import one_line

if TYPE_CHECKING:
    from torch import Tensor

Constructor = Callable[..., Any]
T = TypeVar("T")
LEAST_ALIKE = 0.6
"""Twice the letters that two names share, by the letters that they have."""
LONGEST_COMPARED = 80
"""Letters of a name that are compared with known ones."""

MODELS: dict[str, Constructor] = {}
"""`arch.type`: called with keyword arguments, `num_classes`, `in_channels`, `mean`, `std` and the
four names of layer types, as far as it takes them, and its own from `arch.args`; returns a
`base.base_model.BaseModel`.

`untold` (nothing): arguments that make another network of the same weights, which no key of a
checkpoint tells: config key -> the value in a checkpoint of another project, and why. Layers may
have it, too."""

CONV_LAYERS: dict[str, Constructor] = {}
"""`arch.args.conv_layer_type`: called as `torch.nn.Conv2d`, and with its own keywords from
`arch.args`.

`normalizes` (False): it normalizes what it puts out, so that no norm layer is needed behind it.
`normalizes_weights` (False): it normalizes its weights, with which it is used both with and without
a norm layer. `batch_statistics` (False): in training its output depends on the other images of the
batch."""

NORM_LAYERS: dict[str, Constructor] = {}
"""`arch.args.norm_layer_type`: called as `(channels)`, and with its own keywords from `arch.args`.

`normalizes` (True): False for a layer that does nothing.
`batch_statistics` (False): in training its output depends on the other images of the batch."""

LINEAR_LAYERS: dict[str, Constructor] = {}
"""`arch.args.linear_layer_type`: called as `(in_features, out_features)`, and with its own keywords
from `arch.args`."""

ACTIVATION_LAYERS: dict[str, Constructor] = {}
"""`arch.args.activation_layer_type`: called as `(channels, inplace=True)`, and with its own
keywords from `arch.args`."""

DATA_LOADERS: dict[str, Constructor] = {}
"""`data_loader.type`: called with keyword arguments, those of `data_loader.args` and those that the
config's other sections say (`seed`, `noise`, `crop_padding`, `device` ...), as far as it takes
them; returns a `base.base_data_loader.BaseDataLoader`, the training set. An entry whose `data_dir`
has no default needs that key."""

LOSSES: dict[str, "Callable[[Tensor, Tensor], Tensor]"] = {}
"""`train_loss`, `val_loss`: `(logits (B, C), labels) -> losses (B,)`, one for each sample; `labels`
are int64 `(B,)` or, with mixup, class probabilities `(B, C)`."""

METRICS: dict[str, "Callable[[Tensor, Tensor], Tensor]"] = {}
"""`metrics`: `(logits (B, C), labels) -> a tensor without dimensions`, the number of samples that
are right, which is divided by the number of samples; `labels` as for `LOSSES`. Of two names for one
function the first is logged."""

TRAINERS: dict[str, Constructor] = {}
"""`adversarial.method`: subclasses of `base.base_trainer.BaseTrainer`, called as `(parts,
**arguments)` with a `TrainerParts` and their own arguments from `adversarial`.

`attacks_while_training` (False): it attacks images: train_robust.py is its command, and every
validation attacks, too. `takes_mixup` (False): `train_batch` takes mixup's class probabilities for
labels. `validated_by_fgsm` (False): robust validation measures FGSM accuracy, too.
`default_bn_mode`: the mode of the model under attack where `adversarial.bn_mode` is null. `reads`
(()): keys of other sections of the config that mean something to it only."""

ATTACKS: dict[str, Constructor] = {}
"""`pgd_attack.type`: subclasses of `attacks.attack.Attack`, frozen dataclasses, called with those
of the fields `epsilon, norm, step_size, steps, restarts, loss, early_stop, seed` that they have, in
units of the pixel range `[0, 1]`, and with their own from `pgd_attack`."""


def property_of(entry: Constructor, name: str, default: Any) -> Any:
    """An attribute of a table's entry, of the class or function within a `functools.partial`;
    `default` where it has none."""
    while isinstance(entry, partial):
        entry = entry.func
    return getattr(entry, name, default)


def with_properties(**properties: Any) -> Callable[[T], T]:
    """A decorator that gives a function attributes for `property_of`. A class has them in its
    body."""

    def decorate(function: T) -> T:
        for name, value in properties.items():
            setattr(function, name, value)
        return function

    return decorate


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest known name, or an empty string where none is near."""
    nearest = nearest_name(str(name), known)
    return f"; did you mean {nearest!r}?" if nearest is not None else ""


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` was meant to be; None where that is a guess.

    That is one that is a slip of the fingers away: as many letters missing, added, swapped or wrong
    as its length allows, while case and underscores do not count. Otherwise it is the only one that
    has all its words, or of which it has all words, such as `epochs` for `num_epochs`."""
    names = list(known)
    plain = _plain(name)
    most_edits = max(1, len(plain) // 4)
    slips = {}
    for candidate in names:
        other = _plain(candidate)
        # each letter that one of them is longer takes an edit
        if abs(len(plain) - len(other)) > most_edits or _edits(plain, other) > most_edits:
            continue
        alike = SequenceMatcher(None, plain, other).ratio()
        # most letters of a short name must be the same: gm is not a slip for gn
        if alike >= LEAST_ALIKE:
            slips[candidate] = (_edits(plain, other), -alike)
    if slips:
        return min(slips, key=lambda candidate: slips[candidate])
    words = set(name.casefold().split("_"))
    related = [
        candidate for candidate in names if _contain(words, set(candidate.casefold().split("_")))
    ]
    return related[0] if len(related) == 1 else None


def _plain(name: str) -> str:
    return name.casefold().replace("_", "")[:LONGEST_COMPARED]


def _contain(words: set[str], others: set[str]) -> bool:
    return words <= others or others <= words


def _edits(first: str, second: str) -> int:
    """How many letters must be added, dropped, replaced or swapped with their neighbor to make one
    text of the other (the optimal string alignment distance)."""
    before, above = [], list(range(len(second) + 1))
    for i, letter in enumerate(first, 1):
        row = [i]
        for j, other in enumerate(second, 1):
            edits = min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == second[j - 2] and first[i - 2] == other:
                edits = min(edits, before[j - 2] + 1)
            row.append(edits)
        before, above = above, row
    return above[-1]


def lookup(table: Mapping[str, T], name: str, key: str) -> T:
    """The entry called `name`; `key` is the dotted config key that an error names.

    Raises:
        ConfigError: the name is not in the table; the message lists the names that are.
    """
    try:
        return table[name]
    except (KeyError, TypeError):
        raise ConfigError(f"{key}: {not_one_of(name, table)}") from None


def not_one_of(name: str, known: Iterable[str]) -> str:
    """`"'x' is not one of: ...; did you mean 'y'?"`."""
    names = list(known)
    return f"{one_line(repr(name), LONGEST_COMPARED)} is not one of: {', '.join(names)}{did_you_mean(str(name), names)}"
