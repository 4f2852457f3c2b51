"""Weights in the forms that other codes save them in: where in the file they lie, and how their keys become a model's.

A file may hold its weights bare or under any key, several sets of them, with a wrapper's prefix before each key
(`module.`, `model.`, `1.`, `module.model.` ...) and with more beside them. Nothing here knows a list of projects: the
prefix is the one under which most of the model's keys are found, and every key that is left over needs an explanation.
A file with keys that have none is refused.
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
"""How codes that normalize inside the model call what they normalize by; the first group is the module."""


def find_weights(contents: Any, source: str, name: str | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights in what a file holds, wherever in it they are.

    Args:
        contents: of the file.
        source: its name, for errors.
        name: which of several sets of weights: the key that holds it, dotted where it lies deeper, or the prefix of its keys.

    Returns:
        The weights under their keys in the file, and a sentence about the choice where there was one, by the name "weights".

    Raises:
        CheckpointError: there are none, or there are several and `name` names none of them.
    """
    sets = _weight_sets(contents)
    declared = contents.get("state_dict") if isinstance(contents, dict) else None
    if isinstance(declared, dict) and not any(isinstance(value, dict) for value in declared.values()):
        # its name says that it is the weights, be they good or not
        sets = {"state_dict": declared, **sets}
    if not sets:
        raise CheckpointError(
            f"{source}: is no checkpoint: it holds no 'state_dict' and no other weights, but {_describe(contents)};"
            " expected names with tensors, bare or under a key, as torch.save(model.state_dict(), FILE) writes them"
        )
    if name is not None:
        return _named(sets, source, name), {"weights": f"{one_line(name, 60)!r} of the file, as asked"}
    chosen = "state_dict" if "state_dict" in sets else next(iter(sets))
    others = ", ".join(repr(one_line(key, 60)) for key in sets if key != chosen)
    if others and chosen != "state_dict":
        raise CheckpointError(
            f"{source}: holds several sets of weights: {', '.join(repr(one_line(key, 60)) for key in sets)};"
            f" choose with --weights {one_line(chosen, 60)} (in Python: weights={chosen!r})"
        )
    if others:
        return sets[chosen], {"weights": f"'state_dict' of the file, which also holds {others}"}
    return sets[chosen], {"weights": f"{one_line(chosen, 60)!r} of the file"} if chosen not in ("", "state_dict") else {}


def normalization_beside(contents: Any) -> dict[str, Tensor]:
    """A mean and std, lists or tensors, that stand beside the weights in a file instead of among them."""
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
    if isinstance(value, list | tuple) and value and all(type(item) in (int, float) for item in value):
        return torch.tensor(value, dtype=torch.float32)
    return value if isinstance(value, Tensor) and value.dim() > 0 else None


def _named(sets: Mapping[str, dict[str, Tensor]], source: str, name: str) -> dict[str, Tensor]:
    if name in sets:
        return sets[name]
    parts = [part for found in sets.values() if (part := _below(found, f"{name.rstrip('.')}."))]
    if len(parts) != 1:
        there = ", ".join(repr(one_line(key, 60)) for key in sets if key) or "one set of weights, with no key"
        raise CheckpointError(f"--weights {one_line(name, 60)}: {source} holds no such weights, but {there}")
    return parts[0]


def _weight_sets(contents: Any) -> dict[str, dict[str, Tensor]]:
    """Name -> weights: `contents` itself, with the name "", or else those nearest to its surface."""
    level = {"": contents} if isinstance(contents, dict) else {}
    while level:
        sets = {name: part for name, part in level.items() if _are_weights(part)}
        if sets:
            return sets
        level = {
            f"{name}.{key}" if name else key: value
            for name, part in level.items()
            for key, value in part.items()
            if isinstance(key, str) and isinstance(value, dict)
        }
    return {}


