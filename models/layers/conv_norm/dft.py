"""Cosines and sines of a discrete Fourier transform."""

from math import pi

import torch
from torch import Tensor


def dft(
    frequencies: Tensor, positions: Tensor, size: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """`cos` and `sin` of `2 pi f n / size` for integers f and n.

    Args:
        frequencies: f, int64 `(F,)`.
        positions: n, int64 `(N,)`; may be negative.
        size: the length of the transform.
        dtype: of the result.

    Returns:
        The real part and minus the imaginary part of the DFT matrix, `(F, N)` each.
    """
    # Whole turns are dropped while the numbers are integers: large angles would lose digits.
    turns = torch.outer(frequencies, positions) % size
    angles = turns.to(dtype) * (2 * pi / size)
    return angles.cos(), angles.sin()
