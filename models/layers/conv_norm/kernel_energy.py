"""The energy of convolution kernels at every frequency, by which ConvNorm divides
(arXiv:2103.00673, section 3)."""

from functools import lru_cache

import torch
from torch import Tensor

from .dft import waves
from .precision import without_autocast

RELATIVE_FLOOR = 1e-6
ABSOLUTE_FLOOR = 1e-12


def kernel_energy(
    weight: Tensor, size: tuple[int, int], dilation: tuple[int, int] = (1, 1)
) -> Tensor:
    """The energy `E_o(f) = sum_c |w^_oc(f)|^2` of each output channel's kernels on the half
    spectrum of a `size` grid.

    `w^_oc` is the two-dimensional DFT of kernel `(o, c)` padded with zeros (or wrapped around,
    where it is larger) to `size`. No padded kernel is ever transformed: E is the DFT of the
    kernel's autocorrelation, which has only `2k-1` lags per axis. Summed over the input channels
    those lags are sums along the diagonals of the `k^2 x k^2` Gram matrix of the kernel's taps, so
    the cost does not grow with `size` times the number of input channels.

    Args:
        weight: `(C_out, C_in / groups, k_h, k_w)`. No gradient flows back to it.
        size: `(S_h, S_w)`, the grid of the transform.
        dilation: distance between neighboring taps, per axis.

    Returns:
        `(C_out, S_h, S_w // 2 + 1)`, float64 (float32 on devices without it): the difference of
        large terms that E is near a spectral zero, and TF32 products, would cost float32 the
        accuracy that the inverse square root needs. Rounding can leave values slightly below zero.
    """
    return _energy_and_mean(weight, size, dilation)[0]


def _energy_and_mean(
    weight: Tensor, size: tuple[int, int], dilation: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """`kernel_energy`, and its mean over all frequencies `(C_out, 1, 1)`, exactly so on a grid no
    smaller than the kernel (Parseval), on any grid a good scale: the autocorrelation at lag 0."""
    dtype = torch.float32 if weight.device.type == "mps" else torch.float64
    height, width = weight.shape[-2:]
    index, (cos_h, sin_h), (cos_w, sin_w) = _tables(
        (height, width), size, dilation, dtype, weight.device
    )
    with without_autocast(weight):
        taps = weight.detach().flatten(2).to(dtype)
        gram = torch.bmm(taps.mT, taps).flatten(1)
        lags = gram.new_zeros(gram.shape[0], (2 * height - 1) * (2 * width - 1)).index_add_(
            1, index, gram
        )
        lags = lags.unflatten(1, (2 * height - 1, 2 * width - 1))
        energy = cos_h @ lags @ cos_w.mT - sin_h @ lags @ sin_w.mT
        return energy, lags[:, height - 1 : height, width - 1 : width]


def inverse_root_energy(
    weight: Tensor, size: tuple[int, int], dilation: tuple[int, int] = (1, 1)
) -> Tensor:
    """`V = 1 / sqrt(max(E, floor))`, `(C_out, S_h, S_w // 2 + 1)`; section 3 of the paper.

    The floor is `max(1e-6 * mean energy of the channel, 1e-12)`. The original has none and returns
    NaN for an all-zero kernel and for a kernel with a spectral zero such as `[1, -1]`."""
    energy, mean = _energy_and_mean(weight, size, dilation)
    return energy.maximum((RELATIVE_FLOOR * mean).clamp_min(ABSOLUTE_FLOOR)).rsqrt()


_Waves = tuple[Tensor, Tensor]


def _tables(
    kernel: tuple[int, int],
    size: tuple[int, int],
    dilation: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, _Waves, _Waves]:
    """What `kernel_energy` needs of geometry alone: for each entry of a Gram matrix its lag, and
    cosines and sines per axis."""
    arguments = (kernel, size, dilation, dtype, device)
    # a compiler folds the tables into its graph, and a tensor of its tracing must not stay in the
    # cache
    return _make_tables(*arguments) if torch.compiler.is_compiling() else _cached_tables(*arguments)


def _make_tables(
    kernel: tuple[int, int],
    size: tuple[int, int],
    dilation: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, _Waves, _Waves]:
    height, width = kernel
    rows = torch.arange(height, device=device).repeat_interleave(width)
    columns = torch.arange(width, device=device).repeat(height)
    lag_h = rows[None] - rows[:, None] + height - 1
    lag_w = columns[None] - columns[:, None] + width - 1
    return (
        (lag_h * (2 * width - 1) + lag_w).flatten(),
        _lag_waves(height, size[0], size[0], dilation[0], dtype, device),
        _lag_waves(width, size[1], size[1] // 2 + 1, dilation[1], dtype, device),
    )


_cached_tables = lru_cache(maxsize=256)(_make_tables)


def _lag_waves(
    taps: int, size: int, frequencies: int, dilation: int, dtype: torch.dtype, device: torch.device
) -> _Waves:
    """`waves` of the first `frequencies` at all lags of `taps` taps, `(frequencies, 2 * taps -
    1)`."""
    lags = torch.arange(1 - taps, taps, device=device) * dilation
    return waves(torch.arange(frequencies, device=device), lags, size, dtype)
