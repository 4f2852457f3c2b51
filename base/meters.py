"""Sums and counts over samples: every metric is reduced once, never averaged over batch means."""

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
    """Whether a logged value of this name is an accuracy, a fraction that reads as per cent and is
    better when larger, such as `top1` and `val_robust_top5`."""
    return "top" in name


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
    """The sums of one batch: `loss` and every metric."""
    logits = logits.detach()
    sums = {
        "loss": losses.detach().sum(),
        **{name: metric(logits, labels) for name, metric in metrics.items()},
    }
    return BatchResult(sums, len(labels))


class Meters:
    """Running sums of `BatchResult`s. They stay on the device until they are read, so adding does
    not synchronize."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, result: BatchResult) -> None:
        """Add one batch. Sums are float64 where the device has it, so that their rounding does not
        grow with the epoch."""
        for name, value in result.sums.items():
            value = value.detach()
            value = value if value.device.type == "mps" else value.double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.count += result.count

    def all_reduce(self) -> "Meters":
        """The sums of all ranks, the same on every rank; with one process itself."""
        if world_size() == 1:
            return self
        total = Meters()
        for sums, count in all_gather_object(
            ({name: float(value) for name, value in self.sums.items()}, self.count)
        ):
            total.add(
                BatchResult(
                    {
                        name: torch.tensor(value, dtype=torch.float64)
                        for name, value in sums.items()
                    },
                    count,
                )
            )
        return total

    def means(self) -> dict[str, float]:
        """Every sum over the count; empty before the first batch."""
        return {name: float(value) / self.count for name, value in self.sums.items()}

    def state_dict(self) -> dict[str, Any]:
        """Sums and count, for a checkpoint in the middle of an epoch."""
        return {"sums": self.sums, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Continue from saved sums."""
        self.sums = {name: value.to(device) for name, value in state["sums"].items()}
        self.count = state["count"]
