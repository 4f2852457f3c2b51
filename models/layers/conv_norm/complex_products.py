"""Products of complex matrices, one for each frequency, in two forms. `choose_products` says which
form is for which layer.

A spectrum of images is `(B, 2, a, g, n)`, one of kernels `(C_out, 2, a, g, n)`, one of outputs `(B,
2, g, C_out)`. The dimension of size 2 holds real and imaginary parts, g is the frequency, a the
alias along H, and n the alias along W times the input channels. See `fourier_plan` for the
notation.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class ComplexProducts(ABC):
    """The product of images and kernels, and its two gradients."""

    @abstractmethod
    def output(self, images: Tensor, kernels: Tensor, result: Tensor) -> None:
        """Write the sum of `x k` over aliases into `result`, a spectrum of outputs."""

    @abstractmethod
    def image_gradient(self, grads: Tensor, kernels: Tensor, result: Tensor) -> None:
        """Write `G conj(k)` into `result`, a spectrum of images, where G is one of outputs."""

    @abstractmethod
    def kernel_gradient(self, grads: Tensor, images: Tensor) -> Tensor:
        """The sum of `conj(x) G` over images, `(2, a, g, C_out, n)`."""


def choose_products(batch: int, weight: Tensor, dtype: torch.dtype) -> ComplexProducts:
    """The faster form on a CPU, for a layer's weight `(C_out, C_in, k_h, k_w)` and the dtype of the
    products.
    """
    # In bfloat16 every product copies its operands. Joined kernels are twice as large, which costs
    # little where there are more images than channels.
    if dtype == torch.bfloat16 and batch >= max(weight.shape[:2]):
        return JoinedProducts()
    return SplitProducts()


class JoinedProducts(ComplexProducts):
    """One real product with the matrices `[[Re k, -Im k], [Im k, Re k]]`.

    Both operands are copied, so this pays where the kernels are small next to the images.
    """

    def output(self, images: Tensor, kernels: Tensor, result: Tensor) -> None:
        product = torch.bmm(_rows(images), _joined(kernels).mT)
        # (g, B, 2 * C_out) -> (B, 2, g, C_out)
        result.copy_(product.unflatten(2, (2, -1)).permute(1, 2, 0, 3))

    def image_gradient(self, grads: Tensor, kernels: Tensor, result: Tensor) -> None:
        product = torch.bmm(_rows(grads.unsqueeze(2)), _joined(kernels))
        # (g, B, 2 * a * n) -> (B, 2, a, g, n)
        result.copy_(product.unflatten(2, (2, result.shape[2], -1)).permute(1, 2, 3, 0, 4))

    def kernel_gradient(self, grads: Tensor, images: Tensor) -> Tensor:
        product = torch.bmm(_rows(grads.unsqueeze(2)).mT, _rows(images))
        frequencies, aliases, channels = product.shape[0], images.shape[2], images.shape[-1]
        out_channels = grads.shape[-1]
        product = product.view(frequencies, 2, out_channels, 2, aliases, channels)
        # (2, 2, a, g, C_out, n), the part of G first, the part of x second
        parts = product.permute(1, 3, 4, 0, 2, 5)
        result = grads.new_empty(2, aliases, frequencies, out_channels, channels)
        torch.add(parts[0, 0], parts[1, 1], out=result[0])
        torch.sub(parts[1, 0], parts[0, 1], out=result[1])
        return result


def _rows(spectrum: Tensor) -> Tensor:
    """`(B, 2, a, g, n)` -> `(g, B, 2 * a * n)`."""
    return spectrum.permute(3, 0, 1, 2, 4).flatten(2)


def _joined(kernels: Tensor) -> Tensor:
    """`(C_out, 2, a, g, n)` -> `(g, 2 * C_out, 2 * a * n)`."""
    out_channels, _, aliases, frequencies, channels = kernels.shape
    real, imaginary = kernels.permute(1, 3, 0, 2, 4)
    matrices = kernels.new_empty(frequencies, 2, out_channels, 2, aliases, channels)
    matrices[:, 0, :, 0] = real
    torch.neg(imaginary, out=matrices[:, 0, :, 1])
    matrices[:, 1, :, 0] = imaginary
    matrices[:, 1, :, 1] = real
    return matrices.view(frequencies, 2 * out_channels, -1)


class SplitProducts(ComplexProducts):
    """Products with the real and with the imaginary part of the kernels, which are not copied."""

    def output(self, images: Tensor, kernels: Tensor, result: Tensor) -> None:
        batch, aliases = len(images), images.shape[2]
        image_matrices = [
            _matrix_per_frequency(images[:, :, alias].flatten(0, 1)) for alias in range(aliases)
        ]
        # For z = x k with complex x and k, the rows of an image matrix are real and imaginary parts
        # of x. Products with the real and with the imaginary part of k give all four terms of z.
        products = []
        for part in (0, 1):
            product = torch.bmm(image_matrices[0], _matrix_per_frequency(kernels[:, part, 0]).mT)
            for alias in range(1, aliases):
                kernel_matrices = _matrix_per_frequency(kernels[:, part, alias])
                product.baddbmm_(image_matrices[alias], kernel_matrices.mT)
            products.append(product.unflatten(1, (batch, 2)).permute(2, 1, 0, 3))
        # The first index is the part of the image, and each of them is (B, g, C_out).
        by_real_kernel, by_imaginary_kernel = products
        torch.sub(by_real_kernel[0], by_imaginary_kernel[1], out=result[:, 0])
        torch.add(by_real_kernel[1], by_imaginary_kernel[0], out=result[:, 1])

    def image_gradient(self, grads: Tensor, kernels: Tensor, result: Tensor) -> None:
        batch, aliases = len(grads), kernels.shape[2]
        grad_matrices = _matrix_per_frequency(grads.flatten(0, 1))
        for alias in range(aliases):
            by_real_kernel, by_imaginary_kernel = (
                torch.bmm(grad_matrices, _matrix_per_frequency(kernels[:, part, alias]))
                .unflatten(1, (batch, 2))
                .permute(2, 1, 0, 3)
                for part in (0, 1)
            )
            torch.add(by_real_kernel[0], by_imaginary_kernel[1], out=result[:, 0, alias])
            torch.sub(by_real_kernel[1], by_imaginary_kernel[0], out=result[:, 1, alias])

    def kernel_gradient(self, grads: Tensor, images: Tensor) -> Tensor:
        both = _matrix_per_frequency(grads.flatten(0, 1)).mT
        real, imaginary = (_matrix_per_frequency(grads[:, part]).mT for part in (0, 1))
        result = grads.new_empty(2, images.shape[2], *both.shape[:2], images.shape[-1])
        for alias, (grad_real, grad_imaginary) in enumerate(zip(*result, strict=True)):
            spectrum = images[:, :, alias]
            # The real part of conj(x) G is Re x Re G + Im x Im G, one product over both parts, and
            # its imaginary part is Re x Im G - Im x Re G.
            torch.bmm(both, _matrix_per_frequency(spectrum.flatten(0, 1)), out=grad_real)
            torch.bmm(imaginary, _matrix_per_frequency(spectrum[:, 0]), out=grad_imaginary)
            grad_imaginary.baddbmm_(real, _matrix_per_frequency(spectrum[:, 1]), alpha=-1)
        return result


def _matrix_per_frequency(rows: Tensor) -> Tensor:
    """`(m, g, n)` -> `(g, m, n)`."""
    matrices = rows.transpose(0, 1)
    # Products in float32 read rows that are far apart where they are. oneDNN's in bfloat16 would
    # copy them anyway, and transpose them on the way.
    if rows.dtype == torch.bfloat16:
        return matrices.contiguous()
    return matrices
