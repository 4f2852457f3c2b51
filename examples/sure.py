"""A metric: how often a network is right and sure of it."""

from torch import Tensor

from base.registry import METRICS


def sure(logits: Tensor, labels: Tensor) -> Tensor:
    """The number of samples whose label has a probability of at least 0.9, without dimensions.

    Args:
        logits: `(B, C)`.
        labels: int64 `(B,)`, or class probabilities `(B, C)` (mixup), whose largest counts.
    """
    if labels.ndim == 2:
        labels = labels.argmax(dim=1)
    probabilities = logits.float().softmax(dim=1).gather(1, labels.unsqueeze(1))
    return (probabilities >= 0.9).sum()


METRICS["sure"] = sure
