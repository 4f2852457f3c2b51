"""Cosines and sines of a discrete Fourier transform."""

from math import pi

import torch
from torch import Tensor


def waves(
    frequencies: Tensor, places: Tensor, size: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """`cos` and `sin` of `2 pi f n / size`, `(len(frequencies), len(places))`, of integers f and
    n."""
    turns = torch.outer(frequencies, places) % size  # exact: whole turns are dropped as integers
    angles = turns.to(dtype) * (2 * pi / size)
    return angles.cos(), angles.sin()
