"""Projected gradient descent (PGD)."""

from dataclasses import KW_ONLY, dataclass, replace
from typing import Self

import torch
from torch import Tensor

from attacks.arguments import check_count
from attacks.attack import Attack
from attacks.classifier import Model
from attacks.threat_model import Generators, generators_of
from attacks.worst_case import DONE, WorstPoints


@dataclass(frozen=True)
class PGD(Attack):
    """Projected gradient ascent on a loss (Madry et al., arXiv:1706.06083).

    From a random point of the ball: `x <- project(x + step_size * direction(gradient))`, `steps`
    times. With one restart and without early stop the result is the last point, and every step
    costs one forward and one backward pass. Otherwise all points on the way count, with one more
    forward pass for the last: each image gets its worst point over all steps and restarts,
    misclassified before not, then of larger loss.

    Args:
        epsilon: radius in units of the pixel range, such as 8/255.
        step_size: length of a step, in the same units.
        steps: steps per restart, at least 1.
        norm: `"linf"` or `"l2"`.
        restarts: independent starts.
        random_start: begin at a random point of the ball, not at the image.
        early_stop: leave an image alone once it is misclassified (targeted: classified as the
            target). A number k asks for more: that the label is not among the k largest logits.
        targeted: lead to `labels` instead of away from them.
        loss: `"ce"`, `"margin"` or `"dlr"`.
        seed: of the random starts, where a call brings no generators.
        confidence: an image counts as misclassified once its label's logit falls short by this part
            of the largest logit; see `Attack.confident`.

    Raises:
        ValueError: an argument out of its range.
    """

    epsilon: float
    step_size: float
    steps: int
    norm: str = "linf"
    restarts: int = 1
    random_start: bool = True
    early_stop: bool | int = False
    targeted: bool = False
    loss: str = "ce"
    _: KW_ONLY
    seed: int = 0
    confidence: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.early_stop, bool):
            check_count("early_stop", self.early_stop, 0)
        if self.restarts > 1 and not self.random_start:
            raise ValueError(
                f"restarts {self.restarts}: without random_start all of them are the same"
            )
        if self.targeted and self.early_stop > 1:
            raise ValueError(
                f"early_stop {self.early_stop}: a targeted attack has no rank to reach but the first"
            )
        object.__setattr__(self, "early_stop", int(self.early_stop))

    def scaled(self, factor: float) -> Self:
        """The same attack with `factor` times the radius and the step size."""
        return replace(self, epsilon=factor * self.epsilon, step_size=factor * self.step_size)

    def as_pgd(self) -> "PGD":
        """An attack that does the same, of which every number can be replaced."""
        return self

    @property
    def single_step(self) -> bool:
        return self.steps == 1 and not self.random_start

    @property
    def rank(self) -> int:
        return max(1, self.early_stop)

    def perturb(
        self, model: Model, images: Tensor, labels: Tensor, generators: Generators
    ) -> Tensor:
        if self.restarts == 1 and not self.early_stop:
            return self.run(model, images, labels, self.start(images, generators))
        found = WorstPoints(images)
        for _ in range(self.restarts):
            left = found.left(stop=self.early_stop > 0)
            if len(left) == 0:
                break
            start = self.start(images[left], generators_of(generators, left))
            self._search(model, images, labels, found, left, start)
        return found.points

    def start(self, images: Tensor, generators: Generators) -> Tensor:
        """Where a restart begins."""
        return self.threat_model.random_start(images, generators) if self.random_start else images

    def _search(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        found: WorstPoints,
        left: Tensor,
        points: Tensor,
    ) -> None:
        """One restart for the images at positions `left`, from `points`; what it meets goes into
        `found`."""
        for _ in range(self.steps):
            logits, losses, gradient = self.value_and_grad(model, points, labels[left])
            reached = self.reached(logits, labels[left])
            found.note(left, points, losses, reached)
            if self.early_stop:
                going = reached < DONE
                left, points, gradient = left[going], points[going], gradient[going]
                if len(left) == 0:
                    return
            points = self.step(points, gradient, images[left])
        with torch.no_grad():
            logits = model(points)
        found.note(
            left, points, self.losses(logits, labels[left]), self.reached(logits, labels[left])
        )

    def run(self, model: Model, images: Tensor, labels: Tensor, points: Tensor) -> Tensor:
        """All steps from `points`; `labels` may be class probabilities `(B, C)`. Returns the last
        point."""
        for _ in range(self.steps):
            _, _, gradient = self.value_and_grad(model, points, labels)
            points = self.step(points, gradient, images)
        return points

    def step(self, points: Tensor, gradient: Tensor, images: Tensor) -> Tensor:
        """One projected step."""
        return self.threat_model.project(
            self.threat_model.step(points, gradient, self.step_size), images
        )
