"""Metrics, as counts of samples: an accuracy is the sum of the counts over the number of samples.

A sample whose logits hold a NaN counts as wrong in every metric.
"""

from torch import Tensor

from base.registry import METRICS


def top1(logits: Tensor, labels: Tensor) -> Tensor:
    """The number of samples whose largest logit is the label's; of equal logits the first counts.

    Args:
        logits: `(B, C)`.
        labels: int64 `(B,)` in [0, C), or class probabilities `(B, C)` (mixup): a prediction counts
            the probability of its class.

    Returns:
        int64 (float for probabilities), without dimensions, on the logits' device.
    """
    return _count(logits.argmax(dim=1, keepdim=True), logits, labels)


def top5(logits: Tensor, labels: Tensor) -> Tensor:
    """The number of samples whose label is among the five largest logits.

    With fewer than five classes every sample counts.

    Args:
        logits: `(B, C)`.
        labels: as for `top1`.

    Returns:
        As `top1`.
    """
    return _count(logits.topk(min(5, logits.shape[1]), dim=1).indices, logits, labels)


def _count(predictions: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """The number of samples with their label among the predictions `(B, K)`; for probabilities,
    their sum over the predictions.
    """
    # argmax and topk rank a NaN first, so without this such a sample could count as right.
    has_nan = logits.isnan().any(dim=1, keepdim=True)
    if labels.ndim == 2:
        return labels.gather(1, predictions).masked_fill(has_nan, 0).sum()
    return (predictions.masked_fill(has_nan, -1) == labels.unsqueeze(1)).sum()


# The original ConvNorm's configs call them my_metric and my_metric2.
METRICS.update(top1=top1, top5=top5, my_metric=top1, my_metric2=top5)
