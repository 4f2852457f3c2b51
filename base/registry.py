"""The tables of everything that a config names, and the lookup of a name in them.

A table is a plain dict, name -> constructor or function. The tables are defined here, empty, so
that `base` can check configs against them. The rooms fill them (`models`, `data_loader`, `trainer`,
`attacks`), and `experiment` imports all rooms. An assignment registers an entry of your own:
`NORM_LAYERS["frn"] = FilterResponseNorm`.

What a config may say about an entry follows from its signature, its type hints and the `Args:` of
its docstring; see `base.config.arguments`. Everything else that the project asks of an entry is an
attribute of the class or function; see `attribute_of`. Each table lists the attributes that its
entries may have, with their defaults. Entries of every table may have `config_names`, a dictionary:
argument -> its name in configs if that is another one, or None if configs may not give it. Classes
of layers may have `no_weight_decay`, the names of parameters that are exempt from weight decay, and
`buffers_follow_weights` (False): whether their buffers change with the weights alone. Other buffers
are running statistics, which several processes exchange after every update.
"""

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
MIN_SIMILARITY = 0.6
"""The least `SequenceMatcher.ratio` of a name and its misspelling."""
MAX_NAME = 80
"""How many characters of a name are compared and shown."""

MODELS: dict[str, Constructor] = {}
"""`arch.type`: called with keyword arguments: those of `num_classes`, `in_channels`, `mean`, `std`
and the four names of layer types that it takes, and its own arguments from `arch.args`. Returns a
`base.base_model.BaseModel`.

`untold` (empty): arguments that change the network but leave no trace in the names or shapes of its
weights: config key -> the value in a checkpoint of another project, and why. Layers may have it,
too."""

CONV_LAYERS: dict[str, Constructor] = {}
"""`arch.args.conv_layer_type`: called as `torch.nn.Conv2d`, the numbers of channels by
position, and with its own keywords from `arch.args`.

`normalizes` (False): it normalizes its output, so that it needs no norm layer after it.
`normalizes_weights` (False): it normalizes its weights; such a layer is used both with and without
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
"""`data_loader.type`: called with keyword arguments: those of `data_loader.args` and those from
other sections of the config (`seed`, `noise`, `crop_padding`, `device` ...), as far as it takes
them. Returns the training set, a `base.base_data_loader.BaseDataLoader`. An entry whose `data_dir`
has no default needs that key."""

LOSSES: dict[str, "Callable[[Tensor, Tensor], Tensor]"] = {}
"""`train_loss`, `val_loss`: `(logits (B, C), labels) -> losses (B,)`, one for each sample; `labels`
are int64 `(B,)` or, with mixup, class probabilities `(B, C)`."""

METRICS: dict[str, "Callable[[Tensor, Tensor], Tensor]"] = {}
"""`metrics`: `(logits (B, C), labels) -> a tensor without dimensions`, the number of correct
samples, from 0 to B, which is then divided by the number of samples; `labels` as for `LOSSES`. It
may be a sum of fractions over the samples, but no mean. If a function has two names, the first one
is logged."""

TRAINERS: dict[str, Constructor] = {}
"""`adversarial.method`: subclasses of `base.base_trainer.BaseTrainer`, called as `(parts,
**arguments)` with a `TrainerParts` and their own arguments from `adversarial`.

`attacks_while_training` (False): it attacks images, so train_robust.py is its command and every
validation attacks, too. `takes_mixup` (False): `train_batch` accepts mixup's class probabilities as
labels. `validated_by_fgsm` (False): robust validation also measures FGSM accuracy.
`default_bn_mode`: the mode of the model under attack if `adversarial.bn_mode` is null. `reads`
(()): keys of other sections of the config that only this method uses."""

ATTACKS: dict[str, Constructor] = {}
"""`pgd_attack.type`: subclasses of `attacks.attack.Attack`, frozen dataclasses, called with those
of the fields `epsilon, norm, step_size, steps, restarts, loss, early_stop, seed` that they have,
sizes in units of the pixel range `[0, 1]`, and with their own from `pgd_attack`."""


def attribute_of(entry: Constructor, name: str, default: Any) -> Any:
    """Return an attribute of a table's entry, or `default` if the entry does not have it.

    The attributes of a `functools.partial` are those of its class or function.
    """
    while isinstance(entry, partial):
        entry = entry.func
    return getattr(entry, name, default)


def with_attributes(**attributes: Any) -> Callable[[T], T]:
    """Return a decorator that sets attributes of a function, for `attribute_of`."""

    def decorate(function: T) -> T:
        for name, value in attributes.items():
            setattr(function, name, value)
        return function

    return decorate


def lookup(table: Mapping[str, T], name: str, key: str) -> T:
    """Return the entry called `name`.

    Args:
        table: name -> entry.
        name: the name in the config.
        key: the dotted config key that an error names.

    Raises:
        ConfigError: the name is not in the table; the message lists the names that are.
    """
    try:
        return table[name]
    # A TypeError: JSON may hold a list or an object in place of the name, which cannot be hashed
    except (KeyError, TypeError):
        raise ConfigError(f"{key}: {not_one_of(name, table)}") from None


def not_one_of(name: str, known: Iterable[str]) -> str:
    """Return `"'x' is not one of: ...; did you mean 'y'?"`."""
    names = list(known)
    shown = one_line(repr(name), MAX_NAME)
    return f"{shown} is not one of: {', '.join(names)}{did_you_mean(str(name), names)}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the nearest known name, or an empty string."""
    return format_hint(nearest_name(name, known))


def format_hint(nearest: str | None) -> str:
    """Return `"; did you mean 'x'?"`, or an empty string for None."""
    return "" if nearest is None else f"; did you mean {nearest!r}?"


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that `name` was probably meant to be; None if it is hard to tell.

    A misspelling has few letters missing, added, swapped or replaced: one, or one in four. Case and
    underscores do not count. If no known name is that close, the only one that shares all words
    with `name` is returned, such as `epochs` for `num_epochs`.
    """
    names = list(known)
    plain = _plain(name)
    max_edits = max(1, len(plain) // 4)
    misspelt = {}
    for candidate in names:
        other = _plain(candidate)
        # The cheap test first: each letter by which one name is longer takes an edit
        if abs(len(plain) - len(other)) > max_edits:
            continue
        edits = _edit_distance(plain, other)
        similarity = SequenceMatcher(None, plain, other).ratio()
        # Most letters of a short name must agree: gm is one letter from gn, but not similar
        if edits <= max_edits and similarity >= MIN_SIMILARITY:
            misspelt[candidate] = (edits, -similarity)
    if misspelt:
        return min(misspelt, key=lambda candidate: misspelt[candidate])
    words = set(name.casefold().split("_"))
    related = []
    for candidate in names:
        others = set(candidate.casefold().split("_"))
        if words <= others or others <= words:
            related.append(candidate)
    return related[0] if len(related) == 1 else None


def _plain(name: str) -> str:
    return name.casefold().replace("_", "")[:MAX_NAME]


def _edit_distance(first: str, second: str) -> int:
    """Return the optimal string alignment distance: how many letters must be added, dropped,
    replaced or swapped with their neighbor to turn one text into the other."""
    # difflib has no edit distance, and its ratio ranks a swapped pair below unrelated names
    previous: list[int] = []
    above = list(range(len(second) + 1))
    for i, letter in enumerate(first, 1):
        row = [i]
        for j, other in enumerate(second, 1):
            edits = min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == second[j - 2] and first[i - 2] == other:
                edits = min(edits, previous[j - 2] + 1)
            row.append(edits)
        previous = above
        above = row
    return above[-1]
