"""A convolution with a filter behind it, computed in the Fourier domain by products with small DFT
matrices.

What `ConvNorm2d` computes, `z <- IDFT(V . DFT(w * x))`, cropped and strided, takes for each
frequency one product of the spectra of images and kernels. There are half as many frequencies as
pixels, a complex product is four real ones, and a 3x3 kernel has nine taps: the products are a
quarter of a convolution's, and the filter, a factor of the kernels' spectra, is free. On a CPU the
transforms are matrix products, too: sizes such as 34 = 2 x 17 are slow for an FFT and small for a
matrix, and products along either axis leave the channels innermost, so that nothing has to be
rearranged in between. Strides need only the frequencies that remain: those that fall together
("alias") are added up before the inverse transform."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .fourier_plan import Plan
from .precision import without_autocast

Plain = Callable[[Tensor, Tensor], Tensor]


def fourier_convolution(
    images: Tensor, weight: Tensor, inverse_root: Tensor, plan: Plan, plain: Plain
) -> Tensor:
    """`IDFT(V . DFT(w * x))` with zero padding, cropped and strided; in the type of the plan's
    matrices.

    In bfloat16, which is what autocast makes of a convolution, results are off by 0.6 % of their
    norm for random kernels and by 0.8 to 2 % for smooth ones, 64 to 512 channels. A convolution in
    bfloat16 with a filter in float32 behind it is off by 0.3 % and by 2 to 7 %: V raises the small
    frequencies of smooth kernels together with the rounding of the large ones.

    Args:
        images: `(B, C_in, H, W)`, for which `plan` was made; any memory format.
        weight: `(C_out, C_in, k_h, k_w)`.
        inverse_root: V, `(C_out, S_h, S_w // 2 + 1)`, a constant for the gradient.
        plan: from `plan_for`.
        plain: `(images, weight) -> ` the same result by other means; second derivatives go through
            it.

    Returns:
        `(B, C_out, H', W')`, channels last.
    """
    return _FourierConvolution.apply(images, weight, plan.factors(inverse_root), plan, plain)


class _FourierConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, images: Tensor, weight: Tensor, factors: Tensor, plan: Plan, plain: Plain
    ) -> Tensor:
        ctx.save_for_backward(images, weight, factors)
        ctx.plan, ctx.plain = plan, plain
        with without_autocast(images):
            spectrum, weight = plan.spectrum(images.to(plan.dtype)), weight.to(plan.dtype)
            result = spectrum.new_empty(len(images), 2, plan.frequencies, len(weight))
            for block in plan.blocks(len(images), images.shape[1], len(weight)):
                seen = [
                    _matrices(spectrum[:, :, alias, block].flatten(0, 1))
                    for alias in range(plan.rows.stride)
                ]
                kernels = plan.kernels(weight, factors, block)
                products = []
                for part in (0, 1):
                    product = torch.bmm(seen[0], _matrices(kernels[:, part, 0]).mT)
                    for alias in range(1, plan.rows.stride):
                        product.baddbmm_(seen[alias], _matrices(kernels[:, part, alias]).mT)
                    products.append(product.unflatten(1, (len(images), 2)).permute(2, 1, 0, 3))
                # parts of the kernels, each by parts of the images, (B, g, C_out)
                real, imaginary = products
                torch.sub(real[0], imaginary[1], out=result[:, 0, block])
                torch.add(real[1], imaginary[0], out=result[:, 1, block])
            return plan.output(result)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        images, weight, factors = ctx.saved_tensors
        wants_images, wants_weight = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():  # a second derivative will be asked for
            wanted = [
                tensor
                for tensor, needed in zip((images, weight), ctx.needs_input_grad, strict=False)
                if needed
            ]
            found = iter(
                torch.autograd.grad(ctx.plain(images, weight), wanted, grad, create_graph=True)
            )
            return (
                next(found) if wants_images else None,
                next(found) if wants_weight else None,
                None,
                None,
                None,
            )
        plan = ctx.plan
        with without_autocast(images):
            grads = plan.output_adjoint(grad.to(plan.dtype))
            grad_weight = (
                _grad_of_weight(grads, images.to(plan.dtype), weight, factors, plan)
                if wants_weight
                else None
            )
            grad_images = (
                _grad_of_images(grads, weight, factors, plan).to(images.dtype)
                if wants_images
                else None
            )
        return grad_images, grad_weight, None, None, None


def _grad_of_weight(
    grads: Tensor, images: Tensor, weight: Tensor, factors: Tensor, plan: Plan
) -> Tensor:
    """From the gradient of results `(B, 2, g, C_out)`."""
    spectrum = plan.spectrum(images)
    total = weight.new_zeros(len(weight), weight[0, 0].numel(), weight.shape[1])
    for block in plan.blocks(len(images), images.shape[1], len(weight)):
        both = _matrices(grads[:, :, block].flatten(0, 1)).mT
        real, imaginary = (_matrices(grads[:, part, block]).mT for part in (0, 1))
        of_kernels = grads.new_empty(2, plan.rows.stride, *both.shape[:2], spectrum.shape[-1])
        for alias, (of_real, of_imaginary) in enumerate(zip(*of_kernels, strict=True)):
            seen = spectrum[:, :, alias, block]
            torch.bmm(both, _matrices(seen.flatten(0, 1)), out=of_real)
            torch.bmm(imaginary, _matrices(seen[:, 0]), out=of_imaginary)
            of_imaginary.baddbmm_(real, _matrices(seen[:, 1]), alpha=-1)
        plan.add_kernels_adjoint(total, of_kernels, factors, block)
    return total.mT.unflatten(2, weight.shape[2:])


def _grad_of_images(grads: Tensor, weight: Tensor, factors: Tensor, plan: Plan) -> Tensor:
    """From the gradient of results `(B, 2, g, C_out)`."""
    weight = weight.to(plan.dtype)
    batch, aliases, channels = len(grads), plan.rows.stride, weight.shape[1]
    spectrum = grads.new_empty(batch, 2, aliases, plan.frequencies, plan.columns.stride * channels)
    for block in plan.blocks(batch, channels, len(weight)):
        kernels = plan.kernels(weight, factors, block)
        seen = _matrices(grads[:, :, block].flatten(0, 1))
        for alias in range(aliases):
            products = [torch.bmm(seen, _matrices(kernels[:, part, alias])) for part in (0, 1)]
            # parts of the kernels, each by parts of the gradient, (B, g, a_w * C_in)
            real, imaginary = (
                product.unflatten(1, (batch, 2)).permute(2, 1, 0, 3) for product in products
            )
            torch.add(real[0], imaginary[1], out=spectrum[:, 0, alias, block])
            torch.sub(real[1], imaginary[0], out=spectrum[:, 1, alias, block])
    return plan.spectrum_adjoint(spectrum)


def _matrices(rows: Tensor) -> Tensor:
    """`(m, g, n)` -> a matrix for each frequency, `(g, m, n)`. Products in float32 read rows that
    are far apart where they are; oneDNN's in bfloat16 would copy them, and transpose them on the
    way."""
    matrices = rows.transpose(0, 1)
    return matrices.contiguous() if rows.dtype == torch.bfloat16 else matrices
