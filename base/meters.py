"""Sums and counts over samples: every metric is divided once, never averaged over batch means."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isclose
from typing import Any

import torch
from torch import Tensor

from base.distributed import all_gather_object, world_size
from base.errors import ConfigError

Loss = Callable[[Tensor, Tensor], Tensor]
"""`(logits (B, num_classes), labels (B,)) -> losses (B,)`, one per sample."""
Metric = Callable[[Tensor, Tensor], Tensor]
"""`(logits (B, num_classes), labels (B,)) -> number of correct samples`, 0-dim; see
`check_metric`."""


ROUNDING = 1e-3
"""How far the value of a metric may be from a count, relatively: it may be a sum of float16."""


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


def check_losses(losses: Any, samples: int | None, claim: str) -> None:
    """Check that there is one loss per sample: others could not be summed over batches.

    Args:
        losses: what a loss or a training method has given.
        samples: in the batch; None if that is not known.
        claim: the beginning of the message, such as `val_loss: 'mine' must return`.

    Raises:
        ConfigError: the message says what was given instead.
    """
    if isinstance(losses, Tensor):
        if losses.dim() == 1 and samples in (None, len(losses)):
            return
        found = str(tuple(losses.shape))
    else:
        found = f"a value of type {type(losses).__name__}"
    raise ConfigError(f"{claim} one loss per sample, of shape ({samples or 'B'},), not {found}")


def check_metric(name: str, metric: Metric, logits: Tensor, labels: Tensor) -> None:
    """Check that a metric counts the samples of a batch.

    A count is twice as large for a batch in which every sample stands twice; a mean is not. A count
    need not be an integer: with mixup, or of confidences, it is a sum of fractions.

    Raises:
        ConfigError: naming the metric and what it returned.
    """
    count = metric(logits, labels)
    samples = len(labels)
    if not isinstance(count, Tensor):
        found = f"a value of type {type(count).__name__}"
    elif count.dim() > 0:
        found = f"one of shape {tuple(count.shape)}"
    elif not 0 <= float(count) <= samples * (1 + ROUNDING):
        found = f"{float(count):.6g} for {samples} samples"
    else:
        twice = metric(torch.cat([logits, logits]), torch.cat([labels, labels]))
        if isclose(float(twice), 2 * float(count), rel_tol=ROUNDING):
            return
        found = (
            f"{float(count):.6g} for {samples} samples and {float(twice):.6g} for the same samples"
            " twice"
        )
    raise ConfigError(
        f"metrics: {name!r} must return a tensor without dimensions, the number of correct samples"
        f" of the batch, not {found}"
    )


def batch_result(
    losses: Tensor,
    logits: Tensor,
    labels: Tensor,
    metrics: Mapping[str, Metric],
    *,
    claim: str = "losses: expected",
) -> BatchResult:
    """Return the sums of one batch: `loss` and every metric.

    Raises:
        ConfigError: there is not one loss per sample; see `check_losses` for `claim`.
    """
    check_losses(losses, len(labels), claim)
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
