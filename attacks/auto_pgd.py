"""Auto-PGD (APGD): projected gradient ascent that chooses its step sizes itself."""

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from attacks.arguments import check_number
from attacks.attack import Attack
from attacks.classifier import Model
from attacks.threat_model import Generators, ThreatModel, draw, generators_of, lengths
from attacks.worst_case import DONE, WorstPoints

MOMENTUM = 0.75
"""alpha of algorithm 1: the part of the new step in a move, the rest repeats the move before."""


@dataclass(frozen=True)
class APGD(Attack):
    """Auto-PGD (Croce and Hein, arXiv:2003.01690, algorithm 1).

    Gradient ascent with momentum, `x' = project(x + size * direction(gradient))`, `x <- project(x +
    0.75 (x' - x) + 0.25 (x - x_before))`, from a step size of 2 epsilon. At checkpoints (after 22 %
    of the steps, then at distances that shrink by 3 % down to 6 %) an image's step size is halved,
    and the image goes back to its point of largest loss, if (1) at most `rho` of the steps since
    the last checkpoint raised the loss, or (2) the step size was not halved at the last checkpoint
    and the largest loss has not grown since.

    Each image gets a misclassified point if one was found, the image itself included, else its
    point of largest loss. Restarts are for images that are not misclassified yet. A restart costs
    `steps` forward and backward passes and one forward pass; the call one forward pass more.

    Where the paper leaves a choice, this follows the authors' code (rounding of checkpoints, "at
    most" in condition 1, no condition 2 at the first checkpoint). One difference: the first step
    counts in condition 1 if it raised the loss, as in the paper; the code asks whether the loss
    after it is above 0.

    Args:
        epsilon: radius in units of the pixel range, such as 8/255.
        steps: gradient steps per restart, at least 1.
        norm: `"linf"` or `"l2"`.
        restarts: independent starts.
        loss: `"ce"`, `"dlr"` or `"margin"`. With `targeted`, `"dlr"` is the negated DLR loss of the
            target, not equation 7.
        early_stop: images that are misclassified leave the batch. This saves passes and changes no
            verdict. False takes the misclassified point of largest loss instead of the first.
        rho: an image's step size is halved where at most this share of steps raised the loss; in
            [0, 1].
        targeted: lead to `labels` instead of away from them.
        seed: of the random starts, where a call brings no generators.
        confidence: see `PGD`.

    Raises:
        ValueError: an argument out of its range.
    """

    epsilon: float
    steps: int = 100
    norm: str = "linf"
    restarts: int = 1
    loss: str = "ce"
    early_stop: bool = True
    rho: float = 0.75
    targeted: bool = False
    _: KW_ONLY
    seed: int = 0
    confidence: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        rho = check_number("rho", self.rho)
        if not 0 <= rho <= 1:
            raise ValueError(f"rho: expected a number in [0, 1], not {self.rho}")
        object.__setattr__(self, "rho", rho)
        object.__setattr__(self, "early_stop", bool(self.early_stop))

    def perturb(
        self, model: Model, images: Tensor, labels: Tensor, generators: Generators
    ) -> Tensor:
        found = WorstPoints(images)
        everything = torch.arange(len(images), device=images.device)
        with torch.no_grad():
            logits = model(images)
        found.note(everything, images, self.losses(logits, labels), self.reached(logits, labels))
        for restart in range(self.restarts):
            left = found.left(stop=restart > 0 or self.early_stop)
            if len(left) == 0:
                break
            start = self.start(images[left], generators_of(generators, left))
            self._climb(
                model,
                found,
                _Climb(left, images[left], labels[left], start, 2 * self.threat_model.epsilon),
            )
        return found.points

    def start(self, images: Tensor, generators: Generators) -> Tensor:
        """Where a restart begins: a uniform (l-inf) or Gaussian (l2) draw stretched to length
        epsilon in the norm, so that it lies on the sphere and not in the ball, then clamped to `[0,
        1]`. So does the authors' code."""
        if self.threat_model.norm == "linf":
            change = 2 * draw(torch.rand, images, generators) - 1
            change = change / change.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-30)
        else:
            change = draw(torch.randn, images, generators)
            change = change / lengths(change).clamp_min(1e-30)
        return self.threat_model.project(images + self.threat_model.epsilon * change, images)

    def _climb(self, model: Model, found: WorstPoints, climb: "_Climb") -> None:
        """All steps of one restart; what it meets goes into `found`."""
        ends = checkpoints(self.steps)
        for step in range(self.steps):
            logits, losses, gradient = self.value_and_grad(model, climb.points, climb.labels)
            reached = self.reached(logits, climb.labels)
            found.note(climb.at, climb.points, losses, reached)
            climb.arrive(losses, gradient)
            if step in ends:
                climb.adapt(self.rho * ends[step])
            if self.early_stop:
                climb.keep(reached < DONE)
                if len(climb.at) == 0:
                    return
            climb.move(self.threat_model, MOMENTUM if step else 1.0)
        with torch.no_grad():
            logits = model(climb.points)
        found.note(
            climb.at,
            climb.points,
            self.losses(logits, climb.labels),
            self.reached(logits, climb.labels),
        )


