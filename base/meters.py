"""Sums and counts over samples: every metric is divided once, never averaged over batch means."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from base.distributed import all_gather_object, world_size

Loss = Callable[[Tensor, Tensor], Tensor]
"""`(logits (B, num_classes), labels (B,)) -> losses (B,)`, one per sample."""
Metric = Callable[[Tensor, Tensor], Tensor]
"""`(logits (B, num_classes), labels (B,)) -> number of correct samples`, 0-dim."""


def is_accuracy(name: str) -> bool:
    """Return whether a value of this name is an accuracy, such as `top1`, `val_robust_top5` and
    `eval.pgd.robust_top1`: a fraction that is shown in per cent, and better when larger."""
    return _has_word(name, r"top\d+")


def is_loss(name: str) -> bool:
    """Return whether a value of this name is a loss, such as `loss` and `last_epoch.val_loss`:
    better when smaller."""
    return _has_word(name, "loss")


def _has_word(name: str, word: str) -> bool:
    # What stands before the last dot says where the value comes from, not what it is
    words = re.split(r"[^a-zA-Z0-9]", name.rpartition(".")[2])
    return any(re.fullmatch(word, one) for one in words)


@dataclass(frozen=True)
class BatchResult:
    """What one minibatch adds to an epoch.

    Attributes:
        sums: 0-dim tensors: a value summed over the samples, such as the loss, or the number of
            correct predictions.
        count: the number of samples summed over; with several updates per minibatch each counts its
            samples.
    """

    sums: Mapping[str, Tensor]
    count: int


def batch_result(
    losses: Tensor, logits: Tensor, labels: Tensor, metrics: Mapping[str, Metric]
) -> BatchResult:
    """Return the sums of one batch: `loss` and every metric."""
    logits = logits.detach()
    sums = {"loss": losses.detach().sum()}
    for name, metric in metrics.items():
        sums[name] = metric(logits, labels)
    return BatchResult(sums, len(labels))


class Meters:
    """Running sums of `BatchResult`s. They stay on the device until they are read, so adding does
    not make the host wait for it."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, result: BatchResult) -> None:
        """Add one batch."""
        for name, value in result.sums.items():
            value = value.detach()
            value = value.to(_sum_dtype(value.device))
            if name in self.sums:
                value = self.sums[name] + value
            self.sums[name] = value
        self.count += result.count

    def all_reduce(self) -> "Meters":
        """Return the sums over all ranks, on every rank."""
        if world_size() == 1:
            return self
        own = {name: float(value) for name, value in self.sums.items()}
        total = Meters()
        for sums, count in all_gather_object((own, self.count)):
            tensors = {
                name: torch.tensor(value, dtype=torch.float64) for name, value in sums.items()
            }
            total.add(BatchResult(tensors, count))
        return total

    def means(self) -> dict[str, float]:
        """Return every sum divided by the count; empty before the first batch."""
        return {name: float(value) / self.count for name, value in self.sums.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return sums and count, for a checkpoint in the middle of an epoch."""
        return {"sums": self.sums, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Continue from saved sums."""
        # The type first: a run from a CPU may go on on a device without float64
        self.sums = {
            name: value.to(_sum_dtype(device)).to(device) for name, value in state["sums"].items()
        }
        self.count = state["count"]


def _sum_dtype(device: torch.device) -> torch.dtype:
    """In float32 the rounding would grow with the epoch, but Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
