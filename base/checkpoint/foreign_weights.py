"""Weights that other code bases have saved: find them in a file, and map their keys to a model's.

A file may hold its weights bare or under any key, or several sets of them, with a wrapper's prefix
before each key (`module.`, `model.`, `1.`, `module.model.` ...) and other entries beside them. The
code does not rely on a list of known projects: it takes the prefix under which it finds most of the
model's keys, and every remaining key needs an explanation. A file with an unexplained key is
refused.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from base.errors import CheckpointError
from base.text import one_line

T = TypeVar("T")
MAX_KEYS = 3
"""The number of keys that a message names."""
MEAN = re.compile(r"((?:.*\.)?)(?:new_)?(mean|mu)")
STD = re.compile(r"((?:.*\.)?)(?:new_)?(std|sigma)")
"""Names of the values that code bases normalize by; the first group is the module."""


def find_weights(
    contents: Any, source: str, name: str | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Find the weights in the contents of a file, wherever they are.

    Args:
        contents: what `torch.load` has returned.
        source: the file's name, for errors.
        name: which of several sets of weights: the key that holds it, dotted if it lies deeper, or
            the prefix of its keys.

    Returns:
        The weights under their keys in the file; and a sentence about the choice under "weights",
        if there was one.

    Raises:
        CheckpointError: the file contains no weights, or several sets and `name` is not one of
            them.
    """
    sets = _weight_sets(contents)
    if not sets:
        raise CheckpointError(
            f"{source}: is not a checkpoint: it holds no 'state_dict' and no other weights, but"
            f" {_describe(contents)}; expected names with tensors, bare or under a key, as"
            " torch.save(model.state_dict(), FILE) writes them"
        )
    if name is not None:
        return _named(sets, source, name), {"weights": f"{_quoted([name])} of the file, as asked"}
    if "state_dict" in sets:
        others = _quoted(key for key in sets if key != "state_dict")
        if not others:
            return sets["state_dict"], {}
        choice = f"'state_dict' of the file, which also holds {others}"
        return sets["state_dict"], {"weights": choice}
    chosen, *others = sets
    if others:
        raise CheckpointError(
            f"{source}: holds several sets of weights: {_quoted(sets)};"
            f" choose with --weights {one_line(chosen, 60)} (in Python: weights={chosen!r})"
        )
    if not chosen:
        # The file is the state dict itself
        return sets[chosen], {}
    return sets[chosen], {"weights": f"{_quoted([chosen])} of the file"}


def _weight_sets(contents: Any) -> dict[str, dict[str, Tensor]]:
    """Return name -> weights: `contents` itself, under "", or else the sets nearest to its top."""
    level = {}
    if isinstance(contents, dict):
        level = {"": contents}
    # A dictionary may contain itself, or be reached by several names
    searched: set[int] = set()
    while level:
        sets = {name: part for name, part in level.items() if _are_weights(part, name)}
        if sets:
            return sets
        deeper: dict[str, Any] = {}
        for name, part in level.items():
            if id(part) in searched:
                continue
            searched.add(id(part))
            prefix = f"{name}." if name else ""
            for key, value in part.items():
                if isinstance(key, str) and isinstance(value, dict):
                    deeper[prefix + key] = value
        level = deeper
    return {}


def _are_weights(part: dict[Any, Any], name: str) -> bool:
    """Return whether a dictionary is a state dict.

    A state dict maps names to tensors, at least one of which is floating-point and not a scalar.
    """
    values = part.values()
    # A broken "state_dict" is still one: comparing it with the model's keys gives the better error
    if name == "state_dict":
        return not any(isinstance(value, dict) for value in values)
    if not all(isinstance(key, str) for key in part):
        return False
    if not all(isinstance(value, Tensor) for value in values):
        return False
    return any(value.is_floating_point() and value.dim() > 0 for value in values)


def _named(sets: Mapping[str, dict[str, Tensor]], source: str, name: str) -> dict[str, Tensor]:
    if name in sets:
        return sets[name]
    # One state dict may also hold several networks, each under a prefix
    prefix = f"{name.rstrip('.')}."
    parts = [below(weights, prefix) for weights in sets.values()]
    parts = [part for part in parts if part]
    if len(parts) != 1:
        available = _quoted(key for key in sets if key) or "one set of weights, with no key"
        raise CheckpointError(
            f"--weights {one_line(name, 60)}: {source} holds no such weights, but {available}"
        )
    return parts[0]


def normalization_beside(contents: Any) -> dict[str, Tensor]:
    """Return a mean and std, lists or tensors, that lie beside the weights and not among them."""
    if not isinstance(contents, dict):
        return {}
    for mean, std in _mean_and_std_keys(key for key in contents if isinstance(key, str)):
        values = {key: _as_tensor(contents[key]) for key in (mean, std)}
        if all(value is not None for value in values.values()):
            return values
    return {}


