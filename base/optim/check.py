"""A trial step of the optimizer and the schedule on a small layer, before any data is read."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from base.config.training import OptimizerConfig, SchedulerConfig
from base.errors import ConfigError
from base.optim.arguments import argument_in_message, format_json
from base.optim.optimizers import build_optimizer
from base.optim.schedules import build_scheduler, check_plateau_mode
from base.text import first_line

TRIAL_STEPS = 1000
"""The length of the run for which the trial builds the schedule."""


def check_optimization(
    optimizer: OptimizerConfig, scheduler: SchedulerConfig, resumed: bool = False
) -> None:
    """Build both for a small layer and take a step with each.

    Args:
        optimizer, scheduler: the config's sections.
        resumed: whether a run with these settings has already started. Such a run keeps a mode of
            ReduceLROnPlateau that a new run may not have.

    Raises:
        ConfigError: an argument is wrong; the message names `optimizer.args.x` or
            `lr_scheduler.args.x`.
    """
    if not resumed:
        check_plateau_mode(scheduler)
    layer = nn.Conv2d(2, 2, 1)
    built = build_optimizer(optimizer, layer)
    _try_step("optimizer.args", optimizer.args, layer, built, None)
    if scheduler.type == "none":
        return
    # A new layer: the schedule may change the first learning rate, and must not be blamed for
    # weights that the step before has made large
    layer = nn.Conv2d(2, 2, 1)
    built = build_optimizer(optimizer, layer)
    schedule = build_scheduler(scheduler, built, TRIAL_STEPS)
    _try_step("lr_scheduler.args", scheduler.args, layer, built, schedule)


def _try_step(
    key: str, args: Mapping[str, Any], layer: nn.Module, optimizer: Optimizer, scheduler: Any
) -> None:
    try:
        layer(torch.ones(1, 2, 1, 1)).sum().backward()
        optimizer.step()
        if not all(parameter.isfinite().all() for parameter in layer.parameters()):
            raise ValueError("the weights are not finite afterwards")
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0)
        elif scheduler is not None:
            scheduler.step()
    # torch's classes raise errors of any type for arguments that they did not expect
    except Exception as error:
        name = argument_in_message(str(error), args)
        raise ConfigError(
            f"{key}{name}: a step with {format_json(args)} fails: {first_line(error)}"
        ) from None
