"""The losses that attacks maximize, per image.

All take logits `(B, classes)` and return `(B,)`; they grow as the label loses.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """`-log softmax(logits)[label]`.

    `labels` are int64 `(B,)`, or class probabilities `(B, classes)`, which mixup and TRADES use.
    """
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """`max_{j != y} z_j - z_y`, positive where the image is misclassified (Carlini and Wagner,
    arXiv:1608.04644, f6)."""
    if labels.ndim != 1:
        raise ValueError("margin and DLR losses take one label per image, not class probabilities")
    label = labels.unsqueeze(1)
    of_label = logits.gather(1, label).squeeze(1)
    largest_other = logits.scatter(1, label, float("-inf")).amax(dim=1)
    return largest_other - of_label


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """The difference of logits ratio, `-(z_y - max_{j != y} z_j) / (z_(1) - z_(3))`.

    `z_(i)` is the i-th largest logit (Croce and Hein, arXiv:2003.01690, equation 6). Unlike cross
    entropy, the loss does not change when all logits are scaled.

    Raises:
        ValueError: the model has fewer than three classes.
    """
    if logits.shape[1] < 3:
        raise ValueError(f"the DLR loss needs at least 3 classes, the model has {logits.shape[1]}")
    largest = logits.topk(3, dim=1).values
    # The authors' code adds the same 1e-12
    return margin(logits, labels) / (largest[:, 0] - largest[:, 2] + 1e-12)


ATTACK_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ce": cross_entropy,
    "margin": margin,
    "dlr": dlr,
}
"""Name -> `(logits, labels) -> losses (B,)`, to be maximized."""


def wrongness(logits: Tensor, labels: Tensor, rank: int = 1) -> Tensor:
    """Return how far the label has fallen, int64 `(B,)`.

    0: the label is the prediction. 1: it is not. 2: it is not among the `rank` largest logits
    either. With `rank` 1, a misclassified image is at 2 at once.

    If logits are equal, the first one counts as larger. NaN logits count as wrong. If `labels` are
    class probabilities `(B, classes)`, the most probable class is the label.
    """
    if labels.ndim == 2:
        labels = labels.argmax(dim=1)
    has_nan = logits.isnan().any(dim=1)
    wrong = (logits.argmax(dim=1) != labels) | has_nan
    if rank <= 1:
        return 2 * wrong.long()
    label = labels.unsqueeze(1)
    of_label = logits.gather(1, label)
    # topk breaks ties in an unspecified order, so the logits ahead of the label's are counted
    is_before = torch.arange(logits.shape[1], device=logits.device) < label
    ahead = (logits > of_label) | ((logits == of_label) & is_before)
    outside = (ahead.sum(dim=1) >= rank) | has_nan
    return wrong.long() + (wrong & outside).long()