def _mean_and_std_keys(keys: Iterable[str]) -> list[tuple[str, str]]:
    """Return pairs of a mean's and a std's key in the same module."""
    means: dict[str, str] = {}
    stds: dict[str, str] = {}
    for key in keys:
        mean = MEAN.fullmatch(key)
        std = STD.fullmatch(key)
        if mean:
            means[mean[1]] = key
        if std:
            stds[std[1]] = key
    return [(means[module], stds[module]) for module in means if module in stds]


def _as_tensor(value: Any) -> Tensor | None:
    """Return one value per channel as a tensor; None if the value is something else."""
    if isinstance(value, Tensor) and value.dim() > 0:
        return value
    if not isinstance(value, list | tuple) or not value:
        return None
    if not all(type(item) in (int, float) for item in value):
        return None
    return torch.tensor(value, dtype=torch.float32)


def rename(model: nn.Module, state: Mapping[str, T]) -> tuple[Mapping[str, T], dict[str, str]]:
    """Give the weights the model's names for its modules; also return a sentence about it.

    Other code bases' names are in `other_names` of the model's class.
    """
    names = getattr(model, "other_names", {})
    parts = {part for key in state for part in key.split(".")}
    found = {other: name for other, name in names.items() if other in parts}
    # A file that has both kinds of names is of a network with other modules
    if not found or parts & set(names.values()):
        return state, {}
    renamed = {
        ".".join(found.get(part, part) for part in key.split(".")): value
        for key, value in state.items()
    }
    read_as = ", ".join(f"{other} as {name}" for other, name in found.items())
    return renamed, {"names": read_as}


def find_prefix(
    own: Iterable[str], state: Mapping[str, Tensor], source: str
) -> tuple[str, list[str]]:
    """Find the prefix under which a file holds a model's keys, and those of copies of them.

    Args:
        own: the model's keys.
        state: the file's weights.
        source: the file's name, for errors.

    Returns:
        The prefix with its dot, or "" without one; and the prefixes of copies with equal values.

    Raises:
        CheckpointError: there are as many of the model's keys, with other values, under another
            prefix.
    """
    own = set(own)
    counts: Counter[str] = Counter()
    for key in state:
        starts = [0, *(match.end() for match in re.finditer(r"\.", key))]
        counts.update(key[:start] for start in starts if key[start:] in own)
    most = max(counts.values(), default=0)
    prefixes = sorted((prefix for prefix, count in counts.items() if count == most), key=len)
    if not prefixes:
        return "", []
    first, *others = prefixes
    if 2 * most < len(own):
        # Too few keys to be a copy of the weights. The caller finds that most keys are missing,
        # or the model's layers also read other names.
        return first, []
    for other in others:
        if not _are_equal(below(state, first), below(state, other), own):
            chosen = first.rstrip(".") or other.rstrip(".")
            raise CheckpointError(
                f"{source}: holds several sets of weights, with keys that begin with"
                f" {_quoted([first])} and {_quoted([other])}; choose with --weights"
                f" {one_line(chosen, 60)} (in Python: weights={chosen!r}), or save one set alone"
            )
    return first, others


