"""The small DFT matrices by which `fourier_convolution` takes images and kernels to the Fourier
domain and back."""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .dft import waves

BLOCK_BYTES = 2**18
"""Of the spectra of kernels, for each image: so many frequencies are computed at a time. Spectra
and products of a block stay in the cache, and the more images use a kernel's spectrum, the less
that matters."""

BLOCK_FREQUENCIES = 12
"""At least so many in a block: the weights are read again for every block."""

SMALL_GRID = 10
"""Grids of up to so many rows drop what is another frequency's conjugate: a sixth of 6 x 6. Of
larger ones it is too little to pay for itself."""


class Axis(NamedTuple):
    """One axis of a convolution with zero padding on both sides, `padding <= dilation * (kernel -
    1)`, whose grid `size` is a multiple of the stride."""

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
        return (
            self.size + 2 * self.padding - 2 * self.dilation * (self.kernel - 1) - 1
        ) // self.stride + 1

    @property
    def possible(self) -> bool:
        """Whether this module can compute it."""
        return (
            0 <= self.padding <= self.dilation * (self.kernel - 1)
            and self.size % self.stride == 0
            and self.output > 0
        )


@dataclass(frozen=True, eq=False)
class Plan:
    """The matrices of one geometry, in one type on one device.

    A frequency of the strided grid is `g = (g_h, g_w)`, `g_w` in the half spectrum. On the full
    grid the frequencies `f = g + kept * a` with `a < stride` per axis, its aliases, fall on it.
    Channels stay innermost from images to images, so that nothing is ever rearranged: a transform
    along W is a product for each row of each image, one along H a product for each image, and a
    spectrum `(B, 2, a_h, g, a_w * C)`, real and imaginary parts at index 1, holds for each
    frequency a matrix of real and imaginary parts of all images, whose rows are far apart.

    In the columns 0 and, of an even grid, `kept / 2`, which are their own conjugates, one half of
    the rows is the conjugate of the other. Small grids compute one of them, count it twice and have
    zeros in place of the other: the inverse DFT along W takes the real part of these columns, where
    the two add up.

    Attributes:
        rows, columns: the axes H and W.
        images_w: `(2 * g_w * a_w, W)`, the DFT along W.
        images_h: `(2 * a_h * g_h, H * 2)`, the DFT along H.
        outputs_h: `(H' * 2, 2 * g_h)`, the inverse DFT along H.
        outputs_w: `(W', 2 * g_w)`, the inverse DFT along W, which yields real numbers.
        taps: `(k_h * k_w, 2, a_h, g, a_w)`, from kernels to real and imaginary parts of their
            spectra.
        index: int64 `(a_h, g, a_w)`: places in a flattened half spectrum of the full grid.
        counts: `(g, 1)`, how often a frequency counts.
    """

    rows: Axis
    columns: Axis
    images_w: Tensor
    images_h: Tensor
    outputs_h: Tensor
    outputs_w: Tensor
    taps: Tensor
    index: Tensor
    counts: Tensor

    def spectrum(self, images: Tensor) -> Tensor:
        """`(B, C, H, W)` -> `(B, 2, a_h, g, a_w * C)`."""
        batch, channels, height, width = images.shape
        half = _each(self.images_w, images.permute(0, 2, 3, 1).reshape(-1, width, channels))
        return self._spectra(
            _each(self.images_h, half.view(batch, 2 * height, -1)), self.rows.stride
        )

    def spectrum_adjoint(self, spectrum: Tensor) -> Tensor:
        """`(B, 2, a_h, g, a_w * C)` -> `(B, C, H, W)`, channels last; the adjoint of `spectrum`."""
        half = _each(self.images_h.mT, self._with_all_rows(spectrum))
        channels = spectrum.shape[-1] // self.columns.stride
        return self._images(
            _each(self.images_w.mT, half.view(-1, len(self.images_w), channels)), len(spectrum)
        )

    def output(self, spectrum: Tensor) -> Tensor:
        """`(B, 2, g, C)` on the strided grid -> `(B, C, H', W')`, channels last: the inverse DFT,
        cropped."""
        half = _each(self.outputs_h, self._with_all_rows(spectrum.unsqueeze(2)))
        return self._images(
            _each(self.outputs_w, half.view(-1, self.outputs_w.shape[1], spectrum.shape[-1])),
            len(spectrum),
        )

    def output_adjoint(self, grad: Tensor) -> Tensor:
        """`(B, C, H', W')` -> `(B, 2, g, C)`, the adjoint of `output`."""
        batch, channels, height, width = grad.shape
        half = _each(self.outputs_w.mT, grad.permute(0, 2, 3, 1).reshape(-1, width, channels))
        return self._spectra(_each(self.outputs_h.mT, half.view(batch, 2 * height, -1)), 1).squeeze(
            2
        )

    def factors(self, inverse_root: Tensor) -> Tensor:
        """V `(C_out, S_h, S_w // 2 + 1)` -> `(C_out, a_h, g, a_w)`, times the counts, in the type
        of all products."""
        return (inverse_root.flatten(1)[:, self.index] * self.counts).to(self.dtype)

    def kernels(self, weight: Tensor, factors: Tensor, block: slice) -> Tensor:
        """`(C_out, C_in, k_h, k_w)`, in the type of all products, -> `(C_out, 2, a_h, g, a_w *
        C_in)`, real and imaginary parts, times the factors, for a block of frequencies g."""
        taps = self._taps(factors[:, :, block], self.taps[:, :, :, block])
        spectrum = torch.bmm(taps.mT, weight.flatten(2).mT)
        return spectrum.view(
            len(weight), 2, self.rows.stride, -1, self.columns.stride * weight.shape[1]
        )

    def add_kernels_adjoint(
        self, total: Tensor, grads: Tensor, factors: Tensor, block: slice
    ) -> None:
        """Add to `total` float32 or float64 `(C_out, k_h * k_w, C_in)` the adjoint of `kernels` at
        `grads` `(2, a_h, g, C_out, a_w * C_in)`."""
        # The shape is (C_out, 2 * a_h * g, a_w, C_in).
        grads = grads.unflatten(-1, (self.columns.stride, -1)).flatten(0, 2).transpose(0, 1)
        for alias in range(self.columns.stride):
            taps = self._taps(factors[:, :, block, alias], self.taps[:, :, :, block, alias])
            if total.dtype == self.dtype:
                total.baddbmm_(taps, grads[:, :, alias])
            else:  # bfloat16 is too coarse to add up in
                total += torch.bmm(taps, grads[:, :, alias])

    @property
    def dtype(self) -> torch.dtype:
        """Of all products."""
        return self.images_w.dtype

    @property
    def frequencies(self) -> int:
        """Of the strided grid, in the half spectrum."""
        return len(self.counts)

    def blocks(self, batch: int, in_channels: int, out_channels: int) -> list[slice]:
        """The frequencies g of the strided grid, some at a time; an even number of them, which two
        threads share equally."""
        kernels = (
            2
            * self.rows.stride
            * self.columns.stride
            * in_channels
            * out_channels
            * self.images_w.element_size()
        )
        most = max(BLOCK_FREQUENCIES, BLOCK_BYTES * batch // kernels)
        size = -(-self.frequencies // -(-self.frequencies // most))
        size += size % 2
        return [slice(begin, begin + size) for begin in range(0, self.frequencies, size)]

    def _taps(self, factors: Tensor, taps: Tensor) -> Tensor:
        """`taps` `(k_h * k_w, 2, ...)` times `factors` `(C_out, ...)`, `(C_out, k_h * k_w, n)`:
        what they make of kernels is filtered."""
        return (taps * factors[:, None, None]).flatten(2)

    def _spectra(self, transformed: Tensor, aliases_h: int) -> Tensor:
        """`(B, 2 * a_h * g_h, g_w * a_w * C)` -> `(B, 2, a_h, g, a_w * C)`."""
        full = transformed.view(
            len(transformed), 2, aliases_h, self.rows.kept, self.columns.kept // 2 + 1, -1
        )
        if self.frequencies == full.shape[3] * full.shape[4]:
            return full.flatten(3, 4)
        spectrum = full.new_empty(*full.shape[:3], self.frequencies, full.shape[5])
        for some, of_full in self._halves(spectrum, full):
            some.copy_(of_full)
        return spectrum

    def _with_all_rows(self, spectrum: Tensor) -> Tensor:
        """`(B, 2, a_h, g, n)` -> `(B, 2 * a_h * g_h, g_w * n)`, the adjoint of `_spectra`."""
        grid = (self.rows.kept, self.columns.kept // 2 + 1)
        if self.frequencies == grid[0] * grid[1]:
            return spectrum.view(len(spectrum), -1, grid[1] * spectrum.shape[-1])
        full = spectrum.new_zeros(*spectrum.shape[:3], *grid, spectrum.shape[-1])
        for some, of_full in self._halves(spectrum, full):
            of_full.copy_(some)
        return full.flatten(4).flatten(1, 3)

    def _halves(self, spectrum: Tensor, full: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Parts of a `spectrum` `(B, 2, a_h, g, n)`, and what they are of a `full` one `(B, 2, a_h,
        g_h, g_w, n)`: rows where all columns are computed, and the others."""
        rows, inner = _rows_and_columns(self.rows, self.columns)
        parts = [full[:, :, :, :rows], full[:, :, :, rows:, inner]]
        sizes = [part.shape[3] * part.shape[4] for part in parts]
        halves = spectrum.split(sizes, dim=3)
        return [
            (half.unflatten(3, part.shape[3:5]), part)
            for half, part in zip(halves, parts, strict=True)
        ]

    def _images(self, pixels: Tensor, batch: int) -> Tensor:
        """`(B * H, W, C)` -> `(B, C, H, W)`, channels last."""
        return pixels.view(batch, -1, *pixels.shape[1:]).permute(0, 3, 1, 2)


def plan_for(rows: Axis, columns: Axis, dtype: torch.dtype, device: torch.device) -> Plan | None:
    """The plan of a geometry; None where this module cannot compute it."""
    return _make_plan(rows, columns, dtype, device) if rows.possible and columns.possible else None


@lru_cache(maxsize=128)
@torch.no_grad()
def _make_plan(rows: Axis, columns: Axis, dtype: torch.dtype, device: torch.device) -> Plan:
    kept_h = torch.arange(rows.kept)
    kept_w = torch.arange(columns.kept // 2 + 1)
    # The shape is (a_h, g_h).
    frequencies_h = (torch.arange(rows.stride)[:, None] * rows.kept + kept_h).flatten()
    # The shape is (g_w, a_w).
    frequencies_w = (kept_w[:, None] + torch.arange(columns.stride) * columns.kept).flatten()
    kept, counts = _independent(rows, columns)
    grid = (rows.stride, rows.kept * len(kept_w), columns.stride)  # (a_h, all of g, a_w)

    def ready(matrix: Tensor) -> Tensor:
        return matrix.to(device, dtype).contiguous()

    cos_w, sin_w = waves(frequencies_w, torch.arange(columns.length), columns.size)
    cos_h, sin_h = waves(frequencies_h, torch.arange(rows.length), rows.size)
    inverse_h = [
        wave.mT / rows.size for wave in waves(kept_h, torch.arange(rows.output), rows.kept)
    ]
    inverse_w = [
        wave.mT * _share(columns)
        for wave in waves(kept_w, torch.arange(columns.output), columns.kept)
    ]
    return Plan(
        rows,
        columns,
        images_w=ready(torch.cat([cos_w, -sin_w])),
        images_h=ready(_complex(cos_h, -sin_h).permute(0, 2, 3, 1).flatten(2).flatten(0, 1)),
        outputs_h=ready(_complex(*inverse_h).permute(2, 0, 1, 3).flatten(2).flatten(0, 1)),
        outputs_w=ready(torch.cat([inverse_w[0], -inverse_w[1]], dim=1)),
        taps=ready(
            _taps(rows, columns, frequencies_h, frequencies_w).unflatten(2, grid)[:, :, :, kept]
        ),
        index=_half_spectrum_index(rows, columns, frequencies_h, frequencies_w)
        .unflatten(0, grid)[:, kept]
        .to(device),
        counts=counts.to(device),
    )


def _rows_and_columns(rows: Axis, columns: Axis) -> tuple[int, slice]:
    """In how many rows of the strided grid's half spectrum all columns are computed, and which are
    in the others."""
    if rows.kept > SMALL_GRID:
        return rows.kept, slice(None)
    return rows.kept // 2 + 1, slice(1, (columns.kept + 1) // 2)


def _independent(rows: Axis, columns: Axis) -> tuple[Tensor, Tensor]:
    """The frequencies g that are computed, as places in the flattened half spectrum of the strided
    grid, and `Plan.counts`."""
    full, inner = _rows_and_columns(rows, columns)
    places = torch.arange(rows.kept * (columns.kept // 2 + 1)).view(rows.kept, -1)
    counts = torch.ones(places.shape)
    if full < rows.kept:
        counts[1 : (rows.kept + 1) // 2] = 2
        counts[:, inner] = 1
    kept = torch.cat([places[:full].flatten(), places[full:, inner].flatten()])
    return kept, counts.flatten()[kept].unsqueeze(1)


def _complex(cos: Tensor, sin: Tensor) -> Tensor:
    """The product with `cos + i sin` `(m, n)` in real numbers: `(2, 2, m, n)`, from part (second)
    to part (first)."""
    return torch.stack([torch.stack([cos, -sin]), torch.stack([sin, cos])])


def _share(axis: Axis) -> Tensor:
    """Weights of a half spectrum in the inverse DFT of real numbers: the other half is its
    conjugate, so that all counts twice but what is its own conjugate."""
    kept = torch.arange(axis.kept // 2 + 1)
    return torch.where((kept == 0) | (2 * kept == axis.kept), 1.0, 2.0).double() / axis.size


def _taps(rows: Axis, columns: Axis, frequencies_h: Tensor, frequencies_w: Tensor) -> Tensor:
    """`Plan.taps`, all frequencies in one row. A convolution of torch's correlates, and the output
    begins at the crop: a tap stands at `tap * dilation - padding`."""

    def of_axis(axis: Axis, frequencies: Tensor) -> tuple[Tensor, Tensor]:
        return waves(
            frequencies, torch.arange(axis.kernel) * axis.dilation - axis.padding, axis.size
        )

    (cos_h, sin_h), (cos_w, sin_w) = of_axis(rows, frequencies_h), of_axis(columns, frequencies_w)
    real = _pairs(cos_h, cos_w) - _pairs(sin_h, sin_w)
    imaginary = _pairs(cos_h, sin_w) + _pairs(sin_h, cos_w)
    return torch.stack([real, imaginary]).permute(2, 0, 1)


def _half_spectrum_index(
    rows: Axis, columns: Axis, frequencies_h: Tensor, frequencies_w: Tensor
) -> Tensor:
    """`Plan.index` in one row. A frequency beyond the half spectrum is found at its opposite, where
    a real V is the same."""
    row, column = torch.meshgrid(frequencies_h, frequencies_w, indexing="ij")
    beyond = column > columns.size // 2
    row, column = (
        torch.where(beyond, -row % rows.size, row),
        torch.where(beyond, columns.size - column, column),
    )
    return (row * (columns.size // 2 + 1) + column).flatten()


def _pairs(of_rows: Tensor, of_columns: Tensor) -> Tensor:
    """`(f_h, k_h)` and `(f_w, k_w)` -> all products, `(f_h * f_w, k_h * k_w)`."""
    return (of_rows[:, None, :, None] * of_columns[None, :, None, :]).flatten(2).flatten(0, 1)


def _each(matrix: Tensor, batch: Tensor) -> Tensor:
    """`matrix @ batch[i]` for every i; `torch.matmul` would rearrange them."""
    return torch.bmm(matrix.expand(len(batch), -1, -1), batch)
