"""A metric: how often a network is right and confident."""

from torch import Tensor

from base.registry import METRICS


def sure(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the number of samples whose label has a probability of at least 0.9, a 0-dim tensor.

    Args:
        logits: `(B, C)`.
        labels: int64 `(B,)`, or class probabilities `(B, C)` (mixup), whose largest counts.
    """
    if labels.ndim == 2:
        labels = labels.argmax(dim=1)
    probabilities = logits.float().softmax(dim=1).gather(1, labels.unsqueeze(1))
    return (probabilities >= 0.9).sum()


METRICS["sure"] = sure
