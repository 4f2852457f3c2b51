"""The fast gradient sign method (FGSM)."""

from dataclasses import dataclass, field, replace
from typing import Self

from attacks.attack import arguments
from attacks.pgd import PGD


@dataclass(frozen=True)
class FGSM(PGD):
    """The fast gradient sign method: one full step from the image.

    Under l-inf the result is `x + epsilon * sign(gradient)` (Goodfellow et al., arXiv:1412.6572),
    under l2 a step of length epsilon along the gradient.

    Args:
        epsilon: radius and step size in units of the pixel range.
        norm: `"linf"` or `"l2"`.
        early_stop: leave images that are already misclassified unchanged; see `PGD`.
        targeted: move towards the classes `labels` instead of away from them.
        loss: `"ce"`, `"margin"` or `"dlr"`.
        confidence: see `PGD`.
    """

    # FGSM is PGD with these arguments fixed: not in the constructor, not in repr
    step_size: float = field(init=False, repr=False)
    steps: int = field(default=1, init=False, repr=False)
    restarts: int = field(default=1, init=False, repr=False)
    random_start: bool = field(default=False, init=False, repr=False)
    seed: int = field(default=0, init=False, repr=False)
    # The others keep PGD's meaning, but only by keyword
    early_stop: bool | int = field(default=False, kw_only=True)
    targeted: bool = field(default=False, kw_only=True)
    loss: str = field(default="ce", kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "step_size", self.epsilon)
        super().__post_init__()

    def scaled(self, factor: float) -> Self:
        return replace(self, epsilon=factor * self.epsilon)

    def as_pgd(self) -> PGD:
        return PGD(**{name: getattr(self, name) for name in arguments(PGD)})
