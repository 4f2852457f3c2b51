"""Optimizer and schedule in a checkpoint: nothing changes places unnoticed, and all is checked
before it is used.

Torch numbers the parameters of an optimizer and believes what a file says of each number; its fused
kernels then read as many values as the parameter has, whatever is there. Here the state of a
parameter stands under its name, beside a checksum of name and values. Checkpoints from before that
(numbers, no checksums) are checked by shape."""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import isnan
from pathlib import Path
from sys import float_info
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from base.errors import CheckpointError
from base.text import one_line

CHECKSUM = "checksum"
"""The key of a parameter's entry under which its checksum stands."""

KERNELS = ("fused", "foreach")
"""Settings of an optimizer that choose how it computes; a run goes on as it began, where that is
possible here."""

# Training moves these keys of an optimizer's groups and of a schedule's state. All others are
# settings, of which a run keeps those that it began with; a resumed run has the same, but for some
# whose default depends on the version of this code.
RATES = ("lr", "_last_lr")
"""Numbers from 0 on."""
SHARES = ("momentum", "betas")
"""Numbers in `[0, 1)`."""
COUNTS = ("_step_count", "T_cur", "num_bad_epochs", "cooldown_counter")
"""Whole numbers from 0 on; `last_epoch` is one from -1 on."""
LENGTHS = ("T_i", "T_max", "total_iters")
"""Numbers above 0. Of the settings among them the default depends on the version."""
BESTS = ("best", "mode_worse")
"""Any numbers; also these settings may be others than those of a new schedule."""
DIRECTIONS = ("mode",)
"""Likewise `"min"` or `"max"`."""


def named_optimizer_state(optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """The optimizer's state for a checkpoint: `state` by parameter name, and `param_groups` with
    lists of names.

    Every parameter has an entry, also one that holds no more than its checksum, so that a missing
    one is noticed."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state, groups = {}, []
    for group in optimizer.param_groups:
        listed = [names[id(parameter)] for parameter in group["params"]]
        for name, parameter in zip(listed, group["params"], strict=True):
            entry = dict(optimizer.state.get(parameter, {}))
            state[name] = {**entry, CHECKSUM: _checksum(name, entry)}
        groups.append({**group, "params": listed})
    return {"state": state, "param_groups": groups}


def checked_optimizer_state(
    optimizer: Optimizer, model: nn.Module, saved: Mapping[str, Any], source: Path
) -> dict[str, Any]:
    """The state that a checkpoint holds for an optimizer, as torch's `load_state_dict` takes it.

    Args:
        optimizer: new, of the run's config.
        model: whose parameters it has.
        saved: what `named_optimizer_state` returned, or, in older checkpoints, the optimizer's own
            `state_dict()`.
        source: the checkpoint, for messages.

    Raises:
        CheckpointError: a parameter has no state, one of another shape, or one that is not its own;
            a setting is another.
    """
    where = f"{source}: optimizer"
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups, entries = saved["param_groups"], dict(saved["state"])
    if len(groups) != len(optimizer.param_groups):
        raise CheckpointError(
            f"{where}.param_groups: {len(groups)} groups there, {len(optimizer.param_groups)} in this run"
        )
    state, settings, number = {}, [], 0
    for place, (group, theirs) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
        listed = [names[id(parameter)] for parameter in group["params"]]
        numbers = list(range(number, number + len(listed)))
        by_name = theirs.get("params") == listed
        if not by_name and theirs.get("params") != numbers:
            raise CheckpointError(
                f"{where}.param_groups.{place}.params: is not the list of this model's parameters"
            )
        settings.append(
            {**_settings(theirs, group, f"{where}.param_groups.{place}"), "params": numbers}
        )
        expected: dict[torch.Size, dict[str, Any]] = {}
        for name, parameter in zip(listed, group["params"], strict=True):
            if parameter.shape not in expected:
                expected[parameter.shape] = _after_a_step(type(optimizer), group, parameter.shape)
            key = name if by_name else number
            if by_name and key not in entries:
                raise CheckpointError(f"{where}.state: {name!r} is missing")
            # before there were names, a parameter without a state had no entry
            entry = entries.pop(key, {})
            values = _values(entry, expected[parameter.shape], f"{where}.state.{name}")
            if by_name and entry.get(CHECKSUM) != _checksum(name, values):
                raise CheckpointError(
                    f"{where}.state.{name}: is not what was saved for this parameter:"
                    " it has changed, or has changed places with another one"
                )
            if values:
                state[number] = values
            number += 1
    if entries:
        extra = one_line(repr(next(iter(entries))), 80)
        raise CheckpointError(f"{where}.state: {extra} is not a parameter of this model")
    return {"state": state, "param_groups": settings}


def checked_schedule_state(
    saved: Mapping[str, Any], new: Mapping[str, Any], steps_done: int, source: Path
) -> dict[str, Any]:
    """The state that a checkpoint holds for a schedule, as its `load_state_dict` takes it.

    Args:
        saved: the checkpoint's.
        new: the state of a new schedule of the run's config.
        steps_done: how often the schedule has been stepped; ReduceLROnPlateau may have been stepped
            less often.
        source: the checkpoint, for messages.

    Raises:
        CheckpointError: a value is missing, or is not one that this schedule can have after so many
            steps.
    """
    where = f"{source}: scheduler"
    state = _like(saved, new, where, "")
    _check_place(state, steps_done, where)
    if "num_bad_epochs" not in new and state.get("last_epoch", steps_done) != steps_done:
        raise CheckpointError(
            f"{where}.last_epoch: is {state['last_epoch']} after {steps_done} steps of the run"
        )
    return state


def _checksum(name: str, entry: Mapping[str, Any]) -> str:
    """SHA-256 of a parameter's name and of what the optimizer keeps for it."""
    digest = hashlib.sha256(name.encode())
    for key, value in sorted(entry.items()):
        digest.update(f"\0{key}\0".encode())
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}\0".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()


