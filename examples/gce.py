"""Generalized cross entropy, for noisy labels (Zhang and Sabuncu 2018, arXiv:1805.07836)."""

import torch.nn.functional as F
from torch import Tensor

from base.registry import LOSSES

Q = 0.7
"""Between 0, which is cross entropy, and 1, the mean absolute error, which suffers least from wrong
labels and learns slowest."""


def generalized_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return `(1 - p^Q) / Q` of every sample, `(B,)`, where p is the probability of its label.

    Args:
        logits: `(B, C)`.
        labels: int64 `(B,)`, or class probabilities `(B, C)` (mixup).
    """
    log_probabilities = F.log_softmax(logits.float(), dim=1)
    if labels.ndim == 1:
        labels = F.one_hot(labels, logits.shape[1])
    # The exponential of a logarithm, as the gradient of 0^Q is infinite
    losses = (1 - (Q * log_probabilities).exp()) / Q
    return (labels * losses).sum(dim=1)


LOSSES["gce"] = generalized_cross_entropy