def checkpoints(steps: int) -> dict[int, int]:
    """The checkpoints of a climb: number of steps done -> number of steps since the checkpoint
    before."""
    length, shrink, shortest = (max(int(part * steps), 1) for part in (0.22, 0.03, 0.06))
    ends, end = {}, length
    while end < steps:
        ends[end] = length
        length = max(length - shrink, shortest)
        end += length
    return ends


class _Climb:
    """One restart: where its images are and what their step sizes have come to. Every attribute has
    the images first."""

    def __init__(
        self, at: Tensor, images: Tensor, labels: Tensor, start: Tensor, size: float
    ) -> None:
        self.at, self.images, self.labels = at, images, labels
        self.points = self.previous = self.best = start
        self.gradient = self.best_gradient = torch.zeros_like(start)
        self.size = start.new_full((len(at), 1, 1, 1), size)
        self.best_loss = self.best_loss_before = start.new_full(
            (len(at),), float("-inf"), dtype=torch.float32
        )
        self.loss = -self.best_loss  # so that arriving at the start is no rise
        self.rises = torch.zeros_like(self.loss)
        # so that condition 2 rests at the first checkpoint
        self.halved = torch.ones_like(self.loss, dtype=torch.bool)

    def arrive(self, losses: Tensor, gradient: Tensor) -> None:
        """Take in the losses `(n,)` and gradients at the points."""
        self.rises = self.rises + (losses > self.loss)
        better = losses > self.best_loss
        self.best_loss = torch.where(better, losses, self.best_loss)
        self.best = torch.where(_wide(better), self.points, self.best)
        self.best_gradient = torch.where(_wide(better), gradient, self.best_gradient)
        self.loss, self.gradient = losses, gradient

    def adapt(self, rises_needed: float) -> None:
        """A checkpoint: where one of the two conditions holds, halve the step size and go back to
        the best point."""
        halve = (self.rises <= rises_needed) | (
            ~self.halved & (self.best_loss_before >= self.best_loss)
        )
        self.size = torch.where(_wide(halve), self.size / 2, self.size)
        self.points = torch.where(_wide(halve), self.best, self.points)
        self.gradient = torch.where(_wide(halve), self.best_gradient, self.gradient)
        self.halved, self.best_loss_before, self.rises = (
            halve,
            self.best_loss,
            torch.zeros_like(self.rises),
        )

    def move(self, threat_model: ThreatModel, momentum: float) -> None:
        """One step; `momentum` is the part of it that is new."""
        step = threat_model.project(
            self.points + self.size * threat_model.direction(self.gradient), self.images
        )
        mixed = (
            self.points
            + momentum * (step - self.points)
            + (1 - momentum) * (self.points - self.previous)
        )
        self.previous, self.points = self.points, threat_model.project(mixed, self.images)

    def keep(self, going: Tensor) -> None:
        """Go on with some of the images only."""
        if not going.all():
            for name, value in vars(self).items():
                setattr(self, name, value[going])


def _wide(of_image: Tensor) -> Tensor:
    return of_image.reshape(-1, 1, 1, 1)
