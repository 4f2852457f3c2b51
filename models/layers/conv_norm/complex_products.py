"""Products of complex matrices, one for each frequency, in two forms. `choose_products` says which
form is for which layer.

A spectrum of images is `(g, B, 2, n)`, one of outputs `(g, B, 2, C_out)`, one of kernels `(C_out,
2, g, n)`. The dimension of size 2 holds real and imaginary parts, g is the frequency, and n are the
input channels of all aliases. See `fourier_plan` for the notation.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor


class ComplexProducts(ABC):
    """The product of images and kernels, and its two gradients.

    Attributes:
        rate: multiply-adds per nanosecond in float32, for the model of `fourier_plan.fourier_cost`.
    """

    rate: ClassVar[float]

    @abstractmethod
    def matrices(self, kernels: Tensor) -> Tensor:
        """A spectrum of kernels as the matrices that the products take."""

    @abstractmethod
    def output(self, images: Tensor, matrices: Tensor, result: Tensor) -> None:
        """Write `x k`, summed over n, into `result`, a spectrum of outputs."""

    @abstractmethod
    def image_gradient(self, grads: Tensor, matrices: Tensor, result: Tensor) -> None:
        """Write `G conj(k)` into `result`, a spectrum of images, where G is one of outputs."""

    @abstractmethod
    def kernel_gradient(self, grads: Tensor, images: Tensor) -> Tensor:
        """The sum of `conj(x) G` over images, `(2, g, C_out, n)`."""


class JoinedProducts(ComplexProducts):
    """One real product with the matrices `[[Re k, -Im k], [Im k, Re k]]`.

    These are copies of the kernels and twice as large, so this pays where the images are many.
    """

    rate = 24

    def matrices(self, kernels: Tensor) -> Tensor:
        """`(g, 2 * C_out, 2 * n)`."""
        out_channels, _, frequencies, channels = kernels.shape
        real, imaginary = kernels.permute(1, 2, 0, 3)
        matrices = kernels.new_empty(frequencies, 2, out_channels, 2, channels)
        matrices[:, 0, :, 0] = real
        torch.neg(imaginary, out=matrices[:, 0, :, 1])
        matrices[:, 1, :, 0] = imaginary
        matrices[:, 1, :, 1] = real
        return matrices.view(frequencies, 2 * out_channels, 2 * channels)

    def output(self, images: Tensor, matrices: Tensor, result: Tensor) -> None:
        torch.bmm(images.flatten(2), matrices.mT, out=result.flatten(2))

    def image_gradient(self, grads: Tensor, matrices: Tensor, result: Tensor) -> None:
        torch.bmm(grads.flatten(2), matrices, out=result.flatten(2))

    def kernel_gradient(self, grads: Tensor, images: Tensor) -> Tensor:
        product = torch.bmm(grads.flatten(2).mT, images.flatten(2))
        product = product.view(len(images), 2, grads.shape[-1], 2, images.shape[-1])
        # (2, 2, g, C_out, n), the part of G first, the part of x second
        parts = product.permute(1, 3, 0, 2, 4)
        result = product.new_empty(parts.shape[1:])
        torch.add(parts[0, 0], parts[1, 1], out=result[0])
        torch.sub(parts[1, 0], parts[0, 1], out=result[1])
        return result


class SplitProducts(ComplexProducts):
    """Products with the real and with the imaginary part of the kernels."""

    rate = 20

    def matrices(self, kernels: Tensor) -> Tensor:
        """`(2, g, C_out, n)`."""
        matrices = kernels.permute(1, 2, 0, 3)
        # Products in float32 read rows that are far apart where they are. oneDNN's in bfloat16
        # would copy them anyway, and transpose them on the way.
        if kernels.dtype == torch.bfloat16:
            return matrices.contiguous()
        return matrices

    def output(self, images: Tensor, matrices: Tensor, result: Tensor) -> None:
        # For z = x k with complex x and k, the rows of an image matrix are real and imaginary parts
        # of x. Products with the real and with the imaginary part of k give all four terms of z.
        by_real, by_imaginary = (
            torch.bmm(images.flatten(1, 2), part.mT).unflatten(1, (-1, 2)) for part in matrices
        )
        torch.sub(by_real[:, :, 0], by_imaginary[:, :, 1], out=result[:, :, 0])
        torch.add(by_real[:, :, 1], by_imaginary[:, :, 0], out=result[:, :, 1])

    def image_gradient(self, grads: Tensor, matrices: Tensor, result: Tensor) -> None:
        by_real, by_imaginary = (
            torch.bmm(grads.flatten(1, 2), part).unflatten(1, (-1, 2)) for part in matrices
        )
        torch.add(by_real[:, :, 0], by_imaginary[:, :, 1], out=result[:, :, 0])
        torch.sub(by_real[:, :, 1], by_imaginary[:, :, 0], out=result[:, :, 1])

    def kernel_gradient(self, grads: Tensor, images: Tensor) -> Tensor:
        result = grads.new_empty(2, len(grads), grads.shape[-1], images.shape[-1])
        # The real part of conj(x) G is Re x Re G + Im x Im G, one product over both parts, and its
        # imaginary part is Re x Im G - Im x Re G.
        torch.bmm(grads.flatten(1, 2).mT, images.flatten(1, 2), out=result[0])
        torch.bmm(grads[:, :, 1].mT, images[:, :, 0], out=result[1])
        result[1].baddbmm_(grads[:, :, 0].mT, images[:, :, 1], alpha=-1)
        return result


JOINED = JoinedProducts()
SPLIT = SplitProducts()


def choose_products(batch: int, weight: Tensor, dtype: torch.dtype) -> ComplexProducts:
    """The faster form on a CPU, for a layer's weight `(C_out, C_in, k_h, k_w)` and the dtype of the
    products.
    """
    # Joined matrices are larger, which costs little where the images are many. In bfloat16 every
    # product copies its operands anyway.
    images_per_channel = 1 if dtype == torch.bfloat16 else 2
    if batch >= images_per_channel * max(weight.shape[:2]):
        return JOINED
    return SPLIT
