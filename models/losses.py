"""Losses, one number per sample, so that the trainer can sum, weight and count them."""

import torch.nn.functional as F
from torch import Tensor

from base.precision import widened
from base.registry import LOSSES


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """`-log softmax(logits)[label]` of every sample, in nats.

    Args:
        logits: `(B, C)`, of any precision; the loss is computed in float32 at least.
        labels: int64 `(B,)` in [0, C), or class probabilities `(B, C)` (mixup).

    Returns:
        float32 `(B,)`; float64 for float64 logits.
    """
    return F.cross_entropy(widened(logits), labels, reduction="none")


LOSSES["cross_entropy"] = cross_entropy
