"""Progress: how far a run has come, and how good it was."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Progress:
    """Everything a checkpoint holds besides weights, optimiser, schedule and generators.

    Attributes:
        epochs_done: finished epochs.
        batches_done: minibatches done of the epoch after them.
        learning_rate: the learning rate that epoch began with.
        history: the logged values of every finished epoch.
        best_value: the monitored value at its best; None before the first epoch, or without monitoring.
        best_epoch: the epoch it was reached in; the first of several equally good ones.
        epochs_without_improvement: epochs since then.
        train_seconds: time spent in training steps.
        images_seen: images trained on, counted once per minibatch.
    """

    epochs_done: int = 0
    batches_done: int = 0
    learning_rate: float | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    best_value: float | None = None
    best_epoch: int | None = None
    epochs_without_improvement: int = 0
    train_seconds: float = 0.0
    images_seen: int = 0

    def finish_epoch(self, log: dict[str, Any], monitor: str) -> bool:
        """Count an epoch and its logged values; returns whether it is the best so far.

        `monitor` is `"max NAME"` or `"min NAME"` of a logged value, or `"off"`: the newest epoch is the best.
        """
        self.history.append(log)
        self.epochs_done += 1
        self.batches_done = 0
        if monitor != "off" and not self._improves(log, monitor):
            self.epochs_without_improvement += 1
            return False
        self.best_epoch = self.epochs_done
        self.epochs_without_improvement = 0
        return True

    def _improves(self, log: Mapping[str, Any], monitor: str) -> bool:
        mode, _, name = monitor.partition(" ")
        value = log[name]
        if self.best_value is not None and not (value > self.best_value if mode == "max" else value < self.best_value):
            return False
        self.best_value = value
        return True
