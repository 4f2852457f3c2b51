"""Weights in the forms that other codes save them in: where in a file they lie, and how their keys
become a model's.

A file may hold its weights bare or under any key, several sets of them, with a wrapper's prefix
before each key (`module.`, `model.`, `1.`, `module.model.` ...) and with more beside them. Nothing
here knows a list of projects: the prefix is the one under which most of the model's keys are found,
and every key that is left over needs an explanation. A file with keys that have none is refused.
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
SHOWN = 3
"""Keys of each side that a message names."""
MEAN = re.compile(r"((?:.*\.)?)(?:new_)?(mean|mu)")
STD = re.compile(r"((?:.*\.)?)(?:new_)?(std|sigma)")
"""What codes call the values that they normalize by; the first group is the module."""


def find_weights(
    contents: Any, source: str, name: str | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights in what a file holds, wherever in it they are.

    Args:
        contents: of the file.
        source: its name, for errors.
        name: which of several sets of weights: the key that holds it, dotted where it lies deeper,
            or the prefix of its keys.

    Returns:
        The weights under their keys in the file, and a sentence about the choice where there was
        one, by the name "weights".

    Raises:
        CheckpointError: there are none, or there are several and `name` names none of them.
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
        told = {"weights": f"'state_dict' of the file, which also holds {others}"} if others else {}
        return sets["state_dict"], told
    chosen, *others = sets
    if others:
        raise CheckpointError(
            f"{source}: holds several sets of weights: {_quoted(sets)};"
            f" choose with --weights {one_line(chosen, 60)} (in Python: weights={chosen!r})"
        )
    return sets[chosen], {"weights": f"{_quoted([chosen])} of the file"} if chosen else {}


def _weight_sets(contents: Any) -> dict[str, dict[str, Tensor]]:
    """Name -> weights: `contents` itself, with the name "", or else those nearest to its top."""
    level = {"": contents} if isinstance(contents, dict) else {}
    # a dictionary may contain itself, or lie in many places
    searched: set[int] = set()
    while level:
        sets = {name: part for name, part in level.items() if _are_weights(part, name)}
        if sets:
            return sets
        deeper: dict[str, Any] = {}
        for name, part in level.items():
            if id(part) not in searched:
                searched.add(id(part))
                deeper |= {
                    f"{name}.{key}" if name else key: value
                    for key, value in part.items()
                    if isinstance(key, str) and isinstance(value, dict)
                }
        level = deeper
    return {}


def _are_weights(part: dict[Any, Any], name: str) -> bool:
    """Whether it is a state dict: names with tensors, some of them of real numbers and not single
    ones. What is called state_dict is taken at its word, to be refused with its model's keys."""
    values = part.values()
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
    parts = [part for found in sets.values() if (part := below(found, f"{name.rstrip('.')}."))]
    if len(parts) != 1:
        there = _quoted(key for key in sets if key) or "one set of weights, with no key"
        raise CheckpointError(
            f"--weights {one_line(name, 60)}: {source} holds no such weights, but {there}"
        )
    return parts[0]


def normalization_beside(contents: Any) -> dict[str, Tensor]:
    """A mean and std, lists or tensors, that stand beside the weights instead of among them."""
    if not isinstance(contents, dict):
        return {}
    for mean, std in _mean_and_std_keys(key for key in contents if isinstance(key, str)):
        values = {key: _as_tensor(contents[key]) for key in (mean, std)}
        if all(value is not None for value in values.values()):
            return values
    return {}


