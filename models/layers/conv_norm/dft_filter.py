"""The filter of ConvNorm with its crop, as products with DFT matrices, for the maps of a CPU.

Sizes such as 34 = 2 x 17 are slow for an FFT and small for a matrix. Every map, which is one
channel of one image, is transformed by itself, so narrow layers do not make narrow products. Those
along H have all maps as rows of one matrix. The inverse DFT computes only what the crop keeps.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dft import complex_product, dft, half_spectrum_weights
from .precision import without_autocast

FILTER_SIZE = 64
"""Side of the largest map that is filtered by matrices: their cost grows with its third power, an
FFT's with the second.
"""


class Matrices(NamedTuple):
    """The DFT and the cropped inverse DFT of maps `(S_h, S_w)`, with g_w over their half spectrum
    along W. The dimension of size 2 holds real and imaginary parts.

    Attributes:
        dft_w: `(g_w * 2, S_w)`, along W, from real numbers.
        dft_h: `(2 * S_h, 2 * S_h)`, along H; it multiplies from the right, as the others below.
        inverse_dft_h: `(2 * S_h, 2 * H')`.
        inverse_dft_w: `(g_w * 2, W')`, to real numbers.
    """

    dft_w: Tensor
    dft_h: Tensor
    inverse_dft_h: Tensor
    inverse_dft_w: Tensor


def dft_filter_is_faster(signal: Tensor) -> bool:
    """Whether `dft_filter` is faster than FFTs for a signal `(B, C, S_h, S_w)`."""
    # This comes first: asking for sizes would fix them in an exported network.
    if torch.compiler.is_compiling() or signal.device.type != "cpu":
        return False
    if signal.dtype not in (torch.float32, torch.bfloat16):
        return False
    return max(signal.shape[-2:]) <= FILTER_SIZE


def dft_filter(signal: Tensor, inverse_root: Tensor, rows: slice, columns: slice) -> Tensor:
    """`IDFT(V . DFT(signal))[..., rows, columns]`, where V is real and takes no gradient.

    Args:
        signal: `(B, C, S_h, S_w)`; any memory format.
        inverse_root: V on the half spectrum, `(C, S_h, S_w // 2 + 1)`.
        rows, columns: what is kept of the result.

    Returns:
        `(B, C, H', W')`, in the dtype and the memory format of `signal`.
    """
    height, width = signal.shape[-2:]
    kept_h = (height, *rows.indices(height))
    kept_w = (width, *columns.indices(width))
    matrices = _make_matrices(kept_h, kept_w, signal.dtype)
    # (C, g_w, 1, S_h): real and imaginary parts have the same factor.
    factors = inverse_root.mT.unsqueeze(2).to(signal.dtype).contiguous()
    with without_autocast(signal):
        output = _DftFilter.apply(signal, factors, matrices, False)
    # Convolutions and batch norm, which come next, are faster where the channels are innermost.
    if signal.is_contiguous(memory_format=torch.channels_last):
        output = output.contiguous(memory_format=torch.channels_last)
    return output


class _DftFilter(torch.autograd.Function):
    # The function is linear in the signal, so it and its adjoint are each other's backward pass.

    @staticmethod
    def forward(
        ctx: Any, signal: Tensor, factors: Tensor, matrices: Matrices, adjoint: bool
    ) -> Tensor:
        ctx.save_for_backward(factors)
        ctx.matrices = matrices
        ctx.adjoint = adjoint
        dft_w, dft_h, inverse_dft_h, inverse_dft_w = matrices
        if adjoint:
            # The same products in the opposite order.
            dft_w, inverse_dft_w = inverse_dft_w, dft_w
            dft_h, inverse_dft_h = inverse_dft_h.mT, dft_h.mT
        maps = signal.flatten(0, 1).contiguous()
        # (B * C, g_w * 2, S_h), whose rows become (2, S_h).
        half = torch.bmm(dft_w.expand(len(maps), -1, -1), maps.mT)
        spectrum = half.view(-1, len(dft_h)) @ dft_h
        spectrum.view(len(signal), *factors.shape[:2], 2, -1).mul_(factors)
        half = (spectrum @ inverse_dft_h).view(len(maps), len(dft_w), -1)
        output = torch.bmm(half.mT, inverse_dft_w.expand(len(maps), -1, -1))
        return output.view(*signal.shape[:2], *output.shape[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (factors,) = ctx.saved_tensors
        with without_autocast(grad):
            return _DftFilter.apply(grad, factors, ctx.matrices, not ctx.adjoint), None, None, None


@lru_cache(maxsize=128)
@torch.no_grad()
def _make_matrices(
    rows: tuple[int, int, int, int], columns: tuple[int, int, int, int], dtype: torch.dtype
) -> Matrices:
    """For each axis its size, and the first, the end and the step of the points that are kept."""
    height, *kept_h = rows
    width, *kept_w = columns
    frequencies_h = torch.arange(height)
    frequencies_w = torch.arange(width // 2 + 1)
    cos_w, sin_w = dft(frequencies_w, torch.arange(width), width)
    cos_h, sin_h = dft(frequencies_h, torch.arange(height), height)
    inverse_cos_h, inverse_sin_h = dft(frequencies_h, torch.arange(*kept_h), height)
    weights = half_spectrum_weights(width).unsqueeze(1)
    inverse_cos_w, inverse_sin_w = (
        matrix * weights for matrix in dft(frequencies_w, torch.arange(*kept_w), width)
    )
    # These multiply from the right, so operands come before results.
    dft_h = complex_product(cos_h, -sin_h).permute(1, 3, 0, 2)
    inverse_dft_h = complex_product(inverse_cos_h.mT, inverse_sin_h.mT).permute(1, 3, 0, 2)
    return Matrices(
        *(
            matrix.to(dtype).contiguous()
            for matrix in (
                torch.stack([cos_w, -sin_w], dim=1).flatten(0, 1),
                dft_h.flatten(2).flatten(0, 1),
                inverse_dft_h.flatten(2).flatten(0, 1) / height,
                torch.stack([inverse_cos_w, -inverse_sin_w], dim=1).flatten(0, 1),
            )
        )
    )
