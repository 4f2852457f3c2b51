"""Cosines and sines of a discrete Fourier transform, their matrices, and products with these."""

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


def complex_product(real: Tensor, imaginary: Tensor) -> Tensor:
    """The matrix of the product with a complex `(m, n)` matrix, on pairs of real numbers: `(2, 2,
    m, n)`, the part of the result first, the part of the operand second.
    """
    to_real = torch.stack([real, -imaginary])
    to_imaginary = torch.stack([imaginary, real])
    return torch.stack([to_real, to_imaginary])


def half_spectrum_weights(size: int) -> Tensor:
    """The weights of a half spectrum's frequencies in an inverse DFT to real numbers, `(size // 2 +
    1,)`.
    """
    frequencies = torch.arange(size // 2 + 1)
    # A frequency stands for its conjugate in the other half, too, unless it is its own opposite.
    is_own_opposite = (frequencies == 0) | (2 * frequencies == size)
    return torch.where(is_own_opposite, 1.0, 2.0).double() / size


def left_multiply(matrix: Tensor, batch: Tensor) -> Tensor:
    """`matrix @ batch[i]` for every i."""
    # torch.matmul would copy the batch into another order first.
    return torch.bmm(matrix.expand(len(batch), -1, -1), batch)
