"""Projected gradient descent (PGD)."""

from dataclasses import KW_ONLY, dataclass, replace
from typing import Self

import torch
from torch import Tensor

from attacks.arguments import LARGEST_LINF, check_count
from attacks.attack import Attack
from attacks.classifier import Model
from attacks.threat_model import Generators, generators_of
from attacks.worst_case import DONE, WorstCase


def step_within_range(step_size: float, norm: str) -> float:
    """Bound a computed step size: under l-inf a step of 1 crosses the whole pixel range, and longer
    ones are rejected as given in 1/255."""
    if norm == "linf":
        return min(step_size, LARGEST_LINF)
    return step_size


def crossing_step(epsilon: float, steps: int, norm: str) -> float:
    """Return the step size with which all steps together can cross the ball from any start: they
    add up to 2.5 epsilon (Madry et al., arXiv:1706.06083, for l2)."""
    return step_within_range(2.5 * epsilon / steps, norm)


@dataclass(frozen=True)
class PGD(Attack):
    """Projected gradient ascent on a loss (Madry et al., arXiv:1706.06083).

    From a random point of the ball, repeat `steps` times:
    `x <- project(x + step_size * direction(gradient))`.

    With one restart and without early stop, the result is the last point, and every step costs one
    forward and one backward pass. Otherwise every point on the way counts, which costs one forward
    pass more per restart: the result is each image's worst point over all steps and restarts. A
    misclassified point is worse than a correctly classified one; among equals the larger loss
    decides.

    Args:
        epsilon: radius in units of the pixel range, such as 8/255.
        step_size: length of a step, in the same units.
        steps: steps per restart, at least 1.
        norm: `"linf"` or `"l2"`.
        restarts: number of independent starts.
        random_start: begin at a random point of the ball instead of the image.
        early_stop: stop attacking an image once it is misclassified (targeted: classified as the
            target). A number k continues until the label is not among the k largest logits.
        targeted: move towards the classes `labels` instead of away from them.
        loss: `"ce"`, `"margin"` or `"dlr"`.
        seed: of the random starts, if a call passes no generators.
        confidence: an image counts as misclassified once its label's logit falls short by this
            fraction of the largest logit; see `Attack.confident`.

    Raises:
        ValueError: an argument is out of its range.
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
                f"restarts {self.restarts}: without random_start, all restarts are the same"
            )
        if self.targeted and self.early_stop > 1:
            raise ValueError(
                f"early_stop {self.early_stop}: a targeted attack stops at the target, expected"
                " true or false"
            )
        object.__setattr__(self, "early_stop", int(self.early_stop))

    def scaled(self, factor: float) -> Self:
        """Return the same attack with `factor` times the radius and the step size, the latter
        within range."""
        step_size = step_within_range(factor * self.step_size, self.norm)
        return replace(self, epsilon=factor * self.epsilon, step_size=step_size)

    def as_pgd(self) -> "PGD":
        """Return an equal attack of which every argument can be replaced."""
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
        worst = WorstCase(images)
        remaining = torch.arange(len(images), device=images.device)
        for _ in range(self.restarts):
            if self.early_stop:
                remaining = worst.remaining()
            if len(remaining) == 0:
                break
            start = self.start(images[remaining], generators_of(generators, remaining))
            self._restart(model, images, labels, worst, remaining, start)
        return worst.points

    def start(self, images: Tensor, generators: Generators) -> Tensor:
        """Return the points at which a restart begins."""
        if not self.random_start:
            return images
        return self.threat_model.random_start(images, generators)

    def run(self, model: Model, images: Tensor, labels: Tensor, points: Tensor) -> Tensor:
        """Take all steps from `points` and return the last point.

        `labels` are int64 `(B,)` or class probabilities `(B, classes)`.
        """
        for _ in range(self.steps):
            _, _, gradient = self.value_and_grad(model, points, labels)
            points = self.step(points, gradient, images)
        return points

    def step(self, points: Tensor, gradient: Tensor, images: Tensor) -> Tensor:
        """Take one step along the gradient and project it into the ball around `images`."""
        moved = self.threat_model.step(points, gradient, self.step_size)
        return self.threat_model.project(moved, images)

    def _restart(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        worst: WorstCase,
        remaining: Tensor,
        points: Tensor,
    ) -> None:
        """Run one restart from `points` for the images at positions `remaining`; every point on the
        way goes into `worst`."""
        for _ in range(self.steps):
            logits, losses, gradient = self.value_and_grad(model, points, labels[remaining])
            reached = self.reached(logits, labels[remaining])
            worst.update(remaining, points, losses, reached)
            if self.early_stop:
                # An image that is done leaves the batch, so later passes are cheaper. This is the
                # only place in a step where the host waits: it needs the number of images left
                unfinished = (reached < DONE).nonzero().squeeze(1)
                if len(unfinished) == 0:
                    return
                remaining = remaining[unfinished]
                points = points[unfinished]
                gradient = gradient[unfinished]
            points = self.step(points, gradient, images[remaining])
        # A step evaluates the point before it, so the last point needs a pass of its own
        with torch.no_grad():
            logits = model(points)
        losses = self.losses(logits, labels[remaining])
        worst.update(remaining, points, losses, self.reached(logits, labels[remaining]))
