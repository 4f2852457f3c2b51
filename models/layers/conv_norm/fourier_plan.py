"""The DFT matrices with which `fourier_convolution` takes images and kernels to the Fourier domain
and back.

Notation: f is a frequency of the full convolution's grid, of `size` points per axis. A stride s
keeps every s-th point, so the output has a grid of `size / s` points. Its frequencies are called g.
Subsampling adds up frequencies: with Z the DFT of the full output and Y that of the strided one,

    Y[g] = 1 / s * sum_a Z[g + a * size / s],    a = 0 ... s - 1

The frequencies `f = g + a * size / s` are the aliases of g; a is the alias index. The suffixes `_h`
and `_w` stand for the two axes: g_h and g_w, a_h and a_w.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .complex_products import ComplexProducts, choose_products
from .dft import complex_product, dft, half_spectrum_weights, left_multiply
from .recomputation import NARROW

FOURIER_BATCH = 16
"""The smallest batch for which the Fourier domain is faster on a CPU: the spectra of the kernels
cost the same for any batch.
"""

FOURIER_SIZE = 50
"""Side of the largest image that is transformed by matrices: their cost grows with its third power,
an FFT's with the second.
"""

BLOCK_BYTES = 2**18
"""Bytes of the kernels' spectra in one block of frequencies, per image. The spectra and products of
a block stay in the cache. With more images more products use a kernel's spectrum, and the cache
matters less.
"""

BLOCK_FREQUENCIES = 12
"""The smallest number of frequencies in a block: every block reads all weights again."""

BFLOAT16_SHARE = 0.88
"""The factor by which bfloat16 makes the Fourier domain cheaper relative to a direct convolution.
It was measured in steps of narrow networks on 128 images, before these kept their spectra.
"""


class Axis(NamedTuple):
    """One axis of a convolution with the same zero padding on both sides.

    Attributes:
        length: pixels of the image.
        kernel: taps of the kernel.
        stride, padding, dilation: as in `nn.Conv2d`.
    """

    length: int
    kernel: int
    stride: int
    padding: int
    dilation: int

    @property
    def extent(self) -> int:
        """The distance between the first and the last tap."""
        return self.dilation * (self.kernel - 1)

    @property
    def size(self) -> int:
        """Points of the full convolution's output, which is the grid of the transform."""
        return self.length + self.extent

    @property
    def strided_size(self) -> int:
        """Points of the strided grid."""
        return self.size // self.stride

    @property
    def output(self) -> int:
        """Points of the strided and cropped output."""
        return (self.size + 2 * self.padding - 2 * self.extent - 1) // self.stride + 1

    @property
    def crop(self) -> slice:
        """Which points of the full convolution's output are the layer's output."""
        margin = self.extent - self.padding
        return slice(margin, self.size - margin, self.stride)

    @property
    def supported(self) -> bool:
        """Whether a `Plan` can handle this axis."""
        # A padding beyond the kernel's reach needs a larger grid than the full convolution's, and
        # aliases fall on one another only where the stride divides the grid.
        return 0 <= self.padding <= self.extent and self.size % self.stride == 0 and self.output > 0


