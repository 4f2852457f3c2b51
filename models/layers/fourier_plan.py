"""The small DFT matrices by which `fourier_convolution` takes images and kernels to the Fourier domain and back."""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from models.layers.waves import waves

BLOCK_BYTES = 12 * 2**20
"""Spectra of kernels are made for as many output channels at a time as fit into this, or into twice the spectra of the images,
which are read again for every block; larger ones would leave the cache."""


class Axis(NamedTuple):
    """One axis of a convolution with zero padding on both sides, `padding <= dilation * (kernel - 1)`, whose grid `size` is a
    multiple of the stride."""

    length: int
    kernel: int
    stride: int
    padding: int
    dilation: int

    @property
    def size(self) -> int:
        """Of the grid: the full convolution's output."""
        return self.length + self.dilation * (self.kernel - 1)

    @property
    def kept(self) -> int:
        """Frequencies of the strided grid."""
        return self.size // self.stride

    @property
    def output(self) -> int:
        """Length of the strided and cropped output."""
        return (self.size + 2 * self.padding - 2 * self.dilation * (self.kernel - 1) - 1) // self.stride + 1

    @property
    def possible(self) -> bool:
        """Whether this module can compute it."""
        return 0 <= self.padding <= self.dilation * (self.kernel - 1) and self.size % self.stride == 0 and self.output > 0


