"""Activation layers, each called as `(channels, inplace=True)`."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def relu(channels: int, inplace: bool = True) -> nn.ReLU:
    """`max(x, 0)`; `channels` is ignored."""
    return nn.ReLU(inplace=inplace)


class SReLU(nn.Module):
    """`max(x, b) = relu(x - b) + b` with one learned threshold b per channel.

    State: `srelu_bias` `(1, channels, 1, 1)`, initially -1.

    Args:
        channels: the number of channels.
        inplace: ignored; the input is never overwritten.
    """

    # Weight decay would pull the thresholds to zero, which makes the layer a ReLU.
    no_weight_decay: ClassVar = ("srelu_bias",)

    def __init__(self, channels: int, inplace: bool = True) -> None:
        super().__init__()
        self.srelu_bias = nn.Parameter(torch.full((1, channels, 1, 1), -1.0))

    def forward(self, input: Tensor) -> Tensor:
        """`(B, channels, H, W)` -> the same shape."""
        return F.relu(input - self.srelu_bias) + self.srelu_bias
