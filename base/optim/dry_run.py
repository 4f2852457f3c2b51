"""Optimizer and schedule tried on a number, before any data is read."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from base.config.training import OptimizerConfig, SchedulerConfig
from base.errors import ConfigError
from base.optim.optimizers import _culprit, build_optimizer
from base.optim.schedules import Schedule, check_plateau
from base.text import first_line


def check_optimization(
    optimizer: OptimizerConfig, scheduler: SchedulerConfig, begun: bool = False
) -> None:
    """Build both for a dummy layer and take a few steps, so that wrong arguments are found before
    any data is read.

    Args:
        optimizer, scheduler: what to build.
        begun: a run with them has begun already. It may go on with a plateau's mode that a new run
            may not have.

    Raises:
        ConfigError: naming `optimizer.args.x` or `lr_scheduler.args.x`.
    """
    if not begun:
        check_plateau(scheduler)
    _try(
        "optimizer.args", optimizer.args,
        lambda args: _take_steps(optimizer.model_copy(update={"args": args}), SchedulerConfig()),
    )  # fmt: skip
    _try(
        "lr_scheduler.args", scheduler.args,
        lambda args: _take_steps(optimizer, scheduler.model_copy(update={"args": args})),
    )  # fmt: skip


def _try(key: str, args: Mapping[str, Any], attempt: Callable[[dict[str, Any]], None]) -> None:
    try:
        attempt(dict(args))
    except ConfigError:
        raise
    except Exception as error:
        name = _culprit(args, attempt, error)
        raise ConfigError(
            f"{key}{name}: a step with these arguments fails: {first_line(error)}"
        ) from None


def _take_steps(optimizer: OptimizerConfig, scheduler: SchedulerConfig) -> None:
    dummy = nn.Conv2d(2, 2, 1)
    built = build_optimizer(optimizer, dummy)
    schedule = Schedule(
        scheduler, built, epochs=1000, batches_per_epoch=1, has_validation=True, trial=True
    )
    for step in range(min(3, getattr(schedule.scheduler, "total_steps", 3))):
        dummy(torch.ones(1, 2, 1, 1)).sum().backward()
        built.step()
        if step == 0 and not all(parameter.isfinite().all() for parameter in dummy.parameters()):
            # what grows later, training itself notices
            raise ValueError("the weights are not finite after the first one")
        schedule.step_batch()
        schedule.step_epoch({schedule.monitor: 1.0})
