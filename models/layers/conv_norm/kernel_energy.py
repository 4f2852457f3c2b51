"""The energy of convolution kernels at every frequency; ConvNorm divides by its square root
(arXiv:2103.00673, section 3).
"""

from functools import lru_cache

import torch
from torch import Tensor

from .dft import dft, left_multiply
from .precision import without_autocast

RELATIVE_FLOOR = 1e-6
ABSOLUTE_FLOOR = 1e-12

Tables = tuple[Tensor, Tensor, Tensor]


def kernel_energy(
    weight: Tensor, size: tuple[int, int], dilation: tuple[int, int] = (1, 1)
) -> Tensor:
    """The energy `E_o(f) = sum_c |w^_oc(f)|^2` of each output channel's kernels on the half
    spectrum of a `size` grid.

    `w^_oc` is the two-dimensional DFT of kernel `(o, c)`, padded with zeros to `size` (or wrapped
    around, where it is larger). E is computed as the DFT of the kernel's autocorrelation, so no
    padded kernel is ever transformed. An autocorrelation has only `2k-1` lags per axis. Their sums
    over the input channels are sums along the diagonals of the `k^2 x k^2` Gram matrix of the
    kernel's taps. The cost therefore does not grow with `size` times the number of input channels.

    Args:
        weight: `(C_out, C_in / groups, k_h, k_w)`. No gradient flows back to it.
        size: `(S_h, S_w)`, the grid of the transform.
        dilation: the distance between neighboring taps, per axis.

    Returns:
        `(C_out, S_h, S_w // 2 + 1)`, float64 (float32 on devices without it). Near a spectral zero
        E is a difference of large terms, so float32 and TF32 would lose the accuracy that the
        inverse square root needs. Rounding can leave values slightly below zero.
    """
    return _energy_and_mean(weight, size, dilation)[0]


def inverse_root_energy(
    weight: Tensor, size: tuple[int, int], dilation: tuple[int, int] = (1, 1)
) -> Tensor:
    """`V = 1 / sqrt(max(E, floor))`, `(C_out, S_h, S_w // 2 + 1)`.

    The floor is `max(1e-6 * mean energy of the channel, 1e-12)`. The original has none and returns
    NaN for an all-zero kernel and for a kernel with a spectral zero such as `[1, -1]`.
    """
    energy, mean = _energy_and_mean(weight, size, dilation)
    floor = (RELATIVE_FLOOR * mean).clamp_min(ABSOLUTE_FLOOR)
    return energy.maximum(floor).rsqrt()


def _energy_and_mean(
    weight: Tensor, size: tuple[int, int], dilation: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """`kernel_energy`, and its mean over all frequencies, `(C_out, 1, 1)`."""
    # MPS has no float64.
    dtype = torch.float32 if weight.device.type == "mps" else torch.float64
    height, width = weight.shape[-2:]
    tables = _tables((height, width), size, dilation, dtype, weight.device)
    lag_index, lag_dft_h, lag_dft_w = tables
    with without_autocast(weight):
        taps = weight.detach().flatten(2).to(dtype)
        gram = torch.bmm(taps.mT, taps).flatten(1)
        # The autocorrelation at a lag is the sum of the Gram matrix over all pairs of taps with
        # that distance.
        lags = gram.new_zeros(gram.shape[0], (2 * height - 1) * (2 * width - 1))
        lags = lags.index_add_(1, lag_index, gram)
        lags = lags.unflatten(1, (2 * height - 1, 2 * width - 1))
        # An autocorrelation is symmetric, so its DFT is real: it sums cos(a + b), with an angle for
        # each axis, and cos(a + b) = cos a cos b - sin a sin b. Each product takes both terms at
        # once, because on tensors so small an operation costs more than its arithmetic.
        half = lags.flatten(0, 1) @ lag_dft_w
        half = half.view(len(lags), lag_dft_h.shape[1], -1)
        energy = left_multiply(lag_dft_h, half)
        # By Parseval the autocorrelation at lag 0 is the mean energy, on a grid no smaller than the
        # kernel. On a smaller one it is still a good scale.
        return energy, lags[:, height - 1 : height, width - 1 : width]


def _tables(
    kernel: tuple[int, int],
    size: tuple[int, int],
    dilation: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tables:
    """The lag of each entry of a Gram matrix, as an index, and the DFT of the lags along each axis:
    `(S_h, lags_h * 2)` with cosines and minus sines of each lag side by side, and `(lags_w, 2 *
    f_w)` with all cosines before all sines.

    They depend on the geometry alone.
    """
    arguments = (kernel, size, dilation, dtype, device)
    # A compiler folds the tables into its graph. A tensor from its tracing must not stay in the
    # cache.
    if torch.compiler.is_compiling():
        return _make_tables(*arguments)
    return _cached_tables(*arguments)


def _make_tables(
    kernel: tuple[int, int],
    size: tuple[int, int],
    dilation: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tables:
    height, width = kernel
    # Row and column of each tap; lags are shifted so that the smallest, 1 - height, has index 0.
    rows = torch.arange(height, device=device).repeat_interleave(width)
    columns = torch.arange(width, device=device).repeat(height)
    lag_h = rows[None] - rows[:, None] + height - 1
    lag_w = columns[None] - columns[:, None] + width - 1
    lag_index = (lag_h * (2 * width - 1) + lag_w).flatten()
    # Along W the half spectrum is enough, because the energy of real kernels is symmetric.
    cos_h, sin_h = _lag_dft(height, size[0], size[0], dilation[0], dtype, device)
    cos_w, sin_w = _lag_dft(width, size[1], size[1] // 2 + 1, dilation[1], dtype, device)
    lag_dft_h = torch.stack([cos_h, -sin_h], dim=2).flatten(1)
    lag_dft_w = torch.cat([cos_w, sin_w]).mT.contiguous()
    return lag_index, lag_dft_h, lag_dft_w


_cached_tables = lru_cache(maxsize=256)(_make_tables)


def _lag_dft(
    taps: int, size: int, frequencies: int, dilation: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The DFT of all lags of `taps` taps at the first `frequencies`, `(frequencies, 2 * taps -
    1)`.
    """
    lags = torch.arange(1 - taps, taps, device=device) * dilation
    return dft(torch.arange(frequencies, device=device), lags, size, dtype)
