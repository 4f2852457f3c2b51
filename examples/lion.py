"""The optimizer Lion (Chen et al. 2023, arXiv:2302.06675), and a schedule.

Neither needs an entry in a table: a config names the class.
"""

from collections.abc import Callable, Iterable
from math import sqrt
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class Lion(Optimizer):
    """Moves every weight by the learning rate, in the direction of the sign of an averaged
    gradient.

    Args:
        params: the weights.
        lr: learning rate, about a tenth of Adam's.
        betas: decay of the average in the direction of a step, and in the average itself.
        weight_decay: a weight shrinks by `lr * weight_decay * weight` in a step.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Update all weights that have a gradient."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                # Empty before the first step
                state = self.state[weight]
                if not state:
                    state["average"] = torch.zeros_like(weight)
                direction = state["average"].lerp(weight.grad, 1 - beta1).sign()
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(group["lr"] * direction)
                state["average"].lerp_(weight.grad, 1 - beta2)


class InverseSquareRoot(LRScheduler):
    """Divides the learning rate by the square root of the epoch, which is counted from 1.

    Args:
        optimizer: whose learning rate is scheduled.
        last_epoch: -1 at the beginning.
    """

    def __init__(self, optimizer: Optimizer, last_epoch: int = -1) -> None:
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[Any]:
        """Return the learning rate of every parameter group."""
        return [rate / sqrt(self.last_epoch + 1) for rate in self.base_lrs]
