"""An attack as a user may write one. Importing it registers nothing, so that no test changes the
tables of another one."""

from dataclasses import dataclass

import torch

from attacks import Attack


@dataclass(frozen=True)
class MomentumFGSM(Attack):
    """Momentum iterative FGSM (Dong et al., arXiv:1710.06081).

    Args:
        epsilon: radius in units of the pixel range.
        norm: linf or l2.
        steps: gradient steps.
        step_size: length of a step; None for epsilon / steps.
        momentum: weight of the last direction in a step.
    """

    epsilon: float
    norm: str = "linf"
    steps: int = 10
    step_size: float | None = None
    momentum: float = 1.0

    def perturb(self, model, images, labels, generators):
        points = images
        velocity = torch.zeros_like(images)
        size = self.step_size or self.epsilon / self.steps
        for _ in range(self.steps):
            _, _, gradient = self.value_and_grad(model, points, labels)
            length = gradient.abs().sum(dim=(1, 2, 3), keepdim=True).clamp_min(1e-30)
            velocity = self.momentum * velocity + gradient / length
            points = self.threat_model.step(points, velocity, size)
            points = self.threat_model.project(points, images)
        return points
