"""ConvNorm's filter and crop on a CPU, as products with matrices of cosines and sines.

Sizes such as 34 = 2 x 17 are slow for an FFT and small for a matrix. An axis of S points has an
orthonormal basis of S cosines and sines, `cos(2 pi k n / S)` and `sin(2 pi k n / S)`. Products with
it take a third less work than those with complex numbers on a half spectrum. The product of a
function of the row and a function of the column is not an eigenvector of the filter, because V has
different values at the frequencies (k, l) and (-k, l). But

    cos a cos b = (cos(a + b) + cos(a - b)) / 2,    sin a sin b = (cos(a - b) - cos(a + b)) / 2,

so with A = V[k, l] at a + b and B = V[-k, l] at a - b the filter maps

    cos a cos b -> m cos a cos b - d sin a sin b,    m = (A + B) / 2,
    sin a sin b -> m sin a sin b - d cos a cos b,    d = (A - B) / 2,
    sin a cos b -> m sin a cos b + d cos a sin b,
    cos a sin b -> m cos a sin b + d sin a cos b.
"""

from functools import lru_cache
from math import sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dft import dft, left_multiply
from .precision import without_autocast

FILTER_SIZE = 64
"""Side of the largest map that is filtered by matrices: their cost grows with its third power, an
FFT's with the second.
"""

BLOCK_BYTES = 2**20
"""Bytes of the maps that are filtered at a time, for each thread: the cache still holds what one
step has left to the next.
"""


