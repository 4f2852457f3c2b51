"""The state of optimizer and schedule in a checkpoint, checked before it is used.

torch numbers the parameters of an optimizer, and does not check what a file says about each number.
Its fused kernels then read as many values as the parameter has, even beyond the end of a shorter
tensor. Here the state of a parameter is stored under its name, and its values are checked by key,
type and shape. Older checkpoints store it under the parameter's number.
"""

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

OLD_CHECKSUM = "checksum"
"""A key in the entry of a parameter in older checkpoints. It is ignored, as the file has a checksum
of its own."""
KERNELS = ("fused", "foreach")
"""Settings of an optimizer that choose its kernels. A resumed run keeps them if this device has
these kernels."""

# Training changes the following keys of an optimizer's groups and of a schedule's state. All others
# are settings, which a resumed run must share with its checkpoint.
RATES = ("lr", "_last_lr")
"""Numbers from 0 on."""
FRACTIONS = ("momentum", "betas")
"""Numbers in `[0, 1)`."""
COUNTS = ("_step_count", "T_cur", "num_bad_epochs", "cooldown_counter")
"""Integers from 0 on. (`last_epoch` is one from -1 on.)"""
BESTS = ("best", "mode_worse")
"""Any numbers except NaN."""

# These settings may differ, because their defaults have changed between versions of this code.
LENGTHS = ("T_i", "T_max", "total_iters")
"""Numbers above 0."""
DIRECTIONS = ("mode",)
"""`"min"` or `"max"`."""


def named_optimizer_state(optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """Return the optimizer's state for a checkpoint.

    Returns:
        `state`, whose keys are names of parameters, and `param_groups`, whose `params` are lists of
        names.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state = {}
    groups = []
    for group in optimizer.param_groups:
        listed = [names[id(parameter)] for parameter in group["params"]]
        for name, parameter in zip(listed, group["params"], strict=True):
            # A parameter without a state gets an entry as well, so that a lost one is noticed
            state[name] = dict(optimizer.state.get(parameter, {}))
        groups.append({**group, "params": listed})
    return {"state": state, "param_groups": groups}


def checked_optimizer_state(
    optimizer: Optimizer, model: nn.Module, saved: Mapping[str, Any], source: Path
) -> dict[str, Any]:
    """Check the state of an optimizer in a checkpoint and return it for `load_state_dict`.

    Args:
        optimizer: a new one, built from the run's config.
        model: the model whose parameters it has.
        saved: what `named_optimizer_state` returned, or, in older checkpoints, the optimizer's own
            `state_dict()`.
        source: the checkpoint, for messages.

    Raises:
        CheckpointError: the state of a parameter is missing or has another shape, or a setting
            differs.
    """
    where = f"{source}: optimizer"
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = saved["param_groups"]
    entries = dict(saved["state"])
    if len(groups) != len(optimizer.param_groups):
        raise CheckpointError(
            f"{where}.param_groups: {len(groups)} groups in the file,"
            f" {len(optimizer.param_groups)} in this run"
        )
    state = {}
    settings = []
    number = 0
    for index, (group, saved_group) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
        group_place = f"{where}.param_groups.{index}"
        listed = [names[id(parameter)] for parameter in group["params"]]
        numbers = list(range(number, number + len(listed)))
        by_name = saved_group.get("params") == listed
        # Older files list torch's numbers
        if not by_name and saved_group.get("params") != numbers:
            raise CheckpointError(
                f"{group_place}.params: is not the list of this model's parameters"
            )
        settings.append({**_settings(saved_group, group, group_place), "params": numbers})
        expected: dict[torch.Size, dict[str, Any]] = {}
        for name, parameter in zip(listed, group["params"], strict=True):
            # Parameters of one shape share a trial step, as a network has many of them
            if parameter.shape not in expected:
                expected[parameter.shape] = _after_a_step(type(optimizer), group, parameter.shape)
            key = name if by_name else number
            if by_name and key not in entries:
                raise CheckpointError(f"{where}.state: {name!r} is missing")
            # In older files a parameter without a state had no entry
            entry = entries.pop(key, {})
            values = _values(entry, expected[parameter.shape], f"{where}.state.{name}")
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
    """Check the state of a schedule in a checkpoint and return it for `load_state_dict`.

    Args:
        saved: the state in the checkpoint.
        new: the state of a new schedule, built from the run's config.
        steps_done: how often the schedule has been stepped; ReduceLROnPlateau may have been stepped
            less often.
        source: the checkpoint, for messages.

    Raises:
        CheckpointError: a value is missing, or this schedule cannot have it after so many steps.
    """
    where = f"{source}: scheduler"
    state = _check_value(saved, new, where, "")
    _check_last_epoch(state, steps_done, where)
    # Epochs without the watched value do not step ReduceLROnPlateau, which has num_bad_epochs
    if "num_bad_epochs" not in new and state.get("last_epoch", steps_done) != steps_done:
        raise CheckpointError(
            f"{where}.last_epoch: is {state['last_epoch']} after {steps_done} steps of the run"
        )
    return state


def _after_a_step(
    kind: Callable[..., Optimizer], group: Mapping[str, Any], shape: torch.Size
) -> dict[str, Any]:
    """Return the state that an optimizer keeps for a parameter of this shape."""
    # Only a step creates the state
    parameter = torch.zeros(shape, requires_grad=True)
    parameter.grad = torch.zeros_like(parameter)
    # A user's own class may not accept 0
    trial = kind([parameter], lr=group["lr"])
    trial.param_groups[0].update(
        {key: value for key, value in group.items() if key not in ("params", *KERNELS)}
    )
    trial.step()
    return dict(trial.state[parameter])


def _values(entry: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the state of one parameter in a checkpoint: empty, or everything that is expected."""
    values = {key: value for key, value in entry.items() if key != OLD_CHECKSUM}
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
                f"{where}.{key}: is of shape {tuple(value.shape)},"
                f" but {tuple(own.shape)} was expected for this parameter"
            )
        # Kernels read the memory of a tensor, which sparse and meta tensors do not have
        is_plain = value.layout == torch.strided and not value.is_meta
        if not is_plain or value.is_floating_point() != own.is_floating_point():
            raise CheckpointError(
                f"{where}.{key}: is a tensor of {value.dtype}, but {own.dtype} was expected"
            )
    if values and values.keys() != expected.keys():
        missing = next(key for key in expected if key not in values)
        raise CheckpointError(f"{where}: {missing!r} is missing")
    return values


