"""Learning-rate schedules by their names in `torch.optim.lr_scheduler`."""

import inspect
import logging
import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch.optim import Optimizer, lr_scheduler

from base.config.training import SchedulerConfig
from base.errors import ConfigError
from base.optim.arguments import check_arguments, format_json
from base.optim.optimizers import construct, find_class

logger = logging.getLogger(__name__)

SCHEDULERS: dict[str, type] = {
    name: cls
    for name, cls in vars(lr_scheduler).items()
    if inspect.isclass(cls)
    and issubclass(cls, lr_scheduler.LRScheduler)
    and name not in ("LRScheduler", "_LRScheduler")
}
STEPPED_BY_BATCH = ("OneCycleLR", "CyclicLR")
LENGTH_ARGUMENTS = {
    "CosineAnnealingLR": "T_max",
    "OneCycleLR": "total_steps",
    "PolynomialLR": "total_iters",
}
"""The argument that defaults to the number of the schedule's steps: those of the whole run, or,
inside a SequentialLR, those between its milestones."""
Part = tuple[str, Mapping[str, Any]]
"""One of the schedules that another consists of: its dotted key, and its `type` and `args`."""


def check_plateau_mode(scheduler: SchedulerConfig) -> None:
    """Check that ReduceLROnPlateau does not wait for its value to get worse.

    Raises:
        ConfigError: naming `lr_scheduler.args.mode`.
    """
    mode = scheduler.args.get("mode")
    right = plateau_mode(scheduler.monitor or "val_loss")
    if scheduler.type == "ReduceLROnPlateau" and mode in ("min", "max") and mode != right:
        watched = scheduler.monitor or "the loss"
        raise ConfigError(
            f"lr_scheduler.args.mode: {mode!r} lowers the learning rate while {watched} improves:"
            f" expected {right!r} (the default for it)"
        )


def plateau_mode(monitor: str) -> str:
    """Return which values of `monitor` are better: `min` for losses, `max` for accuracies."""
    return "min" if monitor.endswith("loss") else "max"


def spans_whole_run(scheduler: SchedulerConfig) -> bool:
    """Whether the schedule is as long as the run, because no argument sets another length."""
    parts: list[Mapping[str, Any]] = [{"type": scheduler.type, "args": scheduler.args}]
    while parts:
        part = parts.pop()
        args = part.get("args", {})
        length = LENGTH_ARGUMENTS.get(part["type"])
        if length and length not in args and "epochs" not in args:
            return True
        schedulers = args.get("schedulers")
        if isinstance(schedulers, list):
            parts += [inner for inner in schedulers if _is_part(inner)]
    return False


def build_scheduler(config: SchedulerConfig, optimizer: Optimizer, steps: int) -> Any:
    """Build torch's schedule.

    Args:
        config: the type, its arguments and the value that it watches.
        optimizer: the optimizer whose learning rates it sets.
        steps: the number of its steps in the whole run.

    Returns:
        torch's schedule; None for the type `none`.

    Raises:
        ConfigError: the type or an argument is wrong; the message names its key.
    """
    if config.type == "none":
        return None
    args = dict(config.args)
    if config.type == "ReduceLROnPlateau":
        if config.interval == "batch":
            raise ConfigError(
                "lr_scheduler.interval: ReduceLROnPlateau steps after every epoch,"
                " not after every batch"
            )
        args.setdefault("mode", plateau_mode(config.monitor or "val_loss"))
    return _build(config.type, args, optimizer, steps, "lr_scheduler")


