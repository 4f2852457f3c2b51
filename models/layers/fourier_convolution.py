"""A convolution with a filter behind it, computed in the Fourier domain by products with small DFT matrices.

What `ConvNorm2d` computes, `z <- IDFT(V . DFT(w * x))`, cropped and strided, takes for each frequency one product of the
spectra of images and kernels. There are half as many frequencies as pixels, a complex product is four real ones, and a 3x3
kernel has nine taps: the products are a quarter of a convolution's, and the filter is free. On a CPU the transforms are matrix
products, too: sizes such as 34 = 2 x 17 are slow for an FFT and small for a matrix, and matrices lay out each spectrum as the
next product needs it, frequency by frequency. Strides need only the frequencies that remain: those that fall together ("alias")
are added up before the inverse transform.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from models.layers.fourier_plan import Plan
from models.layers.precision import without_autocast

Plain = Callable[[Tensor, Tensor], Tensor]


def fourier_convolution(images: Tensor, weight: Tensor, inverse_root: Tensor, plan: Plan, plain: Plain) -> Tensor:
    """`IDFT(V . DFT(w * x))` with zero padding, cropped and strided; in the type of the plan's matrices.

    In bfloat16, which is what autocast makes of a convolution, results are off by 0.6 % of their norm, whatever the kernels. A
    convolution in bfloat16 with a filter in float32 behind it is off by 0.3 % for random kernels and by 1.4 % for smooth ones,
    whose small frequencies V raises together with the rounding of the large ones.

    Args:
        images: `(B, C_in, H, W)`, for which `plan` was made; any memory format.
        weight: `(C_out, C_in, k_h, k_w)`.
        inverse_root: V, `(C_out, S_h, S_w // 2 + 1)`, a constant for the gradient.
        plan: from `plan_for`.
        plain: `(images, weight) -> ` the same result by other means; second derivatives go through it.

    Returns:
        `(B, C_out, H', W')`, channels last.
    """
    return _FourierConvolution.apply(images, weight, plan.filter(inverse_root), plan, plain)


class _FourierConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, factors: Tensor, plan: Plan, plain: Plain) -> Tensor:
        ctx.save_for_backward(images, weight, factors)
        ctx.plan, ctx.plain = plan, plain
        with without_autocast(images):
            spectrum = plan.spectrum(images.to(plan.dtype))
            result = spectrum.new_empty(spectrum.shape[1], 2 * len(images), len(weight))
            for block in plan.blocks(weight, len(images)):
                real, imaginary = plan.kernels(weight[block].to(plan.dtype))
                for alias, planes in enumerate(spectrum):
                    product = torch.bmm(planes[:, 1:].flatten(1, 2), real[alias].mT)
                    product.baddbmm_(planes[:, :2].flatten(1, 2), imaginary[alias].mT)
                    if alias == 0:
                        torch.mul(product, factors[alias, ..., block], out=result[..., block])
                    else:
                        result[..., block].addcmul_(product, factors[alias, ..., block])
            return plan.output(result.unflatten(1, (2, len(images))))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        images, weight, factors = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative will be asked for
            wanted = [tensor for tensor, needed in zip((images, weight), ctx.needs_input_grad, strict=False) if needed]
            found = iter(torch.autograd.grad(ctx.plain(images, weight), wanted, grad, create_graph=True))
            return *(next(found) if needed else None for needed in ctx.needs_input_grad[:2]), None, None, None
        plan, (wants_images, wants_weight) = ctx.plan, ctx.needs_input_grad[:2]
        with without_autocast(images):
            grads = plan.output_adjoint(grad.to(plan.dtype))
            spectrum = plan.spectrum(images.to(plan.dtype)) if wants_weight else None
            grad_images = grads.new_zeros(len(factors), len(grads), 2 * len(images), images.shape[1]) if wants_images else None
            grad_weight = torch.empty_like(weight) if wants_weight else None
            for block in plan.blocks(weight, len(images)):
                kernels = plan.kernels(weight[block].to(plan.dtype))
                of_kernels = torch.empty_like(kernels, memory_format=torch.contiguous_format) if wants_weight else None
                for alias, factor in enumerate(factors):
                    planes = grads[..., block] * factor[..., block].unsqueeze(1)
                    first, second = planes[:, :2].flatten(1, 2), planes[:, 1:].flatten(1, 2)
                    if wants_images:
                        grad_images[alias].baddbmm_(first, kernels[0, alias]).baddbmm_(second, kernels[1, alias])
                    if wants_weight:
                        seen = spectrum[alias, :, 1:].flatten(1, 2)
                        torch.bmm(first.mT, seen, out=of_kernels[0, alias])
                        torch.bmm(second.mT, seen, out=of_kernels[1, alias])
                if wants_weight:
                    grad_weight[block] = plan.kernels_adjoint(of_kernels)
            if wants_images:
                grad_images = plan.spectrum_adjoint(grad_images.unflatten(2, (2, len(images)))).to(images.dtype)
        return grad_images, grad_weight, None, None, None