@dataclass(frozen=True, eq=False)
class Plan:
    """The matrices of one geometry, for one form of products, in one dtype on one device.

    A spectrum is `(g, B, 2, a_h * a_w * C)`: for each frequency g a matrix with a row for each
    image. The dimension of size 2 holds real and imaginary parts, and g runs over the half spectrum
    of the strided grid. The last dimension holds the channels of all aliases, so one product adds
    up channels and aliases. Channels are the innermost dimension from the images to the output: a
    transform along W is a matrix product for each row of each image, and one along H a matrix
    product for each image.

    The spectrum of a real image has `Z[-f] = conj(Z[f])`, so half of the columns is enough. The
    columns 0 and, of an even grid, `strided_size / 2` are their own opposites, so in them one half
    of the rows is the conjugate of the other. There only one half is computed, with multiplicity 2,
    and zeros take the place of the other. The result is the same, because the inverse DFT along W
    takes the real part of these columns, where the two halves add up.

    Attributes:
        rows, columns: the axes H and W.
        products: the form of the products with the kernels.
        dft_w: `(2 * g_w * a_w, W)`, the DFT of images along W.
        dft_h: `(2 * a_h * g_h, H * 2)`, the DFT of images along H.
        inverse_dft_h: `(H' * 2, 2 * g_h)`, the inverse DFT of outputs along H.
        inverse_dft_w: `(W', 2 * g_w)`, the inverse DFT of outputs along W, to real numbers.
        kernel_dft: `(k_h * k_w, 2, g, a_h * a_w)`, the DFT of kernels along both axes, times how
            often a frequency counts.
        filter_index: int64 `(g, a_h * a_w)`, where V has the frequencies, as indices of the
            flattened half spectrum of the full grid.
    """

    rows: Axis
    columns: Axis
    products: ComplexProducts
    dft_w: Tensor
    dft_h: Tensor
    inverse_dft_h: Tensor
    inverse_dft_w: Tensor
    kernel_dft: Tensor
    filter_index: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """`(S_h, S_w)`, the grid of the transform."""
        return self.rows.size, self.columns.size

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all matrices and products."""
        return self.dft_w.dtype

    @property
    def frequencies(self) -> int:
        """How many frequencies g are computed."""
        return len(self.filter_index)

    def spectrum(self, images: Tensor) -> Tensor:
        """The DFT of images, `(B, C, H, W)` -> `(g, B, 2, a_h * a_w * C)`."""
        return self._transform(images, self.dft_w, self.dft_h, self.rows.stride)

    def spectrum_adjoint(self, spectrum: Tensor) -> Tensor:
        """The adjoint of `spectrum`, `(g, B, 2, a_h * a_w * C)` -> `(B, C, H, W)`, channels
        last.
        """
        return self._transform_back(spectrum, self.rows.stride, self.dft_h.mT, self.dft_w.mT)

    def output(self, spectrum: Tensor) -> Tensor:
        """The cropped inverse DFT on the strided grid, `(g, B, 2, C)` -> `(B, C, H', W')`, channels
        last.
        """
        return self._transform_back(spectrum, 1, self.inverse_dft_h, self.inverse_dft_w)

    def output_adjoint(self, grad: Tensor) -> Tensor:
        """The adjoint of `output`, `(B, C, H', W')` -> `(g, B, 2, C)`."""
        return self._transform(grad, self.inverse_dft_w.mT, self.inverse_dft_h.mT, 1)

    def filter_factors(self, inverse_root: Tensor) -> Tensor:
        """V at the frequencies, `(C_out, S_h, S_w // 2 + 1)` -> `(C_out, g, a_h * a_w)`."""
        return inverse_root.to(self.dtype).flatten(1)[:, self.filter_index]

    def kernel_matrices(self, weight: Tensor, factors: Tensor, block: slice) -> Tensor:
        """The filtered DFT of kernels for a block of frequencies, as `products` takes it.

        Args:
            weight: `(C_out, C_in, k_h, k_w)`, in the plan's dtype.
            factors: from `filter_factors`.
            block: frequencies g.
        """
        matrix = self._filtered_dft(factors, block)
        spectrum = torch.bmm(matrix.mT, weight.flatten(2).mT)
        spectrum = spectrum.view(len(weight), 2, -1, factors.shape[2] * weight.shape[1])
        return self.products.matrices(spectrum)

    def add_kernel_gradient(
        self, total: Tensor, grads: Tensor, factors: Tensor, block: slice
    ) -> None:
        """Add the adjoint of the filtered DFT of kernels to `total`.

        Args:
            total: float32 or float64 `(C_out, k_h * k_w, C_in)`.
            grads: `(2, g, C_out, a_h * a_w * C_in)`, from `products`.
            factors: from `filter_factors`.
            block: frequencies g.
        """
        matrix = self._filtered_dft(factors, block)
        out_channels, _, in_channels = total.shape
        grads = grads.unflatten(3, (-1, in_channels)).permute(2, 0, 1, 3, 4)
        grads = grads.reshape(out_channels, -1, in_channels)
        if total.dtype == self.dtype:
            total.baddbmm_(matrix, grads)
        else:
            # bfloat16 is too coarse for a sum over many blocks.
            total += torch.bmm(matrix, grads)

    def _filtered_dft(self, factors: Tensor, block: slice) -> Tensor:
        """`kernel_dft` times V for a block of frequencies, `(C_out, k_h * k_w, 2 * g * a_h * a_w)`.

        This matrix is small, so the filter costs nothing.
        """
        return (self.kernel_dft[:, :, block] * factors[:, None, None, block]).flatten(2)

    def blocks(self, batch: int, in_channels: int, out_channels: int) -> list[slice]:
        """The frequencies g in blocks whose spectra fit into the cache."""
        aliases = self.rows.stride * self.columns.stride
        values_per_frequency = 2 * aliases * in_channels * out_channels
        bytes_per_frequency = values_per_frequency * self.dft_w.element_size()
        limit = max(BLOCK_FREQUENCIES, BLOCK_BYTES * batch // bytes_per_frequency)
        # As few blocks as the limit allows, all of about the same size. -(-a // b) rounds up.
        number = -(-self.frequencies // limit)
        size = -(-self.frequencies // number)
        # Two threads share an even number of products equally.
        size += size % 2
        return [slice(start, start + size) for start in range(0, self.frequencies, size)]

    def _transform(
        self, images: Tensor, along_w: Tensor, along_h: Tensor, aliases_h: int
    ) -> Tensor:
        """Multiply both axes of images `(B, C, H, W)` by a matrix, `(g, B, 2, a_h * n)`."""
        batch, channels, height, width = images.shape
        pixels = images.permute(0, 2, 3, 1).reshape(-1, width, channels)
        grid = left_multiply(along_h, left_multiply(along_w, pixels).view(batch, 2 * height, -1))
        return self._rows_of(grid, aliases_h)

    def _transform_back(
        self, spectrum: Tensor, aliases_h: int, along_h: Tensor, along_w: Tensor
    ) -> Tensor:
        """Multiply both axes of a spectrum `(g, B, 2, a_h * n)` by a matrix, `(B, C, H, W)`,
        channels last.
        """
        half = left_multiply(along_h, self._grid_of(spectrum, aliases_h))
        batch, rows, _ = half.shape
        # Each row of the images is made of two rows of `half`, real and imaginary part.
        half = half.view(batch * rows // 2, along_w.shape[1], -1)
        shape = (batch, half.shape[2], rows // 2, len(along_w))
        # Not a view of the product: what an autograd function returns must not be one, as the
        # caller may change it in place.
        images = torch.empty(
            shape, dtype=half.dtype, device=half.device, memory_format=torch.channels_last
        )
        pixels = images.permute(0, 2, 3, 1).flatten(0, 1)
        torch.bmm(along_w.expand(len(half), -1, -1), half, out=pixels)
        return images

    def _rows_of(self, grid: Tensor, aliases_h: int) -> Tensor:
        """The spectrum `(g, B, 2, a_h * n)` of a grid `(B, 2 * a_h * g_h, g_w * n)`, without the
        redundant frequencies.
        """
        batch = len(grid)
        grid = grid.view(batch, 2, aliases_h, *self._half_grid, -1)
        spectrum = grid.new_empty(self.frequencies, batch, 2, aliases_h, grid.shape[5])
        for part, part_of_grid in self._matching_parts(spectrum, grid):
            part.copy_(part_of_grid)
        return spectrum.flatten(3)

    def _grid_of(self, spectrum: Tensor, aliases_h: int) -> Tensor:
        """The grid `(B, 2 * a_h * g_h, g_w * n)` of a spectrum `(g, B, 2, a_h * n)`, with zeros in
        place of the redundant frequencies.
        """
        spectrum = spectrum.unflatten(3, (aliases_h, -1))
        grid = spectrum.new_empty(*spectrum.shape[1:4], *self._half_grid, spectrum.shape[4])
        whole_rows, between = _computed_region(self.rows, self.columns)
        grid[:, :, :, whole_rows:, : between.start] = 0
        grid[:, :, :, whole_rows:, between.stop :] = 0
        for part, part_of_grid in self._matching_parts(spectrum, grid):
            part_of_grid.copy_(part)
        return grid.flatten(4).flatten(1, 3)

    @property
    def _half_grid(self) -> tuple[int, int]:
        """Rows and columns of the strided grid's half spectrum."""
        return self.rows.strided_size, self.columns.strided_size // 2 + 1

    def _matching_parts(self, spectrum: Tensor, grid: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Views of a `spectrum` `(g, B, 2, a_h, n)`, each with the view of a `grid` `(B, 2, a_h,
        g_h, g_w, n)` that holds the same frequencies, both as `(g_h, g_w, B, 2, a_h, n)`.
        """
        whole_rows, between = _computed_region(self.rows, self.columns)
        grid = grid.permute(3, 4, 0, 1, 2, 5)
        of_grid = [grid[:whole_rows], grid[whole_rows:, between]]
        first = whole_rows * grid.shape[1]
        of_spectrum = [spectrum[:first], spectrum[first:]]
        return [
            (part.view(part_of_grid.shape), part_of_grid)
            for part, part_of_grid in zip(of_spectrum, of_grid, strict=True)
        ]


def plan_for_layer(layer: nn.Conv2d, input: Tensor) -> Plan | None:
    """The plan for a layer's forward pass; None where the Fourier domain is slower or the layer
    unsupported.
    """
    # This comes first: asking for the size of the batch would fix it in an exported network.
    if torch.compiler.is_compiling():
        return None
    if input.device.type != "cpu":
        return None
    if len(input) < FOURIER_BATCH or max(input.shape[-2:]) > FOURIER_SIZE:
        return None
    # A 1x1 kernel has a constant spectrum: there is nothing to transform.
    if layer.kernel_size == (1, 1) or layer.groups > 1:
        return None
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return None
    dtype = input.dtype
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    if dtype not in (torch.float32, torch.bfloat16):
        return None
    size = input.shape[-2:]
    axes = zip(size, layer.kernel_size, layer.stride, layer.padding, layer.dilation, strict=True)
    rows, columns = (Axis(*axis) for axis in axes)
    products = choose_products(len(input), layer.weight, dtype)
    cost = fourier_cost(rows, columns, layer, products)
    if dtype == torch.bfloat16:
        cost *= BFLOAT16_SHARE
    if direct_cost(rows, columns, layer) < cost:
        return None
    return plan_for(rows, columns, products, dtype, input.device)


def direct_cost(rows: Axis, columns: Axis, layer: nn.Conv2d) -> float:
    """Nanoseconds of a training step per image, for a direct convolution and `dft_filter`.

    Both costs count multiply-adds and values that are moved. Their constants are those of float32
    on two cores of an AMD EPYC (Zen 3). Nothing is measured at run time, so the same shapes go the
    same way on every machine and in every run.
    """
    grid = rows.size * columns.size
    taps = layer.kernel_size[0] * layer.kernel_size[1]
    convolution = taps * grid * layer.in_channels * layer.out_channels
    analysis = grid * (rows.size + columns.size)
    synthesis = columns.output * rows.size * (columns.size + rows.output)
    # A map is filtered in the forward and in the backward pass.
    of_map = 2 * ((analysis + synthesis) / 24 + 0.7 * grid + 400)
    # Convolution, and its gradients of images and kernels.
    return 3 * convolution / 40 + layer.out_channels * of_map


def fourier_cost(
    rows: Axis, columns: Axis, layer: nn.Conv2d, complex_products: ComplexProducts
) -> float:
    """Nanoseconds of a training step per image, for `fourier_convolution`."""
    # Products over fewer than 16 channels take as long as over 16.
    in_channels = max(layer.in_channels, 16)
    out_channels = max(layer.out_channels, 16)
    half = columns.size // 2 + 1
    strided_half = columns.strided_size // 2 + 1
    frequencies = rows.strided_size * strided_half
    aliases = rows.stride * columns.stride
    of_image = 2 * rows.length * half * (columns.length + 2 * rows.size)
    of_output = 2 * rows.output * strided_half * (columns.output + 2 * rows.strided_size)
    # The images are transformed in the forward pass and, where their spectrum is not kept, in the
    # backward pass, and their gradient once.
    of_images = 2 if layer.in_channels < NARROW else 3
    transforms = of_images * in_channels * of_image + 2 * out_channels * of_output
    products = 3 * 4 * frequencies * aliases * in_channels * out_channels
    values = 3 * 2 * frequencies * (aliases * in_channels + out_channels)
    return transforms / 22 + products / complex_products.rate + values


def plan_for(
    rows: Axis,
    columns: Axis,
    products: ComplexProducts,
    dtype: torch.dtype,
    device: torch.device,
) -> Plan | None:
    """The plan of a geometry; None for an unsupported one."""
    if not (rows.supported and columns.supported):
        return None
    # A default device of the caller's must not get into the cache.
    with torch.device("cpu"):
        return _make_plan(rows, columns, products, dtype, device)


@lru_cache(maxsize=128)
@torch.no_grad()
def _make_plan(
    rows: Axis,
    columns: Axis,
    products: ComplexProducts,
    dtype: torch.dtype,
    device: torch.device,
) -> Plan:
    strided_h = torch.arange(rows.strided_size)
    strided_w = torch.arange(columns.strided_size // 2 + 1)
    aliases_h = torch.arange(rows.stride) * rows.strided_size
    aliases_w = torch.arange(columns.stride) * columns.strided_size
    # The order is (a_h, g_h) along H and (g_w, a_w) along W, so that aliases of one g along W are
    # neighbors of the channels, and the copy that makes the spectrum moves them together.
    frequencies_h = (aliases_h[:, None] + strided_h).flatten()
    frequencies_w = (strided_w[:, None] + aliases_w).flatten()
    computed, multiplicity = _computed_frequencies(rows, columns)
    grid = (rows.stride, rows.strided_size * len(strided_w), columns.stride)

    def by_frequency(table: Tensor) -> Tensor:
        """`(..., f_h * f_w)` -> `(..., g, a_h * a_w)`."""
        return table.unflatten(-1, grid).transpose(-3, -2).flatten(-2)[..., computed, :]

    def convert(matrix: Tensor) -> Tensor:
        return matrix.to(device, dtype).contiguous()

    # Pixels are real, so along W the DFT makes a real and an imaginary part out of one number.
    # Along H both its input and its output are complex.
    cos_w, sin_w = dft(frequencies_w, torch.arange(columns.length), columns.size)
    cos_h, sin_h = dft(frequencies_h, torch.arange(rows.length), rows.size)
    # The inverse DFT divides by the points of the strided grid, and aliasing by the stride: that is
    # a division by the points of the full grid.
    inverse_cos_h, inverse_sin_h = (
        matrix.mT / rows.size
        for matrix in dft(strided_h, torch.arange(rows.output), rows.strided_size)
    )
    inverse_cos_w, inverse_sin_w = (
        matrix.mT * half_spectrum_weights(columns.strided_size) / columns.stride
        for matrix in dft(strided_w, torch.arange(columns.output), columns.strided_size)
    )
    dft_h = complex_product(cos_h, -sin_h).permute(0, 2, 3, 1)
    inverse_dft_h = complex_product(inverse_cos_h, inverse_sin_h).permute(2, 0, 1, 3)
    kernel_dft = _kernel_dft(rows, columns, frequencies_h, frequencies_w)
    filter_index = _half_spectrum_index(rows, columns, frequencies_h, frequencies_w)
    return Plan(
        rows,
        columns,
        products,
        dft_w=convert(torch.cat([cos_w, -sin_w])),
        dft_h=convert(dft_h.flatten(2).flatten(0, 1)),
        inverse_dft_h=convert(inverse_dft_h.flatten(2).flatten(0, 1)),
        inverse_dft_w=convert(torch.cat([inverse_cos_w, -inverse_sin_w], dim=1)),
        kernel_dft=convert(by_frequency(kernel_dft) * multiplicity),
        filter_index=by_frequency(filter_index).to(device),
    )


def _computed_region(rows: Axis, columns: Axis) -> tuple[int, slice]:
    """The number of rows of the strided grid's half spectrum in which all columns are computed, and
    the columns that are computed in the rows after them.
    """
    # Row -g is the conjugate of row g in the columns that are their own opposites: the first one
    # and, of an even grid, the last one. The opposites of all other columns are in the other half.
    return rows.strided_size // 2 + 1, slice(1, (columns.strided_size + 1) // 2)


def _computed_frequencies(rows: Axis, columns: Axis) -> tuple[Tensor, Tensor]:
    """The frequencies g that are computed, as indices of the flattened half spectrum of the strided
    grid, and how often each of them counts, `(g, 1)`.
    """
    whole_rows, between = _computed_region(rows, columns)
    indices = torch.arange(rows.strided_size * (columns.strided_size // 2 + 1))
    indices = indices.view(rows.strided_size, -1)
    multiplicity = torch.ones(indices.shape)
    # Each of these rows stands for its opposite, too, but only in the columns at the edges.
    multiplicity[1 : (rows.strided_size + 1) // 2] = 2
    multiplicity[:, between] = 1
    computed = torch.cat([indices[:whole_rows].flatten(), indices[whole_rows:, between].flatten()])
    return computed, multiplicity.flatten()[computed].unsqueeze(1)


def _kernel_dft(rows: Axis, columns: Axis, frequencies_h: Tensor, frequencies_w: Tensor) -> Tensor:
    """The DFT of kernels at all frequencies, `(k_h * k_w, 2, f_h * f_w)`."""

    def of_axis(axis: Axis, frequencies: Tensor) -> tuple[Tensor, Tensor]:
        # A shift of the taps by the padding moves the output to where the crop begins, so the
        # inverse DFT can leave out what is cropped.
        positions = torch.arange(axis.kernel) * axis.dilation - axis.padding
        return dft(frequencies, positions, axis.size)

    # exp(i (a + b)) = (cos a + i sin a) (cos b + i sin b), with a positive sign in the exponent,
    # because what torch calls a convolution is a correlation: its DFT is the kernel's conjugate.
    cos_h, sin_h = of_axis(rows, frequencies_h)
    cos_w, sin_w = of_axis(columns, frequencies_w)
    real = _outer(cos_h, cos_w) - _outer(sin_h, sin_w)
    imaginary = _outer(cos_h, sin_w) + _outer(sin_h, cos_w)
    return torch.stack([real, imaginary]).permute(2, 0, 1)


def _half_spectrum_index(
    rows: Axis, columns: Axis, frequencies_h: Tensor, frequencies_w: Tensor
) -> Tensor:
    """`Plan.filter_index` for all frequencies, `(f_h * f_w,)`."""
    row, column = torch.meshgrid(frequencies_h, frequencies_w, indexing="ij")
    # Beyond the half spectrum V is found at the opposite frequency: V is real, so it is the same.
    beyond = column > columns.size // 2
    row = torch.where(beyond, -row % rows.size, row)
    column = torch.where(beyond, columns.size - column, column)
    return (row * (columns.size // 2 + 1) + column).flatten()


def _outer(of_rows: Tensor, of_columns: Tensor) -> Tensor:
    """All products of `(f_h, k_h)` and `(f_w, k_w)`, `(f_h * f_w, k_h * k_w)`."""
    return (of_rows[:, None, :, None] * of_columns[None, :, None, :]).flatten(2).flatten(0, 1)