class RealDft(NamedTuple):
    """The real DFT of one axis of S points and its inverse.

    The coefficients come in this order: those of the cosines without a sine, which are the constant
    one and, for an even S, that of frequency S / 2; those of the other cosines; those of the sines.

    Attributes:
        analysis: `(S, points of the input)`.
        synthesis: `(points of the output, S)`.
    """

    analysis: Tensor
    synthesis: Tensor


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
        signal: `(B, C, S_h, S_w)`; any memory format, channels last is fastest.
        inverse_root: V on the half spectrum, `(C, S_h, S_w // 2 + 1)`.
        rows, columns: what is kept of the result.

    Returns:
        `(B, C, H', W')`, in the dtype and the memory format of `signal`.
    """
    height, width = signal.shape[-2:]
    dft_h = _make_real_dft(height, rows.indices(height), signal.dtype)
    dft_w = _make_real_dft(width, columns.indices(width), signal.dtype)
    mean, difference = (factors.to(signal.dtype) for factors in _factors(inverse_root, width))
    with without_autocast(signal):
        output = _DftFilter.apply(signal.permute(0, 2, 3, 1), mean, difference, dft_h, dft_w)
    output = output.permute(0, 3, 1, 2)
    if not signal.is_contiguous(memory_format=torch.channels_last):
        output = output.contiguous()
    return output


class _DftFilter(torch.autograd.Function):
    """`(B, S_h, S_w, C)` -> `(B, H', W', C)`."""

    # The filter is symmetric, so its adjoint is the same steps with analysis and synthesis, both
    # transposed, in each other's place: the function is its own backward pass.

    @staticmethod
    def forward(
        ctx: Any, signal: Tensor, mean: Tensor, difference: Tensor, dft_h: RealDft, dft_w: RealDft
    ) -> Tensor:
        ctx.save_for_backward(mean, difference)
        ctx.dfts = (dft_h, dft_w)
        batch, _, _, channels = signal.shape
        output = signal.new_empty(batch, len(dft_h.synthesis), len(dft_w.synthesis), channels)
        # As few blocks as the limit allows. -(-a // b) rounds up.
        blocks = max(1, -(-signal.nbytes // (BLOCK_BYTES * torch.get_num_threads())))
        for maps, result in zip(signal.chunk(blocks), output.chunk(blocks), strict=True):
            _filter_maps(maps, mean, difference, dft_h, dft_w, result)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mean, difference = ctx.saved_tensors
        adjoint = (RealDft(dft.synthesis.mT, dft.analysis.mT) for dft in ctx.dfts)
        with without_autocast(grad):
            grad = _DftFilter.apply(grad, mean, difference, *adjoint)
        return grad, None, None, None, None


def _filter_maps(
    maps: Tensor, mean: Tensor, difference: Tensor, dft_h: RealDft, dft_w: RealDft, result: Tensor
) -> None:
    """Write the filtered maps, `(B, S_h, S_w, C)`, into `result`, `(B, H', W', C)`."""
    batch, _, width, channels = maps.shape
    size_h, size_w = len(dft_h.analysis), len(dft_w.analysis)
    # Along H, which makes H the innermost axis, along W, and back: no step has to rearrange its
    # input.
    spectrum = torch.bmm(maps.flatten(2).mT, dft_h.analysis.mT.expand(batch, -1, -1))
    spectrum = left_multiply(dft_w.analysis, spectrum.view(batch, width, channels * size_h))
    spectrum = _filter(spectrum.view(batch, size_w, channels, size_h), mean, difference)
    half = left_multiply(dft_w.synthesis, spectrum.flatten(2))
    half = half.view(batch, result.shape[2] * channels, size_h)
    torch.bmm(dft_h.synthesis.expand(batch, -1, -1), half.mT, out=result.flatten(2))


def _filter(spectrum: Tensor, mean: Tensor, difference: Tensor) -> Tensor:
    """The filter on coefficients `(B, S_w, C, S_h)`, with m and d from `_factors`."""
    filtered = spectrum * mean
    cos_w, cos_h = (_part(spectrum.shape[axis], 0) for axis in (1, 3))
    sin_w, sin_h = (_part(spectrum.shape[axis], 1) for axis in (1, 3))
    for (here_w, here_h), (partner_w, partner_h), sign in (
        ((cos_w, cos_h), (sin_w, sin_h), -1),
        ((sin_w, sin_h), (cos_w, cos_h), -1),
        ((cos_w, sin_h), (sin_w, cos_h), 1),
        ((sin_w, cos_h), (cos_w, sin_h), 1),
    ):
        partners = spectrum[:, partner_w, :, partner_h]
        filtered[:, here_w, :, here_h].addcmul_(partners, difference, value=sign)
    return filtered


def _part(size: int, part: int) -> slice:
    """Where the cosines with a sine (part 0) or the sines (part 1) are among the coefficients."""
    pairs = (size - 1) // 2
    start = size - (2 - part) * pairs
    return slice(start, start + pairs)


def _factors(inverse_root: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """m of all coefficients, `(S_w, C, S_h)`, and d of those with a cosine and a sine on each
    axis.
    """
    height = inverse_root.shape[1]
    by_frequency = inverse_root.flatten(1).mT.contiguous()
    here, mirrored = (by_frequency[index].mT for index in _half_spectrum_indices(height, width))
    pairs = (_part(width, 0), slice(None), _part(height, 0))
    mean = (here + mirrored) / 2
    difference = (here[pairs] - mirrored[pairs]) / 2
    return mean.contiguous(), difference.contiguous()


@lru_cache(maxsize=128)
def _half_spectrum_indices(height: int, width: int) -> tuple[Tensor, Tensor]:
    """For each coefficient, where V has its frequencies `(k, l)` and `(-k, l)`: two int64 `(S_w,
    S_h)`, as indices of the flattened half spectrum.
    """
    frequencies_h = _frequencies(height)
    columns = _frequencies(width)[:, None]
    rows = torch.stack([frequencies_h, -frequencies_h % height])
    here, mirrored = rows[:, None] * (width // 2 + 1) + columns
    return here, mirrored


def _frequencies(size: int) -> Tensor:
    """The frequency of each coefficient of an axis, int64 `(S,)`."""
    # A default device of the caller's must not get into the caches.
    with torch.device("cpu"):
        pairs = torch.arange(1, (size + 1) // 2)
        # 0 and, for an even size, S / 2
        alone = torch.arange(0, size // 2 + 1, size // 2 or 1)[: 2 - size % 2]
    return torch.cat([alone, pairs, pairs])


@lru_cache(maxsize=128)
@torch.no_grad()
def _make_real_dft(size: int, kept: tuple[int, int, int], dtype: torch.dtype) -> RealDft:
    """The real DFT of an axis; `kept` is start, stop and step of the points that are kept."""
    frequencies = _frequencies(size)
    cosines, sines = dft(frequencies, torch.arange(size, device="cpu"), size)
    with_sine = _part(size, 0)
    of_sines = _part(size, 1)
    basis = cosines.clone()
    basis[of_sines] = sines[of_sines]
    # Each function gets the length 1. The squares of a cosine without a sine add up to S, those of
    # the others to S / 2.
    basis[: with_sine.start] /= sqrt(size)
    basis[with_sine.start :] /= sqrt(size / 2)
    synthesis = basis[:, slice(*kept)].mT
    return RealDft(basis.to(dtype), synthesis.to(dtype).contiguous())