class Schedule:
    """A learning-rate schedule that knows whether to step after every batch or every epoch.

    Args:
        config: the type, its arguments and the interval.
        optimizer: the optimizer whose learning rates it sets.
        epochs: epochs in the whole run.
        batches_per_epoch: minibatches in one epoch.
        has_validation: whether `val_loss` will be logged; ReduceLROnPlateau watches it by default,
            and `loss` otherwise.

    Raises:
        ConfigError: naming `lr_scheduler.args.x`.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        optimizer: Optimizer,
        epochs: int,
        batches_per_epoch: int,
        has_validation: bool,
    ) -> None:
        self.optimizer = optimizer
        self.steps_by_batch = config.interval == "batch" or (
            config.interval is None and config.type in STEPPED_BY_BATCH
        )
        self.monitor = config.monitor or ("val_loss" if has_validation else "loss")
        steps = epochs * batches_per_epoch if self.steps_by_batch else epochs
        self.scheduler = build_scheduler(config, optimizer, steps)
        _check_cycle_length(self.scheduler, steps)
        self.on_plateau = isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau)

    @property
    def learning_rate(self) -> float:
        """The learning rate that the next update uses (of the first parameter group)."""
        return float(self.optimizer.param_groups[0]["lr"])

    def step_batch(self) -> None:
        """Step after a minibatch, if the schedule steps by batches."""
        if self.scheduler is not None and self.steps_by_batch:
            self.scheduler.step()

    def step_epoch(self, log: Mapping[str, float]) -> None:
        """Step after an epoch, if the schedule steps by epochs.

        Args:
            log: the values that the epoch logged.
        """
        if self.on_plateau:
            # Robust accuracy is measured every few epochs only; the others do not count
            if self.monitor in log:
                self.scheduler.step(log[self.monitor])
        elif self.scheduler is not None and not self.steps_by_batch:
            with warnings.catch_warnings():
                # After a resume at the end of an epoch torch has not seen an optimizer step: the
                # process that was interrupted took it
                warnings.filterwarnings(
                    "ignore", message="Detected call of `lr_scheduler.step", category=UserWarning
                )
                self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the schedule's state; empty for the type `none`."""
        if self.scheduler is None:
            return {}
        return self.scheduler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state that `base.optim.state.checked_schedule_state` returned.

        The learning rates are in the optimizer's state. Lengths and the plateau's mode are in this
        one: a run keeps those that it started with, even if the defaults have changed.
        """
        if self.scheduler is None:
            return
        default_mode = getattr(self.scheduler, "mode", None)
        self.scheduler.load_state_dict(state)
        if self.on_plateau and self.scheduler.mode != default_mode:
            logger.warning(
                "lr_scheduler: the run started with mode %r for %s and keeps it; new runs have %r",
                self.scheduler.mode,
                self.monitor,
                default_mode,
            )


def _build(name: str, args: Mapping[str, Any], optimizer: Optimizer, steps: int, key: str) -> Any:
    """Build one schedule, after the schedules that it consists of.

    Args:
        name: the type.
        args: its arguments.
        optimizer: the optimizer whose learning rates it sets.
        steps: the number of its steps.
        key: the dotted key of the schedule.
    """
    cls = find_class(SCHEDULERS, name, f"{key}.type", lr_scheduler.LRScheduler)
    args = dict(args)
    length = LENGTH_ARGUMENTS.get(name)
    if length and "epochs" not in args:
        args.setdefault(length, steps)
    # ChainedScheduler is the only one whose first parameter is not the optimizer
    positional = 0 if name == "ChainedScheduler" else 1
    check_arguments(cls, args, f"{key}.args", positional, others=SCHEDULERS.values())
    if "schedulers" in inspect.signature(cls).parameters:
        parts = _parts(args["schedulers"], f"{key}.args.schedulers")
        spans = [steps] * len(parts)
        if name == "SequentialLR":
            _check_later_parts(parts)
            spans = _spans(args["milestones"], steps)
            # With too few milestones torch raises an error once all parts are built
            spans += [steps] * (len(parts) - len(spans))
        # A part that begins after the run's last step is built as well, and needs a length
        args["schedulers"] = [
            _build(part["type"], part.get("args", {}), optimizer, max(1, span), part_key)
            for (part_key, part), span in zip(parts, spans, strict=False)
        ]
    first = args.pop("schedulers") if name == "ChainedScheduler" else optimizer
    return construct(cls, f"{key}.args", first, args)


def _check_later_parts(parts: Sequence[Part]) -> None:
    """Check that no later part of a SequentialLR consists of schedules.

    torch's SequentialLR fails when such a part takes over.
    """
    for key, part in parts[1:]:
        if part["type"] in ("ChainedScheduler", "SequentialLR"):
            raise ConfigError(
                f"{key}.type: in a SequentialLR a {part['type']} can only be the first part"
            )


def _spans(milestones: Sequence[int], steps: int) -> list[int]:
    """How many of `steps` each part of a SequentialLR has."""
    limits = [0, *(min(milestone, steps) for milestone in milestones), steps]
    return [end - start for start, end in pairwise(limits)]


def _check_cycle_length(scheduler: Any, steps: int) -> None:
    """Check that every OneCycleLR, alone or within another schedule, lasts until its last step."""
    if isinstance(scheduler, lr_scheduler.OneCycleLR) and scheduler.total_steps < steps:
        raise ConfigError(
            f"lr_scheduler.args: the cycle has {scheduler.total_steps} steps, the run takes {steps}"
        )
    parts = getattr(scheduler, "_schedulers", [])
    spans = [steps] * len(parts)
    if isinstance(scheduler, lr_scheduler.SequentialLR):
        spans = _spans(scheduler._milestones, steps)
    for part, span in zip(parts, spans, strict=True):
        _check_cycle_length(part, span)


def _parts(value: Any, key: str) -> list[Part]:
    if not isinstance(value, list) or not value or not all(_is_part(part) for part in value):
        expected = 'expected a list of {"type": ..., "args": ...}'
        raise ConfigError(f"{key}: {expected}, not {format_json(value)}")
    for index, part in enumerate(value):
        # torch's error for it would name no key
        if part["type"] == "ReduceLROnPlateau":
            raise ConfigError(
                f"{key}.{index}.type: ReduceLROnPlateau cannot be part of another schedule"
            )
    return [(f"{key}.{index}", part) for index, part in enumerate(value)]


def _is_part(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("type"), str)
        and isinstance(value.get("args", {}), dict)
    )
