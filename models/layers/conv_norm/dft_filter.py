"""The filter of ConvNorm with its crop, as products with matrices of cosines and sines, for the
maps of a CPU.

Sizes such as 34 = 2 x 17 are slow for an FFT and small for a matrix. An axis of S points has an
orthonormal basis of S real waves, `cos(2 pi k n / S)` and `sin(2 pi k n / S)`, which takes a third
less work than complex numbers on a half spectrum. A product of two waves, one along each axis, is
no eigenvector of the filter, because V differs at the frequencies (k, l) and (-k, l). But

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

from .dft import dft
from .precision import without_autocast

FILTER_SIZE = 64
"""Side of the largest map that is filtered by matrices: their cost grows with its third power, an
FFT's with the second.
"""


class Waves(NamedTuple):
    """The waves of one axis, in the order: those that have no partner, which are the constant one
    and, of an even size, the one of frequency S / 2; all other cosines; their sines.

    Attributes:
        analysis: `(S, S)`, from points to coefficients.
        synthesis: `(points, S)`, from coefficients to the points that are kept.
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
    waves_h = _make_waves(height, rows.indices(height), signal.dtype)
    waves_w = _make_waves(width, columns.indices(width), signal.dtype)
    mean, difference = _factors(inverse_root, width)
    with without_autocast(signal):
        output = _DftFilter.apply(
            signal.permute(0, 2, 3, 1),
            mean.to(signal.dtype),
            difference.to(signal.dtype),
            waves_h,
            waves_w,
        )
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
        ctx: Any, signal: Tensor, mean: Tensor, difference: Tensor, waves_h: Waves, waves_w: Waves
    ) -> Tensor:
        ctx.save_for_backward(mean, difference)
        ctx.waves = (waves_h, waves_w)
        batch, _, width, channels = signal.shape
        # Along H with H innermost in the result, along W, and back: nothing is ever rearranged.
        spectrum = torch.bmm(signal.flatten(2).mT, _for_each(batch, waves_h.analysis.mT))
        spectrum = torch.bmm(_for_each(batch, waves_w.analysis), spectrum.view(batch, width, -1))
        spectrum = spectrum.view(batch, len(waves_w.analysis), channels, -1)
        spectrum = _filter(spectrum, mean, difference).flatten(2)
        columns = torch.bmm(_for_each(batch, waves_w.synthesis), spectrum)
        columns = columns.view(batch, -1, len(waves_h.analysis))
        output = torch.bmm(_for_each(batch, waves_h.synthesis), columns.mT)
        return output.view(batch, len(waves_h.synthesis), -1, channels)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mean, difference = ctx.saved_tensors
        adjoint = (Waves(waves.synthesis.mT, waves.analysis.mT) for waves in ctx.waves)
        with without_autocast(grad):
            grad = _DftFilter.apply(grad, mean, difference, *adjoint)
        return grad, None, None, None, None


def _for_each(batch: int, matrix: Tensor) -> Tensor:
    """The same matrix for each image; torch.matmul would copy the images into another order."""
    return matrix.expand(batch, -1, -1)


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
    """Where the cosines (part 0) or sines (part 1) that have a partner are among the waves."""
    pairs = (size - 1) // 2
    start = size - (2 - part) * pairs
    return slice(start, start + pairs)


def _factors(inverse_root: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """m of all waves, `(S_w, C, S_h)`, and d of those that have a partner along both axes."""
    height = inverse_root.shape[1]
    by_frequency = inverse_root.flatten(1).mT.contiguous()
    here, mirrored = (by_frequency[index].mT for index in _half_spectrum_indices(height, width))
    pairs = (_part(width, 0), slice(None), _part(height, 0))
    mean = (here + mirrored) / 2
    difference = (here[pairs] - mirrored[pairs]) / 2
    return mean.contiguous(), difference.contiguous()


@lru_cache(maxsize=128)
def _half_spectrum_indices(height: int, width: int) -> tuple[Tensor, Tensor]:
    """For each pair of waves, where V has its frequencies `(k, l)` and `(-k, l)`: two int64 `(S_w,
    S_h)`, as indices of the flattened half spectrum.
    """
    frequencies_h = _frequencies(height)
    columns = _frequencies(width)[:, None]
    rows = torch.stack([frequencies_h, -frequencies_h % height])
    here, mirrored = rows[:, None] * (width // 2 + 1) + columns
    return here, mirrored


def _frequencies(size: int) -> Tensor:
    """The frequencies of the waves of an axis, int64 `(S,)`."""
    pairs = torch.arange(1, (size + 1) // 2)
    alone = torch.tensor([0])
    if size % 2 == 0:
        alone = torch.tensor([0, size // 2])
    return torch.cat([alone, pairs, pairs])


@lru_cache(maxsize=128)
@torch.no_grad()
def _make_waves(size: int, kept: tuple[int, int, int], dtype: torch.dtype) -> Waves:
    """The waves of an axis and the first, the end and the step of the points that are kept."""
    frequencies = _frequencies(size)
    cosines, sines = dft(frequencies, torch.arange(size), size)
    cosine_part = _part(size, 0)
    sine_part = _part(size, 1)
    waves = cosines.clone()
    waves[sine_part] = sines[sine_part]
    # Each wave gets the length 1. The squares of one without a partner add up to S, else to S / 2.
    waves[: cosine_part.start] /= sqrt(size)
    waves[cosine_part.start :] /= sqrt(size / 2)
    synthesis = waves[:, slice(*kept)].mT
    return Waves(waves.to(dtype), synthesis.to(dtype).contiguous())
