"""Momentum iterative FGSM (Dong et al. 2018, arXiv:1710.06081) as an attack."""

from dataclasses import dataclass

import torch
from torch import Tensor

from attacks import Attack
from attacks.classifier import Model
from attacks.threat_model import Generators
from base.registry import ATTACKS


@dataclass(frozen=True)
class MomentumFGSM(Attack):
    """Steps along the sign of a running sum of gradients, each divided by its l1 norm; l-inf only.

    Args:
        epsilon: radius in units of the pixel range, such as 8/255.
        step_size: length of a step, in the same units.
        steps: the number of steps.
        decay: factor of the sum in every step.
        loss: what is maximized; see `attacks.losses`.
    """

    epsilon: float
    step_size: float
    steps: int = 10
    decay: float = 1.0
    loss: str = "ce"

    def perturb(
        self, model: Model, images: Tensor, labels: Tensor, generators: Generators
    ) -> Tensor:
        """Return the last point."""
        points = images
        momentum = torch.zeros_like(images)
        for _ in range(self.steps):
            _, _, gradient = self.value_and_grad(model, points, labels)
            # Not 0 / 0: an image without a gradient does not move
            size = gradient.abs().sum(dim=(1, 2, 3), keepdim=True).clamp_min(1e-30)
            momentum = self.decay * momentum + gradient / size
            points = self.threat_model.project(points + self.step_size * momentum.sign(), images)
        return points


ATTACKS["mi_fgsm"] = MomentumFGSM
