"""Optimizers by their names in `torch.optim`."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from base.config.imports import own_class
from base.config.training import OptimizerConfig
from base.errors import ConfigError
from base.optim.arguments import argument_in_message, check_arguments, format_json
from base.registry import lookup
from base.text import first_line

OPTIMIZERS: dict[str, type[Optimizer]] = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if inspect.isclass(cls) and issubclass(cls, Optimizer) and cls is not Optimizer
}
UNUSABLE = {
    "LBFGS": "it evaluates the loss several times in one step",
    "SparseAdam": "it takes sparse gradients only",
    "Muon": "it takes matrices only, and weights of convolutions and biases are not matrices",
    "LambdaLR": "it takes a Python function, which JSON cannot hold",
    "MultiplicativeLR": "it takes a Python function, which JSON cannot hold",
}
"""Optimizers and schedules of torch that a config cannot use, and why."""
FUSED_DEVICES = ("cpu", "cuda")


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> Optimizer:
    """Build the optimizer of a model.

    Parameters that a layer's class lists in `no_weight_decay` are exempt from weight decay: the
    thresholds of shifted ReLUs, as in ConvNorm. The update is one fused kernel where torch has one,
    unless the config sets `fused` or `foreach`.

    Raises:
        ConfigError: the type or an argument is wrong; the message names its key.
    """
    cls = find_class(OPTIMIZERS, config.type, "optimizer.type", Optimizer)
    check_arguments(cls, config.args, "optimizer.args", positional=1, others=OPTIMIZERS.values())
    exempt = _parameters_without_weight_decay(model)
    decaying = [parameter for parameter in model.parameters() if parameter not in exempt]
    groups: list[dict[str, Any]] = [{"params": decaying}]
    if exempt:
        # In the order of the model, not of the set, so that checkpoints agree on it
        listed = [parameter for parameter in model.parameters() if parameter in exempt]
        groups.append({"params": listed, "weight_decay": 0.0})
    args = dict(config.args)
    if _can_fuse(cls, args, next(model.parameters()).device):
        args["fused"] = True
    return construct(cls, "optimizer.args", groups, args)


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Continue from a saved state, with the settings saved in it.

    A run that started without fused kernels continues without them.
    """
    optimizer.load_state_dict(state)
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            # Fused kernels read tensors in the order of their memory, and do not notice that a
            # saved one has another order (channels last) than its parameter
            if isinstance(value, Tensor) and value.ndim > 1 and value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def find_class(table: Mapping[str, type], name: str, key: str, kind: type) -> type:
    """Return the class of this name in torch's table, or, for a dotted name, in imported code.

    Args:
        table: name -> class.
        name: the name in the config.
        key: the dotted key of the name.
        kind: the base class that an imported class must have.

    Raises:
        ConfigError: the class does not exist, or a config cannot use it.
    """
    if "." in name:
        return own_class(name, kind, key)
    cls = lookup(table, name, key)
    if name in UNUSABLE:
        raise ConfigError(f"{key}: {name} cannot be used from a config: {UNUSABLE[name]}")
    return cls


def construct(cls: type, key: str, first: Any, args: Mapping[str, Any]) -> Any:
    """Return `cls(first, **args)`, with torch's own error as one line that names the key.

    Raises:
        ConfigError: torch does not accept the arguments.
    """
    try:
        return cls(first, **args)
    # torch's classes raise errors of any type for values that they did not expect
    except Exception as error:
        # The schedules in a SequentialLR are objects by now, which JSON cannot show
        values = {name: value for name, value in args.items() if name != "schedulers"}
        name = argument_in_message(str(error), values)
        value = values.get(name.removeprefix("."), values)
        raise ConfigError(
            f"{key}{name}: {cls.__name__} does not accept {format_json(value)}: {first_line(error)}"
        ) from None


def _parameters_without_weight_decay(model: nn.Module) -> set[nn.Parameter]:
    found = set()
    for module in model.modules():
        names = getattr(type(module), "no_weight_decay", ())
        # timm's networks have a method of this name, which returns names of the whole network
        if callable(names):
            continue
        for name in names:
            found.add(module.get_parameter(name))
    return found


def _can_fuse(cls: Callable[..., Optimizer], args: Mapping[str, Any], device: torch.device) -> bool:
    """Whether the config leaves the choice of kernels open and torch has a fused one."""
    if "fused" not in inspect.signature(cls).parameters or device.type not in FUSED_DEVICES:
        return False
    if "fused" in args or "foreach" in args:
        return False
    # torch has no function for this, and the answer depends on the optimizer, its arguments, the
    # device and the version of torch. So take a step with one number
    number = nn.Parameter(torch.zeros(1, device=device))
    number.grad = torch.zeros_like(number)
    try:
        cls([number], **args, fused=True).step()
    # Wrong arguments fail here, too, and are reported when they fail again without fused
    except Exception:
        return False
    return True
