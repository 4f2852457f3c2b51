"""Metrics as counts of samples: whoever reports an accuracy divides the sum of counts by the number
of samples, once.

Logits that hold a NaN are no answer: such a sample counts as wrong in every metric.
"""

from torch import Tensor

from base.registry import METRICS


def top1(logits: Tensor, labels: Tensor) -> Tensor:
    """The number of samples whose largest logit is the label's; of equal logits the first counts.

    Args:
        logits: `(B, C)`.
        labels: int64 `(B,)` in [0, C), or class probabilities `(B, C)` (mixup): a prediction counts
            its class's share.

    Returns:
        int64 (float for probabilities), without dimensions, on the logits' device.
    """
    return _share(logits.argmax(dim=1, keepdim=True), logits, labels)


def top5(logits: Tensor, labels: Tensor) -> Tensor:
    """The number of samples whose label is among the five largest logits (all of them where there
    are fewer than five).

    Args:
        logits: `(B, C)`.
        labels: as for `top1`.

    Returns:
        As `top1`.
    """
    return _share(logits.topk(min(5, logits.shape[1]), dim=1).indices, logits, labels)


def _share(predictions: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """How many samples have their label among their predictions `(B, K)`, or how much of their
    label's probability."""
    no_answer = logits.isnan().any(dim=1, keepdim=True)
    if labels.ndim == 2:
        return labels.gather(1, predictions).masked_fill(no_answer, 0).sum()
    return (predictions.masked_fill(no_answer, -1) == labels.unsqueeze(1)).sum()


# the last two are ConvNorm's names
METRICS.update(top1=top1, top5=top5, my_metric=top1, my_metric2=top5)