def _after_a_step(
    kind: Callable[..., Optimizer], group: Mapping[str, Any], shape: torch.Size
) -> dict[str, Any]:
    """What an optimizer keeps for a parameter of this shape: what a step on zeros leaves behind."""
    trial = torch.zeros(shape, requires_grad=True)
    trial.grad = torch.zeros_like(trial)
    stand_in = kind([trial], lr=0.0)
    stand_in.param_groups[0].update(
        {key: value for key, value in group.items() if key not in ("params", *KERNELS)}
    )
    stand_in.step()
    return dict(stand_in.state[trial])


def _values(entry: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a checkpoint holds for one parameter: nothing, or all that is expected."""
    values = {key: value for key, value in entry.items() if key != CHECKSUM}
    for key, value in values.items():
        if key not in expected:
            raise CheckpointError(
                f"{where}: {one_line(repr(key), 80)} is unknown; expected {', '.join(expected)}"
            )
        own = expected[key]
        if type(value) is not type(own):
            raise CheckpointError(
                f"{where}.{key}: is of type {type(value).__name__}; expected {type(own).__name__}"
            )
        if not isinstance(value, Tensor):
            continue
        if value.shape != own.shape:
            raise CheckpointError(
                f"{where}.{key}: is of shape {tuple(value.shape)}, but {tuple(own.shape)} was expected for this parameter"
            )
        if (
            value.layout != torch.strided
            or value.is_meta
            or value.is_floating_point() != own.is_floating_point()
        ):
            raise CheckpointError(
                f"{where}.{key}: is a tensor of {value.dtype}, but {own.dtype} was expected"
            )
    if values and values.keys() != expected.keys():
        raise CheckpointError(
            f"{where}: {next(key for key in expected if key not in values)!r} is missing"
        )
    return values


def _settings(saved: Mapping[str, Any], group: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings that a group goes on with. A setting that is newer than the file is the
    config's."""
    settings = {}
    for key, own in group.items():
        if key == "params":
            continue
        if key not in saved and key in (*RATES, *SHARES):
            raise CheckpointError(f"{where}: {key!r} is missing")
        value = saved.get(key, own)
        if key not in KERNELS:
            settings[key] = _like(value, own, f"{where}.{key}", key)
        elif value is None or isinstance(value, bool):
            # kernels that the run began with may be missing on this device
            settings[key] = own if value else value
        else:
            raise CheckpointError(
                f"{where}.{key}: is {_shown(value)}; expected true, false or null"
            )
    return settings


def _like(value: Any, own: Any, where: str, key: str) -> Any:
    """`value`, where it can be what has become of `own` in training; `key` is the name that both
    have."""
    if isinstance(own, Counter):
        if not (
            isinstance(value, dict) and all(type(each) is int for each in (*value, *value.values()))
        ):
            raise CheckpointError(
                f"{where}: is {_shown(value)}; expected whole numbers with their counts"
            )
        value = Counter(value)
    elif isinstance(own, dict):
        return _like_mapping(value, own, where)
    elif isinstance(own, list | tuple):
        if not isinstance(value, list | tuple) or len(value) != len(own):
            raise CheckpointError(f"{where}: is {_shown(value)}; expected a list of {len(own)}")
        pairs = enumerate(zip(value, own, strict=True))
        return type(own)(
            _like(each, ours, f"{where}.{place}", key) for place, (each, ours) in pairs
        )
    if not _possible(value, own, key):
        raise CheckpointError(
            f"{where}: is {_shown(value)}; in a run of this config it begins as {_shown(own)}"
        )
    return value


def _like_mapping(value: Any, own: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: is {_shown(value)}; expected its state")
    state = {}
    for key, ours in own.items():
        # torch's own flags come and go with its versions
        if key not in value and not isinstance(ours, bool):
            raise CheckpointError(f"{where}: {key!r} is missing")
        state[key] = _like(value.get(key, ours), ours, f"{where}.{key}", key)
    return state


def _possible(value: Any, own: Any, key: str) -> bool:
    """Whether training can have made `value` of `own`."""
    both_numbers = type(value) in (int, float) and type(own) in (int, float)
    if (both_numbers or type(value) is type(own)) and value == own:
        return True
    if key in ("last_epoch", *COUNTS):
        return type(value) is int and value >= (-1 if key == "last_epoch" else 0)
    if key in (*RATES, *SHARES, *LENGTHS):
        # a comparison, as integers may be too large for a float
        if type(value) not in (int, float) or not abs(value) <= float_info.max:
            return False
        if key in SHARES:
            return 0 <= value < 1
        return value > 0 if key in LENGTHS else value >= 0
    if key in BESTS:
        return type(value) is float and not isnan(value)
    return key in DIRECTIONS and own in ("min", "max") and value in ("min", "max")


def _check_place(state: Mapping[str, Any], steps_done: int, where: str) -> None:
    """Refuse a schedule, or a part of one, that has taken more steps than the run."""
    if state.get("last_epoch", 0) > steps_done:
        raise CheckpointError(
            f"{where}.last_epoch: is {state['last_epoch']} after {steps_done} steps of the run"
        )
    parts: Sequence[Mapping[str, Any]] = state.get("_schedulers", ())
    for number, part in enumerate(parts):
        _check_place(part, steps_done, f"{where}._schedulers.{number}")


def _shown(value: Any) -> str:
    """A value of a file in a message; of tensors and other large things the type."""
    if isinstance(value, Tensor) or (isinstance(value, dict | list | tuple) and len(value) > 4):
        return f"a {type(value).__name__}"
    return one_line(repr(value), 80)
