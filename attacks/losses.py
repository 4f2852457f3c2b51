"""What an attack maximizes, per image. All take logits `(B, C)` and return `(B,)`; they grow as the
label loses."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """`-log softmax(logits)[label]`; `labels` int64 `(B,)`, or class probabilities `(B, C)`, as
    mixup and TRADES have them."""
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """`max_{j != y} z_j - z_y`, positive where the image is misclassified (Carlini and Wagner,
    arXiv:1608.04644, f6)."""
    return _largest_other(logits, labels) - _of_label(logits, labels)


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """The difference of logits ratio, `-(z_y - max_{j != y} z_j) / (z_(1) - z_(3))` with `z_(i)`
    the i-th largest logit (Croce and Hein, arXiv:2003.01690, equation 6). Unlike cross entropy it
    does not change when all logits are scaled.

    Raises:
        ValueError: fewer than three classes.
    """
    if logits.shape[1] < 3:
        raise ValueError(f"the DLR loss needs at least 3 classes, the model has {logits.shape[1]}")
    largest = logits.topk(3, dim=1).values
    return margin(logits, labels) / (largest[:, 0] - largest[:, 2] + 1e-12)


def _of_label(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.gather(1, _as_index(labels)).squeeze(1)


def _largest_other(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.scatter(1, _as_index(labels), float("-inf")).amax(dim=1)


def _as_index(labels: Tensor) -> Tensor:
    if labels.ndim != 1:
        raise ValueError("margin and DLR losses take one label per image, not class probabilities")
    return labels.unsqueeze(1)


ATTACK_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ce": cross_entropy,
    "margin": margin,
    "dlr": dlr,
}
"""Name -> `(logits, labels) -> losses (B,)`, to be maximized."""


def wrongness(logits: Tensor, labels: Tensor, rank: int = 1) -> Tensor:
    """How far the label has fallen, int64 `(B,)`: 0 it is the prediction, 1 it is not, 2 nor is it
    among the `rank` largest.

    Of equal logits the first is the larger. With `rank` 1 there is no 1. NaN logits count as wrong.
    Of class probabilities `(B, C)` the largest is the label."""
    labels = labels.argmax(dim=1) if labels.ndim == 2 else labels
    wrong = (logits.argmax(dim=1) != labels) | logits.isnan().any(dim=1)
    if rank <= 1:
        return 2 * wrong.long()
    own = logits.gather(1, labels.unsqueeze(1))
    before = torch.arange(logits.shape[1], device=logits.device) < labels.unsqueeze(1)
    out = ((logits > own) | ((logits == own) & before)).sum(dim=1) >= rank
    return wrong.long() + (wrong & (out | logits.isnan().any(dim=1))).long()
