"""The fast gradient sign method (FGSM)."""

from attacks.pgd import PGD


class FGSM(PGD):
    """The fast gradient sign method: one full step from the image, `x + epsilon * sign(gradient)` for l-inf (Goodfellow et al.,
    arXiv:1412.6572); for l2 a step of length epsilon along the gradient.

    Args:
        epsilon: radius and step in units of the pixel range.
        norm: `"linf"` or `"l2"`.
        early_stop: leave images alone that are misclassified already; see `PGD`.
        targeted: lead to `labels` instead of away from them.
        loss: `"ce"`, `"margin"` or `"dlr"`.
    """

    def __init__(
        self,
        epsilon: float,
        norm: str = "linf",
        *,
        early_stop: bool | int = False,
        targeted: bool = False,
        loss: str = "ce",
    ) -> None:
        super().__init__(epsilon, epsilon, 1, norm, random_start=False, early_stop=early_stop, targeted=targeted, loss=loss)