def _are_equal(first: Mapping[str, Any], second: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Return whether two sets of weights hold equal tensors under these names."""
    for name in names:
        one, other = first.get(name), second.get(name)
        if one is None and other is None:
            continue
        if not isinstance(one, Tensor) or not isinstance(other, Tensor):
            return False
        if (one.dtype, one.layout) != (other.dtype, other.layout) or not torch.equal(one, other):
            return False
    return True


def explain_rest(
    model: nn.Module,
    state: Mapping[str, Any],
    rest: Mapping[str, Any],
    prefix: str,
    copies: Iterable[str],
    source: str,
) -> tuple[list[str], dict[str, str]]:
    """Explain the entries of a file that are not the model's weights.

    There is an explanation for: second names of the weights (tensors in the same memory), copies of
    them, the mean and std that the code base normalizes by, modules that it never calls
    (`unused_modules` of the model's class), and counters. The mean and std become the model's.

    Args:
        model: has buffers `mean` and `std` with an entry per channel if it normalizes.
        state: the file's weights under the model's keys.
        rest: the file's other entries.
        prefix: the prefix of the model's keys in the file.
        copies: prefixes of copies of the weights.
        source: the file's name, for errors.

    Returns:
        The keys without an explanation; and sentences about what was left out and what was taken as
        normalization.

    Raises:
        CheckpointError: the mean and std cannot be those of pixels in [0, 1].
    """
    own = model.state_dict()
    rest = dict(rest)
    left_out: list[str] = []

    def leave_out(keys: list[str], why: str) -> None:
        if keys:
            left_out.append(why)
        for key in keys:
            del rest[key]

    for copy in copies:
        keys = [key for key in rest if key.startswith(copy)]
        leave_out(keys, f"{len(keys)} keys under {_quoted([copy])}, equal to the weights")
    # torch.save keeps it if a module is registered twice: its tensors share their memory
    memory = {_memory_of(value) for key, value in state.items() if key in own}
    keys = [key for key, value in rest.items() if _memory_of(value) in memory]
    leave_out(keys, f"second names of the same tensors ({first_keys(keys)})")
    for unused, twin in getattr(model, "unused_modules", {}).items():
        start = f"{prefix}{unused}."
        keys = [key for key in rest if key.startswith(start)]
        # With other shapes it is another module that happens to have this name
        if _shapes(below(rest, start)) == _shapes(below(own, f"{twin}.")):
            why = "which no forward pass of its code calls"
            leave_out(keys, f"{len(keys)} keys of {unused!r}, {why}")
    normalization = _take_normalization(model, rest, source)
    keys = [key for key, value in rest.items() if _is_counter(value)]
    leave_out(keys, f"counters ({first_keys(keys)})")
    if left_out:
        return list(rest), {"left out": ", ".join(left_out)} | normalization
    return list(rest), normalization


def _memory_of(value: Any) -> Any:
    """Return a key that is equal for tensors with the same numbers in the same memory."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.numel() == 0:
        # Equal to no other key
        return object()
    return value.data_ptr(), value.dtype, value.shape, value.stride()


def _shapes(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: getattr(value, "shape", None) for key, value in state.items()}


def _is_counter(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0 and not value.is_floating_point()


def _take_normalization(model: nn.Module, rest: dict[str, Any], source: str) -> dict[str, str]:
    """Move a mean and std, if there are any, from `rest` to the model; return a sentence on it."""
    mean = getattr(model, "mean", None)
    std = getattr(model, "std", None)
    if not isinstance(mean, Tensor) or not isinstance(std, Tensor):
        return {}
    pairs = _mean_and_std_keys(rest)
    pairs = [pair for pair in pairs if all(_has_size(rest[key], mean.numel()) for key in pair)]
    found = [tuple(rest[key].float().reshape(mean.shape) for key in pair) for pair in pairs]
    if not found:
        return {}
    new_mean, new_std = found[0]
    # With several different pairs it is unknown which one its code uses
    if not all(torch.equal(m, new_mean) and torch.equal(s, new_std) for m, s in found[1:]):
        return {}
    shown = f"mean {_numbers(new_mean)} and std {_numbers(new_std)}"
    names = " and ".join(_quoted([key]) for key in pairs[0])
    # Some code bases normalize pixels in [0, 255]
    is_fraction = (new_mean >= 0) & (new_mean <= 1) & (new_std > 0) & (new_std <= 1)
    if not bool(is_fraction.all()):
        raise CheckpointError(
            f"{source}: normalizes by {shown}, its {names}; expected those of pixels in [0, 1]:"
            " a mean in [0, 1] and a std above 0 and at most 1"
        )
    with torch.no_grad():
        mean.copy_(new_mean)
        std.copy_(new_std)
    for pair in pairs:
        for key in pair:
            del rest[key]
    return {"normalization": f"{shown}, from {names} of the file"}


def _has_size(value: Any, size: int) -> bool:
    is_plain = isinstance(value, Tensor) and value.layout == torch.strided
    return is_plain and value.is_floating_point() and value.numel() == size


def below(state: Mapping[str, T], prefix: str) -> dict[str, T]:
    """Return the entries whose keys begin with the prefix, without the prefix."""
    return {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    }


def first_keys(keys: Iterable[Any]) -> str:
    """Format the first keys and the number of all; unprintable characters are escaped."""
    names = [one_line(key, 60) for key in keys]
    if not names:
        return "none"
    first = ", ".join(names[:MAX_KEYS])
    if len(names) > MAX_KEYS:
        return f"{first}, ... ({len(names)})"
    return first


def _describe(contents: Any) -> str:
    if not isinstance(contents, dict):
        return f"an object of type {type(contents).__name__}"
    if not contents:
        return "nothing"
    return f"the keys {first_keys(contents)}"


def _quoted(keys: Iterable[str]) -> str:
    return ", ".join(repr(one_line(key, 60)) for key in keys)


def _numbers(values: Tensor) -> str:
    return ", ".join(f"{value:.4g}" for value in values.flatten().tolist())
