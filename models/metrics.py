"""Metrics as counts of samples: whoever reports an accuracy divides the sum of counts by the number of samples, once."""

from collections.abc import Callable

from torch import Tensor


def top1(logits: Tensor, labels: Tensor) -> Tensor:
    """The number of samples whose largest logit is the label's; of equal logits the first counts.

    Args:
        logits: `(B, C)`.
        labels: int64 `(B,)` in [0, C).

    Returns:
        int64, without dimensions, on the logits' device.
    """
    return (logits.argmax(dim=1) == labels).sum()


def top5(logits: Tensor, labels: Tensor) -> Tensor:
    """The number of samples whose label is among the five largest logits (all of them where there are fewer than five).

    Args:
        logits: `(B, C)`.
        labels: int64 `(B,)` in [0, C).

    Returns:
        int64, without dimensions, on the logits' device.
    """
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    return (best == labels.unsqueeze(1)).any(dim=1).sum()


METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"top1": top1, "top5": top5, "my_metric": top1, "my_metric2": top5}
"""Config name -> `(logits, labels) -> number of correct samples`; the last two are ConvNorm's names."""