@dataclass(frozen=True, eq=False)
class Plan:
    """The matrices of one geometry, in one type on one device.

    A frequency of the strided grid is `g = (g_w, g_h)`, `g_w` in the half spectrum. On the full grid the frequencies
    `f = g + kept * a` with `a < stride` per axis fall on it. Spectra are stored as `(aliases, frequencies, planes, B, C)`, with
    real and imaginary parts as planes, so that a complex product is two real ones of twice as many rows.

    Attributes:
        rows, columns: the axes H and W.
        images_w: `(aliases_w * g_w * 2, W)`, the DFT along W.
        images_h: for each alias `(g_h * 3, H * 2)`, along H, to the planes -imaginary, real, imaginary.
        images_h_adjoint: for each alias `(H * 2, g_h * 2)`, back from real and imaginary.
        outputs_h: `(H' * 2, g_h * 2)`, the inverse DFT along H.
        outputs_h_adjoint: `(g_h * 3, H' * 2)`, its adjoint, to the planes real, imaginary, -real.
        outputs_w: `(W', g_w * 2)`, the inverse DFT along W, which yields real numbers.
        taps: `(2 * aliases * frequencies, k_h * k_w)`, from kernels to real and imaginary parts of their spectra.
        index: int64 `(aliases, frequencies)`: places in a flattened half spectrum of the full grid.
    """

    rows: Axis
    columns: Axis
    images_w: Tensor
    images_h: tuple[Tensor, ...]
    images_h_adjoint: tuple[Tensor, ...]
    outputs_h: Tensor
    outputs_h_adjoint: Tensor
    outputs_w: Tensor
    taps: Tensor
    index: Tensor

    def spectrum(self, images: Tensor) -> Tensor:
        """`(B, C, H, W)` -> `(aliases, frequencies, 3, B, C)`, planes -imaginary, real, imaginary."""
        batch, channels, height, width = images.shape
        pixels = images.permute(3, 2, 0, 1).reshape(width, -1)
        half = (self.images_w @ pixels).view(-1, 2 * height, batch * channels)
        parts = [_each(matrix, half) for matrix in self.images_h]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole.view(self.index.shape[0], -1, 3, batch, channels)

    def spectrum_adjoint(self, spectrum: Tensor) -> Tensor:
        """`(aliases, frequencies, 2, B, C)` -> `(B, C, H, W)`; the adjoint of `spectrum` for planes real, imaginary."""
        *_, batch, channels = spectrum.shape
        parts = spectrum.view(self.rows.stride, -1, 2 * self.rows.kept, batch * channels)
        half = _each(self.images_h_adjoint[0], parts[0])
        for matrix, part in zip(self.images_h_adjoint[1:], parts[1:], strict=True):
            half.baddbmm_(matrix.expand(len(part), -1, -1), part)
        pixels = self.images_w.mT @ half.view(len(self.images_w), -1)
        return _as_images(pixels, self.columns.length, self.rows.length, batch, channels)

    def output(self, spectrum: Tensor) -> Tensor:
        """`(frequencies, 2, B, C)` on the strided grid -> `(B, C, H', W')`, the inverse DFT, cropped."""
        *_, batch, channels = spectrum.shape
        half = _each(self.outputs_h, spectrum.view(-1, 2 * self.rows.kept, batch * channels))
        pixels = self.outputs_w @ half.view(self.outputs_w.shape[1], -1)
        return _as_images(pixels, self.columns.output, self.rows.output, batch, channels)

    def output_adjoint(self, grad: Tensor) -> Tensor:
        """`(B, C, H', W')` -> `(frequencies, 3, B, C)`, planes real, imaginary, -real."""
        batch, channels, height, width = grad.shape
        pixels = grad.permute(3, 2, 0, 1).reshape(width, -1)
        half = (self.outputs_w.mT @ pixels).view(-1, 2 * height, batch * channels)
        return _each(self.outputs_h_adjoint, half).view(-1, 3, batch, channels)

    def kernels(self, weight: Tensor) -> Tensor:
        """`(C_out, C_in, k_h, k_w)` -> `(2, aliases, frequencies, C_out, C_in)`, real and imaginary parts."""
        taps = weight.flatten(2).mT
        if self.dtype == torch.float32:  # MKL multiplies many small matrices faster than a flat one
            spectrum = _each(self.taps, taps).unflatten(1, (2, *self.index.shape))
            return spectrum.permute(1, 2, 3, 0, 4)
        return (self.taps @ taps.transpose(0, 1).flatten(1)).view(2, *self.index.shape, *weight.shape[:2])

    def kernels_adjoint(self, spectrum: Tensor) -> Tensor:
        """`(2, aliases, frequencies, C_out, C_in)` -> `(C_out, C_in, k_h, k_w)`."""
        taps = _each(self.taps.mT.contiguous(), spectrum.flatten(0, 2).transpose(0, 1))
        return taps.mT.unflatten(2, (self.rows.kernel, self.columns.kernel))

    @property
    def dtype(self) -> torch.dtype:
        """Of all products."""
        return self.taps.dtype

    def filter(self, inverse_root: Tensor) -> Tensor:
        """`(C_out, S_h, S_w // 2 + 1)` -> `(aliases, frequencies, 1, C_out)`."""
        return inverse_root.to(self.dtype).flatten(1).mT[self.index].unsqueeze(2)

    def blocks(self, weight: Tensor, batch: int) -> list[slice]:
        """Output channels whose kernels are transformed at a time."""
        row = len(self.taps) * weight.shape[1] * self.taps.element_size()  # of one output channel, and of one image
        channels = max(32, max(BLOCK_BYTES // row, 2 * batch) // 32 * 32)
        return [slice(begin, begin + channels) for begin in range(0, len(weight), channels)]


def plan_for(rows: Axis, columns: Axis, dtype: torch.dtype, device: torch.device) -> Plan | None:
    """The plan of a geometry; None where this module cannot compute it."""
    return _make_plan(rows, columns, dtype, device) if rows.possible and columns.possible else None


@lru_cache(maxsize=128)
@torch.no_grad()
def _make_plan(rows: Axis, columns: Axis, dtype: torch.dtype, device: torch.device) -> Plan:
    kept_h = torch.arange(rows.kept)
    kept_w = torch.arange(columns.kept // 2 + 1)
    frequencies_h = [kept_h + alias * rows.kept for alias in range(rows.stride)]
    frequencies_w = torch.cat([kept_w + alias * columns.kept for alias in range(columns.stride)])
    split = (rows.stride, rows.kept, columns.stride, len(kept_w))

    def ready(matrix: Tensor) -> Tensor:
        return matrix.to(device, dtype).contiguous()

    def interleaved(*planes: Tensor) -> Tensor:
        return ready(torch.stack(planes, dim=1).flatten(0, 1))

    cos, sin = waves(frequencies_w, torch.arange(columns.length), columns.size)
    images_w = interleaved(cos, -sin)
    images_h = [_complex(cos, -sin) for cos, sin in (waves(f, torch.arange(rows.length), rows.size) for f in frequencies_h)]
    cos, sin = (wave / rows.size for wave in waves(kept_h, torch.arange(rows.output), rows.kept))
    outputs_h = _complex(cos, -sin)  # the adjoint of the inverse DFT, whose waves turn the other way
    cos, sin = (wave * _share(columns)[:, None] for wave in waves(kept_w, torch.arange(columns.output), columns.kept))
    return Plan(
        rows,
        columns,
        images_w=images_w,
        images_h=tuple(interleaved(-imaginary, real, imaginary) for real, imaginary in images_h),
        images_h_adjoint=tuple(interleaved(real, imaginary).mT.contiguous() for real, imaginary in images_h),
        outputs_h=interleaved(*outputs_h).mT.contiguous(),
        outputs_h_adjoint=interleaved(*outputs_h, -outputs_h[0]),
        outputs_w=interleaved(cos, -sin).mT.contiguous(),
        taps=ready(_taps(rows, columns, torch.cat(frequencies_h), frequencies_w, split)),
        index=_half_spectrum_index(rows, columns, torch.cat(frequencies_h), frequencies_w, split).to(device),
    )


def _complex(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The product with `cos + i sin` `(f, n)` as real matrices `(f, 2 n)`, for the real and for the imaginary part of the
    result; real parts stand before imaginary ones."""
    return torch.cat([cos, -sin], dim=1), torch.cat([sin, cos], dim=1)


def _share(axis: Axis) -> Tensor:
    """Weights of a half spectrum in the inverse DFT of real numbers: the other half is its conjugate, so that all counts twice
    but what is its own conjugate."""
    kept = torch.arange(axis.kept // 2 + 1)
    return torch.where((kept == 0) | (2 * kept == axis.kept), 1.0, 2.0).double() / axis.size


def _taps(rows: Axis, columns: Axis, frequencies_h: Tensor, frequencies_w: Tensor, split: tuple[int, ...]) -> Tensor:
    """`Plan.taps`. A convolution of torch's correlates, and the output begins at the crop: a tap stands at
    `tap * dilation - padding`."""

    def of_axis(axis: Axis, frequencies: Tensor) -> tuple[Tensor, Tensor]:
        return waves(frequencies, torch.arange(axis.kernel) * axis.dilation - axis.padding, axis.size)

    (cos_h, sin_h), (cos_w, sin_w) = of_axis(rows, frequencies_h), of_axis(columns, frequencies_w)
    real = _pairs(cos_h, cos_w) - _pairs(sin_h, sin_w)
    imaginary = _pairs(cos_h, sin_w) + _pairs(sin_h, cos_w)
    return torch.stack([_by_alias(part, split) for part in (real, imaginary)]).flatten(0, 2)


def _half_spectrum_index(
    rows: Axis, columns: Axis, frequencies_h: Tensor, frequencies_w: Tensor, split: tuple[int, ...]
) -> Tensor:
    """`Plan.index`. A frequency beyond the half spectrum is found at its opposite, where a real V is the same."""
    row, column = torch.meshgrid(frequencies_h, frequencies_w, indexing="ij")
    beyond = column > columns.size // 2
    row, column = torch.where(beyond, -row % rows.size, row), torch.where(beyond, columns.size - column, column)
    return _by_alias((row * (columns.size // 2 + 1) + column).unsqueeze(-1), split).squeeze(-1)


def _pairs(of_rows: Tensor, of_columns: Tensor) -> Tensor:
    """`(f_h, k_h)` and `(f_w, k_w)` -> all products, `(f_h, f_w, k_h * k_w)`."""
    return (of_rows[:, None, :, None] * of_columns[None, :, None, :]).flatten(2)


def _by_alias(table: Tensor, split: tuple[int, ...]) -> Tensor:
    """`(f_h, f_w, n)` -> `(aliases, frequencies, n)` in the order of `Plan`."""
    aliases_h, kept_h, aliases_w, kept_w = split
    table = table.reshape(aliases_h, kept_h, aliases_w, kept_w, -1)
    return table.permute(0, 2, 3, 1, 4).reshape(aliases_h * aliases_w, kept_w * kept_h, -1)


def _each(matrix: Tensor, batch: Tensor) -> Tensor:
    """`matrix @ batch[i]` for every i; `torch.matmul` would rearrange them."""
    return torch.bmm(matrix.expand(len(batch), -1, -1), batch)


def _as_images(pixels: Tensor, width: int, height: int, batch: int, channels: int) -> Tensor:
    """`(W, H * B * C)` -> `(B, C, H, W)`, channels last."""
    return pixels.view(width, height, batch, channels).permute(2, 1, 0, 3).contiguous().permute(0, 3, 1, 2)
