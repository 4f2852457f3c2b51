"""Learning-rate schedules by the names of `torch.optim.lr_scheduler`."""

import inspect
import logging
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch.optim import Optimizer, lr_scheduler

from base.config.training import SchedulerConfig
from base.errors import ConfigError
from base.optim.optimizers import _build, _usable
from base.optim.signatures import check_arguments, shown

logger = logging.getLogger(__name__)

SCHEDULERS: dict[str, type] = {
    name: cls
    for name, cls in vars(lr_scheduler).items()
    if inspect.isclass(cls)
    and issubclass(cls, lr_scheduler.LRScheduler)
    and name not in ("LRScheduler", "_LRScheduler")
}
STEPPED_BY_BATCH = ("OneCycleLR", "CyclicLR")
WHOLE_SPAN_ARGUMENT = {
    "CosineAnnealingLR": "T_max",
    "OneCycleLR": "total_steps",
    "PolynomialLR": "total_iters",
}
"""The argument that defaults to the number of steps that the schedule has: those of the whole run,
or, inside a SequentialLR, those between its milestones."""
Part = tuple[str, Mapping[str, Any]]
"""One schedule that another is made of: its dotted key, and its `type` and `args`."""


def check_plateau(scheduler: SchedulerConfig) -> None:
    """Refuse a ReduceLROnPlateau that waits for the value it watches to get worse.

    Raises:
        ConfigError: naming `lr_scheduler.args.mode`.
    """
    mode, right = scheduler.args.get("mode"), plateau_mode(scheduler.monitor or "val_loss")
    if scheduler.type == "ReduceLROnPlateau" and mode in ("min", "max") and mode != right:
        watched = scheduler.monitor or "the loss"
        raise ConfigError(
            f"lr_scheduler.args.mode: {mode!r} lowers the learning rate while {watched} improves: expected {right!r}"
            " (the default for it)"
        )


def plateau_mode(monitor: str) -> str:
    """Which values of `monitor` are better: `min`, those of losses, or `max`, those of
    accuracies."""
    return "min" if monitor.endswith("loss") else "max"


def spans_whole_run(scheduler: SchedulerConfig) -> bool:
    """Whether the schedule's length is the run's, because no argument says otherwise."""
    parts = [{"type": scheduler.type, "args": scheduler.args}]
    while parts:
        part = parts.pop()
        args = part.get("args", {})
        length = WHOLE_SPAN_ARGUMENT.get(part["type"])
        if length and length not in args and "epochs" not in args:
            return True
        parts += [inner for inner in _listed(args.get("schedulers")) if _is_part(inner)]
    return False


