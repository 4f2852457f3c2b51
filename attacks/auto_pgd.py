"""Auto-PGD (APGD): projected gradient ascent that chooses its step sizes itself."""

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from attacks.arguments import check_number
from attacks.attack import Attack
from attacks.classifier import Model
from attacks.threat_model import Generators, ThreatModel, draw, generators_of, lengths
from attacks.worst_case import DONE, WorstCase

MOMENTUM = 0.75
"""alpha of algorithm 1: the weight of the new step; the rest repeats the last change."""


@dataclass(frozen=True)
class APGD(Attack):
    """Auto-PGD (Croce and Hein, arXiv:2003.01690, algorithm 1).

    Gradient ascent with momentum, from a step size of 2 epsilon:

        z <- project(x + step_size * direction(gradient))
        x <- project(x + 0.75 (z - x) + 0.25 (x - x_before))

    At checkpoints (see `checkpoints`) an image's step size is halved, and the image goes back to
    its point of largest loss, if one of two conditions holds:

    1. At most the fraction `rho` of the steps since the last checkpoint raised the loss.
    2. The step size was not halved at the last checkpoint, and the largest loss has not grown
       since.

    The result is a misclassified point of each image if one was found, the image itself included,
    else its point of largest loss. Restarts attack the images that are not misclassified yet. A
    restart costs `steps` forward and backward passes and one forward pass; a call costs one forward
    pass more.

    Where the paper leaves a choice, this follows the authors' code (rounding of checkpoints, "at
    most" in condition 1, no condition 2 at the first checkpoint). One thing differs: the first step
    counts in condition 1 if it raised the loss, as in the paper; the code counts it if the loss
    after it is above 0.

    Args:
        epsilon: radius in units of the pixel range, such as 8/255.
        steps: gradient steps per restart, at least 1.
        norm: `"linf"` or `"l2"`.
        restarts: number of independent starts.
        loss: `"ce"`, `"dlr"` or `"margin"`. With `targeted`, `"dlr"` is the negated DLR loss of the
            target, not equation 7.
        early_stop: stop attacking an image once it is misclassified, which saves passes and changes
            no verdict. False takes the misclassified point of largest loss instead of the first.
        rho: the fraction of condition 1, in [0, 1].
        targeted: move towards the classes `labels` instead of away from them.
        seed: of the random starts, if a call passes no generators.
        confidence: see `PGD`.

    Raises:
        ValueError: an argument is out of its range.
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
        everything = torch.arange(len(images), device=images.device)
        worst = WorstCase(images)
        self._judge(model, worst, everything, images, labels)
        for restart in range(self.restarts):
            remaining = worst.remaining()
            if restart == 0 and not self.early_stop:
                remaining = everything
            if len(remaining) == 0:
                break
            start = self.start(images[remaining], generators_of(generators, remaining))
            state = _State(
                remaining,
                images[remaining],
                labels[remaining],
                start,
                step_size=2 * self.threat_model.epsilon,
            )
            self.run(model, worst, state)
        return worst.points

    def start(self, images: Tensor, generators: Generators) -> Tensor:
        """Return the points at which a restart begins.

        A uniform (l-inf) or Gaussian (l2) draw is stretched to length epsilon in the norm, so that
        it lies on the sphere and not in the ball, and then clamped to `[0, 1]`, as in the authors'
        code.
        """
        if self.threat_model.norm == "linf":
            change = 2 * draw(torch.rand, images, generators) - 1
            change = change / change.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-30)
        else:
            change = draw(torch.randn, images, generators)
            change = change / lengths(change).clamp_min(1e-30)
        return self.threat_model.project(images + self.threat_model.epsilon * change, images)

    def run(self, model: Model, worst: WorstCase, state: "_State") -> None:
        """Take all steps of one restart; every point on the way goes into `worst`."""
        steps_since = checkpoints(self.steps)
        for step in range(self.steps):
            logits, losses, gradient = self.value_and_grad(model, state.points, state.labels)
            reached = self.reached(logits, state.labels)
            worst.update(state.index, state.points, losses, reached)
            state.record(losses, gradient)
            if step in steps_since:
                state.adapt(self.rho * steps_since[step])
            if self.early_stop:
                state.keep(reached < DONE)
                if len(state.index) == 0:
                    return
            # The first step has no previous change to repeat
            momentum = MOMENTUM if step > 0 else 1.0
            state.step(self.threat_model, momentum)
        self._judge(model, worst, state.index, state.points, state.labels)

    def _judge(
        self, model: Model, worst: WorstCase, index: Tensor, points: Tensor, labels: Tensor
    ) -> None:
        """Put `points` into `worst`, by a forward pass without gradients."""
        with torch.no_grad():
            logits = model(points)
        worst.update(index, points, self.losses(logits, labels), self.reached(logits, labels))


def checkpoints(steps: int) -> dict[int, int]:
    """Return the checkpoints of a restart: steps done -> steps since the checkpoint before.

    The first comes after 22 % of the steps; the distances between the others shrink by 3 % of the
    steps each time, down to 6 %.
    """
    length = max(int(0.22 * steps), 1)
    shrink = max(int(0.03 * steps), 1)
    shortest = max(int(0.06 * steps), 1)
    steps_since = {}
    end = length
    while end < steps:
        steps_since[end] = length
        length = max(length - shrink, shortest)
        end += length
    return steps_since


class _State:
    """The images of one restart: the current point and step size of each.

    The first dimension of every attribute is that of the images, so that `keep` can select.
    """

    def __init__(
        self, index: Tensor, images: Tensor, labels: Tensor, start: Tensor, step_size: float
    ) -> None:
        n = len(images)
        self.index = index
        self.images = images
        self.labels = labels
        self.points = start
        self.previous = start
        self.gradient = torch.zeros_like(start)
        self.step_size = start.new_full((n, 1, 1, 1), step_size)
        self.best = start
        self.best_gradient = self.gradient
        self.best_loss = start.new_full((n,), float("-inf"), dtype=torch.float32)
        self.best_loss_at_checkpoint = self.best_loss
        # Infinite, so that the start does not count as a rise
        self.loss = -self.best_loss
        self.rises = torch.zeros_like(self.loss)
        # True, so that condition 2 does not hold at the first checkpoint
        self.halved = torch.ones_like(self.loss, dtype=torch.bool)

    def record(self, losses: Tensor, gradient: Tensor) -> None:
        """Record the losses `(n,)` and gradients at the current points."""
        self.rises = self.rises + (losses > self.loss)
        better = losses > self.best_loss
        self.best_loss = torch.where(better, losses, self.best_loss)
        self.best = torch.where(_per_pixel(better), self.points, self.best)
        self.best_gradient = torch.where(_per_pixel(better), gradient, self.best_gradient)
        self.loss = losses
        self.gradient = gradient

    def adapt(self, rises_needed: float) -> None:
        """At a checkpoint: halve the step size and go back to the best point where one of the two
        conditions holds."""
        few_rises = self.rises <= rises_needed
        no_progress = ~self.halved & (self.best_loss_at_checkpoint >= self.best_loss)
        halve = few_rises | no_progress
        self.step_size = torch.where(_per_pixel(halve), self.step_size / 2, self.step_size)
        self.points = torch.where(_per_pixel(halve), self.best, self.points)
        self.gradient = torch.where(_per_pixel(halve), self.best_gradient, self.gradient)
        self.halved = halve
        self.best_loss_at_checkpoint = self.best_loss
        self.rises = torch.zeros_like(self.rises)

    def step(self, threat_model: ThreatModel, momentum: float) -> None:
        """Take one step; `momentum` is the weight of its new part."""
        ascended = self.points + self.step_size * threat_model.direction(self.gradient)
        ascended = threat_model.project(ascended, self.images)
        new = momentum * (ascended - self.points)
        repeated = (1 - momentum) * (self.points - self.previous)
        moved = self.points + new + repeated
        self.previous = self.points
        self.points = threat_model.project(moved, self.images)

    def keep(self, chosen: Tensor) -> None:
        """Go on with the chosen images only; `chosen` is bool `(n,)`."""
        positions = chosen.nonzero().squeeze(1)
        if len(positions) < len(chosen):
            for name, value in vars(self).items():
                setattr(self, name, value[positions])


def _per_pixel(values: Tensor) -> Tensor:
    """Reshape one value per image, `(n,)`, so that it broadcasts over pixels."""
    return values.reshape(-1, 1, 1, 1)
