"""Optimizers by the names of `torch.optim`."""

import inspect
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from base.config.imports import own_class
from base.config.training import OptimizerConfig
from base.errors import ConfigError
from base.optim.signatures import check_arguments, shown
from base.registry import lookup
from base.text import first_line

logger = logging.getLogger(__name__)

OPTIMIZERS: dict[str, type[Optimizer]] = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if inspect.isclass(cls) and issubclass(cls, Optimizer) and cls is not Optimizer
}
UNUSABLE = {
    "LBFGS": "it evaluates the loss several times in one step",
    "SparseAdam": "it takes sparse gradients only",
    "Muon": "it takes matrices only, and convolutions and biases are none",
    "LambdaLR": "it takes a Python function, which JSON cannot hold",
    "MultiplicativeLR": "it takes a Python function, which JSON cannot hold",
}
FUSED_ON = ("cpu", "cuda")


def _culprit(
    args: Mapping[str, Any], attempt: Callable[[dict[str, Any]], Any], error: Exception
) -> str:
    """`.name` of the first argument without which `attempt` succeeds, or that the error names;
    nothing where there is none."""
    for name in args:
        try:
            attempt({other: value for other, value in args.items() if other != name})
        except Exception:  # noqa: S112 - so it was not this one, or not this one alone
            continue
        return f".{name}"
    named = [name for name in args if len(args) == 1 or re.search(rf"\b{name}\b", str(error))]
    return f".{named[0]}" if named else ""


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> Optimizer:
    """The optimizer of `model`. Parameters that a layer's class names in `no_weight_decay` are
    exempt from it: the thresholds of shifted ReLUs, as in ConvNorm. The update is one fused kernel
    where torch has it, unless the config says anything about `fused` or `foreach`."""
    cls = _usable(OPTIMIZERS, config.type, "optimizer.type", Optimizer)
    check_arguments(cls, config.args, "optimizer.args", given=1, others=OPTIMIZERS.values())
    exempt = _without_weight_decay(model)
    groups: list[dict[str, Any]] = [
        {"params": [value for value in model.parameters() if value not in exempt]}
    ]
    if exempt:
        groups.append(
            {
                "params": [value for value in model.parameters() if value in exempt],
                "weight_decay": 0.0,
            }
        )
    fused = {"fused": True} if _can_fuse(cls, config.args, next(model.parameters()).device) else {}
    return _build(cls, "optimizer.args", groups, {**config.args, **fused})


def _without_weight_decay(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of a model that its layers' classes name in `no_weight_decay`."""
    found = set()
    for module in model.modules():
        names = getattr(type(module), "no_weight_decay", ())
        # timm's networks have a method of this name
        for name in () if callable(names) else names:
            found.add(module.get_parameter(name))
    return found


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Continue from a saved state, with the settings saved in it: a run that began without fused
    kernels goes on without.

    Fused kernels read the tensors of a parameter as they lie in memory, and take no notice where
    one is laid out in another order (channels last) than the others. So what was saved is brought
    into the order of its parameter."""
    optimizer.load_state_dict(state)
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.ndim > 1 and value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _can_fuse(cls: Callable[..., Optimizer], args: Mapping[str, Any], device: torch.device) -> bool:
    """Whether fused updates are left to us, and torch has a kernel for them: tried on one number,
    as it depends on optimizer, arguments, device and version."""
    if (
        "fused" not in inspect.signature(cls).parameters
        or {"fused", "foreach"} & set(args)
        or device.type not in FUSED_ON
    ):
        return False
    number = nn.Parameter(torch.zeros(1, device=device))
    number.grad = torch.zeros_like(number)
    try:
        cls([number], **args, fused=True).step()
    except Exception:  # wrong arguments among them, which then fail without it and are named
        return False
    return True


def _usable(table: Mapping[str, type], name: str, key: str, kind: type) -> type:
    """The class of this name in the table, or, by its dotted name, in what a user has imported."""
    if "." in name:
        return own_class(name, kind, key)
    cls = lookup(table, name, key)
    if name in UNUSABLE:
        raise ConfigError(f"{key}: {name} cannot be used from a config: {UNUSABLE[name]}")
    return cls


def _build(cls: type, key: str, first: Any, args: Mapping[str, Any]) -> Any:
    try:
        return cls(first, **args)
    except Exception as error:  # whatever torch's classes raise on values they did not expect
        name = _culprit(args, lambda rest: cls(first, **rest), error)
        # which are built already
        values = {key: value for key, value in args.items() if key != "schedulers"}
        value = values.get(name[1:], values)
        raise ConfigError(
            f"{key}{name}: {cls.__name__} does not accept {shown(value)}: {first_line(error)}"
        ) from None