def _are_weights(value: Any) -> bool:
    """Whether it is a state dict: names with tensors, some of them of real numbers and not single ones."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        return False
    if not all(isinstance(item, Tensor) for item in value.values()):
        return False
    return any(item.is_floating_point() and item.dim() > 0 for item in value.values())


def _describe(contents: Any) -> str:
    if not isinstance(contents, dict):
        return f"an object of type {type(contents).__name__}"
    return f"the keys {first_keys(contents)}" if contents else "nothing"


def first_keys(keys: Iterable[Any]) -> str:
    """The first keys and how many there are, in words; what a terminal does not show is escaped."""
    names = [one_line(key, 60) for key in keys]
    if not names:
        return "none"
    more = f", ... ({len(names)})" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _below(state: Mapping[str, T], prefix: str) -> dict[str, T]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def find_prefix(own: Iterable[str], state: Mapping[str, Tensor], source: str) -> tuple[str, list[str]]:
    """The prefix under which a file holds a model's keys, and others under which it repeats them.

    Args:
        own: the model's keys.
        state: the file's weights.
        source: the file's name, for errors.

    Returns:
        The prefix, "" where there is none, with its dot; and the prefixes of copies with the same values.

    Raises:
        CheckpointError: there are as many keys, with other values, under another prefix.
    """
    own, counts = set(own), Counter()
    for key in state:
        parts = key.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in own:
                counts[key[: len(key) - len(".".join(parts[start:]))]] += 1
    most = max(counts.values(), default=0)
    prefixes = sorted((prefix for prefix, count in counts.items() if count == most), key=len)
    if not prefixes:
        return "", []
    first, *others = prefixes
    if 2 * most < len(own):
        # too few to speak of a set: most keys differ, or layers that read other names of their keys have renamed them
        return first, []
    for other in others:
        if not _equal(_below(state, first), _below(state, other), own):
            names = " and ".join(repr(one_line(prefix, 60)) for prefix in (first, other))
            chosen = one_line(first.rstrip("."), 60) or one_line(other.rstrip("."), 60)
            raise CheckpointError(
                f"{source}: holds several sets of weights, with keys that begin with {names};"
                f" choose with --weights {chosen} (in Python: load_checkpoint(..., weights={chosen!r})), or save one set alone"
            )
    return first, others


def _equal(first: Mapping[str, Any], second: Mapping[str, Any], names: Iterable[str]) -> bool:
    return all(
        isinstance(one, Tensor) and isinstance(two, Tensor) and one.dtype == two.dtype and torch.equal(one, two)
        for one, two in ((first.get(name), second.get(name)) for name in names)
        if one is not None or two is not None
    )


def explain_rest(
    model: nn.Module, state: Mapping[str, Any], rest: Mapping[str, Any], prefix: str, copies: Iterable[str], source: str
) -> tuple[list[str], dict[str, str]]:
    """Account for what a file holds beside a model's weights.

    Explained are second names of the weights (tensors in the same memory) and copies of them, the mean and std that its code
    normalizes by, modules that it is known never to call (`unused_modules` of the model's class), and counters. The mean and
    std become the model's.

    Args:
        model: with `mean` and `std`, buffers with an entry for each channel, if it normalizes.
        state: the file's weights under the model's keys.
        rest: the file's keys that are none of the model's, with their values.
        prefix: of the model's keys in the file.
        copies: prefixes of copies of the weights.
        source: the file's name, for errors.

    Returns:
        The keys without an explanation, and a sentence each about what was left out and what was taken as normalization.

    Raises:
        CheckpointError: the mean and std are none of pixels in [0, 1].
    """
    rest, left_out = dict(rest), []
    for copy in copies:
        keys = list(_below(rest, copy))
        left_out.append(f"{len(keys)} keys under {one_line(copy, 60)!r}, equal to the weights")
        rest = {key: value for key, value in rest.items() if not key.startswith(copy)}
    own = model.state_dict()
    memory = {_place(value) for key, value in state.items() if key in own and isinstance(value, Tensor)}
    names = [key for key, value in rest.items() if isinstance(value, Tensor) and value.numel() and _place(value) in memory]
    if names:
        left_out.append(f"second names of the same tensors ({first_keys(names)})")
        rest = {key: value for key, value in rest.items() if key not in names}
    for unused, twin in getattr(model, "unused_modules", {}).items():
        there = {key: value.shape for key, value in _below(rest, f"{prefix}{unused}.").items()}
        if there and there == {key: value.shape for key, value in _below(own, f"{twin}.").items()}:
            left_out.append(f"{len(there)} keys of {unused!r}, which no forward pass of its code calls")
            rest = {key: value for key, value in rest.items() if not key.startswith(f"{prefix}{unused}.")}
    normalization = _take_normalization(model, rest, source)
    counters = [key for key, value in rest.items() if _is_counter(value)]
    if counters:
        left_out.append(f"counters ({first_keys(counters)})")
    explained = {"left out": ", ".join(left_out)} if left_out else {}
    return [key for key in rest if key not in counters], explained | normalization


def _place(value: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same numbers in the same memory: torch.save keeps that a module is registered twice."""
    return value.data_ptr(), value.dtype, value.shape, value.stride()


def _is_counter(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0 and not value.is_floating_point()


def _take_normalization(model: nn.Module, rest: dict[str, Any], source: str) -> dict[str, str]:
    """Move a mean and std from `rest` to the model; a sentence about them, none where there are none."""
    mean, std = getattr(model, "mean", None), getattr(model, "std", None)
    if not isinstance(mean, Tensor) or not isinstance(std, Tensor):
        return {}
    pairs = [pair for pair in _mean_and_std_keys(rest) if all(_has_size(rest[key], mean.numel()) for key in pair)]
    found = [tuple(rest[key].float().reshape(mean.shape) for key in pair) for pair in pairs]
    if not found or not all(torch.equal(pair[side], found[0][side]) for pair in found[1:] for side in (0, 1)):
        return {}
    new_mean, new_std = found[0]
    shown = f"mean {_numbers(new_mean)} and std {_numbers(new_std)}"
    names = " and ".join(repr(one_line(key, 60)) for key in pairs[0])
    if not bool(((new_mean >= 0) & (new_mean <= 1) & (new_std > 0) & (new_std <= 1)).all()):
        raise CheckpointError(
            f"{source}: normalizes by {shown}, its {names}; expected those of pixels in [0, 1]:"
            " a mean in [0, 1] and a std above 0 and at most 1"
        )
    with torch.no_grad():
        mean.copy_(new_mean)
        std.copy_(new_std)
    for key in {key for pair in pairs for key in pair}:
        del rest[key]
    return {"normalization": f"{shown}, from {names} of the file"}


def _has_size(value: Any, size: int) -> bool:
    return isinstance(value, Tensor) and value.numel() == size


def _numbers(values: Tensor) -> str:
    return ", ".join(f"{value:.4g}" for value in values.flatten().tolist())