def _settings(saved: Mapping[str, Any], group: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check the settings of a saved group and return those with which the run continues."""
    settings = {}
    for key, own in group.items():
        if key == "params":
            continue
        if key not in saved and key in (*RATES, *FRACTIONS):
            raise CheckpointError(f"{where}: {key!r} is missing")
        # A file from an older version of torch may lack a setting, which is then the config's
        value = saved.get(key, own)
        if key not in KERNELS:
            settings[key] = _check_value(value, own, f"{where}.{key}", key)
        elif value is None or value is False:
            settings[key] = value
        elif value is True:
            # This device may lack the kernels with which the run started
            settings[key] = own
        else:
            raise CheckpointError(
                f"{where}.{key}: is {_format(value)}; expected true, false or null"
            )
    return settings


def _check_value(value: Any, own: Any, where: str, key: str) -> Any:
    """Return a saved value if training can have turned the initial one into it.

    Args:
        value: the value in the checkpoint.
        own: the value of a new optimizer or schedule.
        where: its place, for messages.
        key: the name of both.
    """
    if isinstance(own, Counter):
        is_counter = isinstance(value, dict) and all(
            type(each) is int for each in (*value, *value.values())
        )
        if not is_counter:
            raise CheckpointError(
                f"{where}: is {_format(value)}; expected integers with their counts"
            )
        value = Counter(value)
    elif isinstance(own, dict):
        return _check_mapping(value, own, where)
    elif isinstance(own, list | tuple):
        if not isinstance(value, list | tuple) or len(value) != len(own):
            raise CheckpointError(f"{where}: is {_format(value)}; expected a list of {len(own)}")
        pairs = enumerate(zip(value, own, strict=True))
        return type(own)(
            _check_value(each, own_each, f"{where}.{index}", key)
            for index, (each, own_each) in pairs
        )
    if not _is_possible(value, own, key):
        raise CheckpointError(
            f"{where}: is {_format(value)}; in a run of this config it starts as {_format(own)}"
        )
    return value


def _check_mapping(value: Any, own: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: is {_format(value)}; expected an object")
    state = {}
    for key, initial in own.items():
        # torch's internal flags come and go with its versions
        if key not in value and not isinstance(initial, bool):
            raise CheckpointError(f"{where}: {key!r} is missing")
        state[key] = _check_value(value.get(key, initial), initial, f"{where}.{key}", key)
    return state


def _is_possible(value: Any, own: Any, key: str) -> bool:
    """Whether training can have turned `own` into `value`."""
    both_numbers = type(value) in (int, float) and type(own) in (int, float)
    if (both_numbers or type(value) is type(own)) and value == own:
        return True
    if key == "last_epoch":
        return type(value) is int and value >= -1
    if key in COUNTS:
        return type(value) is int and value >= 0
    if key in (*RATES, *FRACTIONS, *LENGTHS):
        # isfinite() fails for integers that are too large for a float
        if type(value) not in (int, float) or not abs(value) <= float_info.max:
            return False
        if key in FRACTIONS:
            return 0 <= value < 1
        if key in LENGTHS:
            return value > 0
        return value >= 0
    if key in BESTS:
        return type(value) is float and not isnan(value)
    return key in DIRECTIONS and own in ("min", "max") and value in ("min", "max")


def _check_last_epoch(state: Mapping[str, Any], steps_done: int, where: str) -> None:
    """Check that neither the schedule nor one inside it has taken more steps than the run."""
    if state.get("last_epoch", 0) > steps_done:
        raise CheckpointError(
            f"{where}.last_epoch: is {state['last_epoch']} after {steps_done} steps of the run"
        )
    parts: Sequence[Mapping[str, Any]] = state.get("_schedulers", ())
    for number, part in enumerate(parts):
        _check_last_epoch(part, steps_done, f"{where}._schedulers.{number}")


def _format(value: Any) -> str:
    """A value for a message, or its type if the value is large."""
    if isinstance(value, Tensor) or (isinstance(value, dict | list | tuple) and len(value) > 4):
        return f"a {type(value).__name__}"
    return one_line(repr(value), 80)
