"""TrainState: how far a run has come, and how good it was."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Annotated, Any

from pydantic import Field

from base.config.section import Count, Number, Positive

NotNegative = Annotated[Number, Field(ge=0, allow_inf_nan=False)]


@dataclass
class TrainState:
    """Everything that a checkpoint holds besides weights, optimizer, schedule and generators.

    Attributes:
        epochs_done: finished epochs.
        batches_done: minibatches done of the epoch that follows.
        learning_rate: the learning rate at the beginning of that epoch.
        history: the logged values of every finished epoch.
        best_value: the monitored value at its best; None before the first epoch, or without
            monitoring.
        best_epoch: the epoch with that value; the last of several equally good ones.
        best_since: the first epoch that could be the best: 1, unless the best model of the epochs
            before it was lost.
        epochs_without_improvement: epochs since the value last became better.
        train_seconds: time spent in training steps.
        images_seen: images trained on, counted once per minibatch.
    """

    epochs_done: Count = 0
    batches_done: Count = 0
    learning_rate: NotNegative | None = None
    history: list[dict[str, Number | None]] = field(default_factory=list)
    best_value: Number | None = None
    best_epoch: Positive | None = None
    best_since: Positive = 1
    epochs_without_improvement: Count = 0
    train_seconds: NotNegative = 0.0
    images_seen: Annotated[int, Field(ge=0)] = 0

    def finish_epoch(self, log: dict[str, Any], monitor: str) -> bool:
        """Count an epoch and its logged values; return whether it is the best so far.

        An epoch in which the monitored value was not measured is neither better nor worse. One that
        logged an infinite number or a NaN, under any name, is never the best.

        Args:
            log: the logged values.
            monitor: `"max NAME"` or `"min NAME"` of a logged value, or `"off"`, which makes the
                newest epoch the best.
        """
        self.history.append(log)
        self.epochs_done += 1
        self.batches_done = 0
        if not_finite(log):
            if monitor != "off":
                self.epochs_without_improvement += 1
            return False
        if monitor == "off":
            self.best_epoch = self.epochs_done
            return True
        mode, _, name = monitor.partition(" ")
        value = log.get(name)
        if value is None:
            return False
        better = self.best_value is None or _is_better(value, self.best_value, mode)
        if better:
            self.epochs_without_improvement = 0
        else:
            self.epochs_without_improvement += 1
        # Of equally good epochs the newest is the best, as in ConvNorm, but only a better one
        # counts as an improvement; after the best model was lost, any epoch is the best
        if better or value == self.best_value or self.best_epoch is None:
            self.best_epoch = self.epochs_done
            self.best_value = value
            return True
        return False


def _is_better(value: float, best: float, mode: str) -> bool:
    if mode == "max":
        return value > best
    return value < best


def not_finite(log: Mapping[str, Any]) -> list[str]:
    """Return the names of the logged numbers that are infinite or NaN."""
    return [name for name, value in log.items() if isinstance(value, float) and not isfinite(value)]
