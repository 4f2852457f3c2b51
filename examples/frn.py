"""Filter response normalization and the activation that belongs to it (Singh and Krishnan 2020,
arXiv:1911.09737)."""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from base.registry import ACTIVATION_LAYERS, NORM_LAYERS


class FilterResponseNorm(nn.Module):
    """`scale * x / sqrt(mean(x^2) + eps) + shift`; the mean is over the pixels of one channel of
    one image.

    Args:
        channels: the number of channels.
        eps: keeps a channel of zeros at zero.
    """

    def __init__(self, channels: int, eps: Annotated[float, Field(gt=0)] = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.shift = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, channels, H, W)` -> the same shape."""
        mean_square = x.pow(2).mean(dim=(2, 3), keepdim=True)
        return self.scale * x * torch.rsqrt(mean_square + self.eps) + self.shift


class ThresholdedLinearUnit(nn.Module):
    """`max(x, threshold)` with one learned threshold per channel.

    Args:
        channels: the number of channels.
        inplace: without effect, as x is never overwritten.
    """

    # Weight decay would pull a threshold to zero
    no_weight_decay: ClassVar[tuple[str, ...]] = ("threshold",)

    def __init__(self, channels: int, inplace: bool = True) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, channels, H, W)` -> the same shape."""
        return torch.maximum(x, self.threshold)


NORM_LAYERS["frn"] = FilterResponseNorm
ACTIVATION_LAYERS["tlu"] = ThresholdedLinearUnit