class Schedule:
    """A learning-rate schedule that knows when to step: after every batch, or after every epoch.

    Args:
        config: the type, its arguments, the interval.
        optimizer: whose learning rates it sets.
        epochs: epochs of the whole run.
        batches_per_epoch: minibatches in one epoch.
        has_validation: whether `val_loss` will be logged; ReduceLROnPlateau watches it by default,
            and `loss` otherwise.
        trial: the run's length is made up, so no cycle is refused for being shorter.

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
        trial: bool = False,
    ) -> None:
        self.optimizer = optimizer
        by_batch = (
            config.interval or ("batch" if config.type in STEPPED_BY_BATCH else "epoch")
        ) == "batch"
        self.steps_by_batch = by_batch
        self.monitor = config.monitor or ("val_loss" if has_validation else "loss")
        self.scheduler: Any = None
        steps = epochs * (batches_per_epoch if by_batch else 1)
        if config.type != "none":
            args = dict(config.args)
            if config.type == "ReduceLROnPlateau":
                args.setdefault("mode", plateau_mode(self.monitor))
            self.scheduler = _build_scheduler(config.type, args, optimizer, steps, "lr_scheduler")
        if not trial:
            _refuse_short_cycle(self.scheduler, steps)
        self.on_plateau = isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau)
        if self.on_plateau and by_batch:
            raise ConfigError(
                "lr_scheduler.interval: ReduceLROnPlateau steps after every epoch, not after every batch"
            )

    @property
    def learning_rate(self) -> float:
        """The learning rate that the next update uses (of the first parameter group)."""
        return float(self.optimizer.param_groups[0]["lr"])

    def step_batch(self) -> None:
        """Called after every minibatch."""
        if self.scheduler is not None and self.steps_by_batch:
            self.scheduler.step()

    def step_epoch(self, log: Mapping[str, float]) -> None:
        """Called after every epoch with the values it logged. An epoch that has not measured what
        the plateau schedule watches (robust accuracy, which is validated every few epochs) does not
        count for it."""
        if self.on_plateau:
            if self.monitor in log:
                self.scheduler.step(log[self.monitor])
        elif self.scheduler is not None and not self.steps_by_batch:
            with warnings.catch_warnings():
                # torch misses an optimizer step where the epoch's last one was taken by the process
                # that this one continues
                warnings.filterwarnings(
                    "ignore", message="Detected call of `lr_scheduler.step", category=UserWarning
                )
                self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """The schedule's state; empty for `none`."""
        return {} if self.scheduler is None else self.scheduler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state. The optimizer's own state holds the learning rates.

        Lengths and the plateau's mode are part of the state: a run goes on as it began, whatever
        the defaults are by now."""
        if self.scheduler is not None:
            mode = getattr(self.scheduler, "mode", None)
            self.scheduler.load_state_dict(_restore_counters(self.scheduler, state))
            if self.on_plateau and self.scheduler.mode != mode:
                logger.warning(
                    "lr_scheduler: the run began with mode %r for %s, and goes on so: new runs have %r",
                    self.scheduler.mode, self.monitor, mode,
                )  # fmt: skip


def _build_scheduler(
    name: str, args: Mapping[str, Any], optimizer: Optimizer, steps: int, key: str
) -> Any:
    cls = _usable(SCHEDULERS, name, f"{key}.type", lr_scheduler.LRScheduler)
    args = dict(args)
    length = WHOLE_SPAN_ARGUMENT.get(name)
    if length and "epochs" not in args:
        args.setdefault(length, steps)
    given = 0 if name == "ChainedScheduler" else 1
    check_arguments(cls, args, f"{key}.args", given, others=SCHEDULERS.values())
    # SequentialLR and ChainedScheduler are made of others
    if "schedulers" in inspect.signature(cls).parameters:
        parts = _parts(args["schedulers"], f"{key}.args.schedulers")
        spans = [steps] * len(parts)
        if name == "SequentialLR":
            parts, args["milestones"] = _unfolded(parts, args["milestones"])
            spans = _spans(args["milestones"], steps)
            # torch refuses another number of milestones, once the parts are built
            spans += [steps] * (len(parts) - len(spans))
        args["schedulers"] = [
            # a part that begins after the last step is built all the same
            _build_scheduler(part["type"], part.get("args", {}), optimizer, max(1, span), part_key)
            for (part_key, part), span in zip(parts, spans, strict=False)
        ]
    return _build(
        cls,
        f"{key}.args",
        args.pop("schedulers") if name == "ChainedScheduler" else optimizer,
        args,
    )


def _unfolded(parts: Sequence[Part], milestones: Sequence[int]) -> tuple[list[Part], list[int]]:
    """Parts and milestones of a SequentialLR with the parts of one that stands in it in place of
    that: torch's own stumbles over a later part that is made of others, when its turn comes.

    Raises:
        ConfigError: a later part is a ChainedScheduler.
    """
    flat: list[Part] = []
    starts: list[int] = []
    begins = [0, *milestones]
    ends = [*milestones, None]
    if len(begins) != len(parts):
        return list(parts), list(milestones)
    for (key, part), begin, end in zip(parts, begins, ends, strict=True):
        if begin > 0 and part["type"] == "ChainedScheduler":
            raise ConfigError(
                f"{key}.type: in a SequentialLR a ChainedScheduler can only be the first part"
            )
        inner = [(key, part)]
        inner_starts = [begin]
        if begin > 0 and part["type"] == "SequentialLR":
            args = part.get("args", {})
            check_arguments(SCHEDULERS["SequentialLR"], args, f"{key}.args", given=1)
            inner, inner_milestones = _unfolded(
                _parts(args["schedulers"], f"{key}.args.schedulers"), args["milestones"]
            )
            if len(inner_milestones) != len(inner) - 1:
                raise ConfigError(
                    f"{key}.args.milestones: expected {len(inner) - 1}, one fewer than there are schedulers"
                )
            inner_starts = [begin, *(begin + milestone for milestone in inner_milestones)]
        reached = [place for place, start in enumerate(inner_starts) if end is None or start < end]
        flat += [inner[place] for place in reached]
        starts += [inner_starts[place] for place in reached]
    return flat, starts[1:]


def _spans(milestones: Sequence[int], steps: int) -> list[int]:
    """How many of `steps` each part of a SequentialLR has."""
    return [
        end - start
        for start, end in pairwise([0, *(min(milestone, steps) for milestone in milestones), steps])
    ]


def _refuse_short_cycle(scheduler: Any, steps: int) -> None:
    """Refuse a OneCycleLR, alone or as a part of another schedule, that is stepped more often than
    its cycle is long."""
    if isinstance(scheduler, lr_scheduler.OneCycleLR) and scheduler.total_steps < steps:
        raise ConfigError(
            f"lr_scheduler.args: the cycle has {scheduler.total_steps} steps, the run takes {steps}"
        )
    parts = getattr(scheduler, "_schedulers", [])
    spans = [steps] * len(parts)
    if isinstance(scheduler, lr_scheduler.SequentialLR):
        spans = _spans(scheduler._milestones, steps)
    for part, span in zip(parts, spans, strict=True):
        _refuse_short_cycle(part, span)


def _parts(value: Any, key: str) -> list[Part]:
    if isinstance(value, list) and value and all(_is_part(part) for part in value):
        return [(f"{key}.{index}", part) for index, part in enumerate(value)]
    raise ConfigError(f'{key}: expected a list of {{"type": ..., "args": ...}}, not {shown(value)}')


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_part(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("type"), str)
        and isinstance(value.get("args", {}), dict)
    )


def _restore_counters(scheduler: Any, state: dict[str, Any]) -> dict[str, Any]:
    """Checkpoints hold plain dicts; where the scheduler itself uses a Counter (MultiStepLR's
    milestones), give it one."""
    restored = dict(state)
    for key, value in state.items():
        if isinstance(getattr(scheduler, key, None), Counter):
            restored[key] = Counter(value)
    if "_schedulers" in state:
        pairs = zip(scheduler._schedulers, state["_schedulers"], strict=True)
        restored["_schedulers"] = [
            _restore_counters(part, part_state) for part, part_state in pairs
        ]
    return restored