def _mean_and_std_keys(keys: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of a mean's and a std's key in the same module."""
    keys = list(keys)
    means = {match[1]: key for key in keys if (match := MEAN.fullmatch(key))}
    stds = {match[1]: key for key in keys if (match := STD.fullmatch(key))}
    return [(means[module], stds[module]) for module in means if module in stds]


def _as_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value if value.dim() > 0 else None
    if not isinstance(value, list | tuple) or not value:
        return None
    is_numbers = all(type(item) in (int, float) for item in value)
    return torch.tensor(value, dtype=torch.float32) if is_numbers else None


def rename(model: nn.Module, state: Mapping[str, T]) -> tuple[Mapping[str, T], dict[str, str]]:
    """The weights under the model's names for its modules, where the file has the names that other
    codes give them (`other_names` of the model's class), and a sentence about that."""
    names = getattr(model, "other_names", {})
    parts = {part for key in state for part in key.split(".")}
    found = {other: name for other, name in names.items() if other in parts}
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
    """The prefix under which a file holds a model's keys, and others under which it repeats them.

    Args:
        own: the model's keys.
        state: the file's weights.
        source: the file's name, for errors.

    Returns:
        The prefix, "" where there is none, with its dot; and the prefixes of copies with the same
        values.

    Raises:
        CheckpointError: there are as many keys, with other values, under another prefix.
    """
    own, counts = set(own), Counter()
    for key in state:
        starts = [0, *(match.end() for match in re.finditer(r"\.", key))]
        counts.update(key[:start] for start in starts if key[start:] in own)
    most = max(counts.values(), default=0)
    prefixes = sorted((prefix for prefix, count in counts.items() if count == most), key=len)
    if not prefixes:
        return "", []
    first, *others = prefixes
    if 2 * most < len(own):
        # too few to speak of a set: most keys differ, or their layers also read other names
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
    """Whether two sets of weights hold the same tensors under these names."""
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
    """Account for what a file holds beside a model's weights.

    Explained are second names of the weights (tensors in the same memory) and copies of them, the
    mean and std that its code normalizes by, modules that it is known never to call
    (`unused_modules` of the model's class), and counters. The mean and std become the model's.

    Args:
        model: with `mean` and `std`, buffers with an entry for each channel, if it normalizes.
        state: the file's weights under the model's keys.
        rest: the file's keys that are none of the model's, with their values.
        prefix: of the model's keys in the file.
        copies: prefixes of copies of the weights.
        source: the file's name, for errors.

    Returns:
        The keys without an explanation, and a sentence each about what was left out and what was
        taken as normalization.

    Raises:
        CheckpointError: the mean and std are none of pixels in [0, 1].
    """
    own, rest, left_out = model.state_dict(), dict(rest), []

    def leave_out(keys: list[str], why: str) -> None:
        if keys:
            left_out.append(why)
        for key in keys:
            del rest[key]

    for copy in copies:
        keys = [key for key in rest if key.startswith(copy)]
        leave_out(keys, f"{len(keys)} keys under {_quoted([copy])}, equal to the weights")
    places = {_place(value) for key, value in state.items() if key in own}
    keys = [key for key, value in rest.items() if _place(value) in places]
    leave_out(keys, f"second names of the same tensors ({first_keys(keys)})")
    for unused, twin in getattr(model, "unused_modules", {}).items():
        start = f"{prefix}{unused}."
        keys = [key for key in rest if key.startswith(start)]
        if _shapes(below(rest, start)) == _shapes(below(own, f"{twin}.")):
            why = "which no forward pass of its code calls"
            leave_out(keys, f"{len(keys)} keys of {unused!r}, {why}")
    normalization = _take_normalization(model, rest, source)
    keys = [key for key, value in rest.items() if _is_counter(value)]
    leave_out(keys, f"counters ({first_keys(keys)})")
    explained = {"left out": ", ".join(left_out)} if left_out else {}
    return list(rest), explained | normalization


def _place(value: Any) -> Any:
    """Equal for tensors that are the same numbers in the same memory: torch.save keeps that a
    module is registered twice."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.numel() == 0:
        return object()
    return value.data_ptr(), value.dtype, value.shape, value.stride()


def _shapes(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: getattr(value, "shape", None) for key, value in state.items()}


def _is_counter(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0 and not value.is_floating_point()


def _take_normalization(model: nn.Module, rest: dict[str, Any], source: str) -> dict[str, str]:
    """Move a mean and std from `rest` to the model, and say so; nothing where there are none."""
    mean, std = getattr(model, "mean", None), getattr(model, "std", None)
    if not isinstance(mean, Tensor) or not isinstance(std, Tensor):
        return {}
    pairs = _mean_and_std_keys(rest)
    pairs = [pair for pair in pairs if all(_has_size(rest[key], mean.numel()) for key in pair)]
    found = [tuple(rest[key].float().reshape(mean.shape) for key in pair) for pair in pairs]
    if not found:
        return {}
    new_mean, new_std = found[0]
    if not all(torch.equal(m, new_mean) and torch.equal(s, new_std) for m, s in found[1:]):
        return {}
    shown = f"mean {_numbers(new_mean)} and std {_numbers(new_std)}"
    names = " and ".join(_quoted([key]) for key in pairs[0])
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
    """The entries whose keys begin with the prefix, under what follows it."""
    return {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    }


def first_keys(keys: Iterable[Any]) -> str:
    """The first keys, and how many there are; what a terminal does not show is escaped."""
    names = [one_line(key, 60) for key in keys]
    if not names:
        return "none"
    more = f", ... ({len(names)})" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _describe(contents: Any) -> str:
    if not isinstance(contents, dict):
        return f"an object of type {type(contents).__name__}"
    return f"the keys {first_keys(contents)}" if contents else "nothing"


def _quoted(keys: Iterable[str]) -> str:
    return ", ".join(repr(one_line(key, 60)) for key in keys)


def _numbers(values: Tensor) -> str:
    return ", ".join(f"{value:.4g}" for value in values.flatten().tolist())
