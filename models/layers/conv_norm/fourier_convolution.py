"""ConvNorm's full convolution, filter and crop in one, as products with small DFT matrices.

`z = IDFT(V . DFT(w * x))`, cropped and strided, takes for each frequency one product of the spectra
of images and kernels. There are half as many frequencies as pixels, a complex product is four real
ones, and a 3x3 kernel has nine taps: the products are a quarter of a convolution's. The filter is a
factor of the kernels' spectra and costs nothing. On a CPU the transforms are matrix products, too:
sizes such as 34 = 2 x 17 are slow for an FFT and small for a matrix, and products along either axis
leave the channels innermost, so nothing has to be rearranged in between. One copy then collects the
matrix of each frequency. A strided layer adds up frequencies that are aliases of one another before
the inverse transform. See `fourier_plan` for the notation.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .fourier_plan import Plan
from .precision import without_autocast
from .recomputation import NARROW
from .spectral_filter import spectral_filter


def fourier_convolution(
    images: Tensor, weight: Tensor, bias: Tensor | None, inverse_root: Tensor, plan: Plan
) -> Tensor:
    """`IDFT(V . DFT(w * x + bias))` with zero padding, cropped and strided.

    Autocast makes this bfloat16, as any convolution. For 64 to 512 channels, results are then off
    by 0.6 % of their norm for random kernels and by 0.8 to 2 % for smooth ones. A convolution in
    bfloat16 with a filter in float32 behind it is off by 0.3 % and by 2 to 7 %: V raises the small
    frequencies of smooth kernels together with the rounding of the large ones.

    Args:
        images: `(B, C_in, H, W)`, for which `plan` was made; any memory format.
        weight: `(C_out, C_in, k_h, k_w)`.
        bias: `(C_out,)`, or None.
        inverse_root: V, `(C_out, S_h, S_w // 2 + 1)`, a constant for the gradient.
        plan: from `plan_for_layer`.

    Returns:
        `(B, C_out, H', W')`, channels last, in the plan's dtype.
    """
    output = _FourierConvolution.apply(images, weight, inverse_root, plan)
    if bias is None:
        return output
    # A constant has only the frequency 0, so the filter multiplies it by V there.
    return output + (bias * inverse_root[:, 0, 0]).to(output.dtype).reshape(-1, 1, 1)


class _FourierConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, images: Tensor, weight: Tensor, inverse_root: Tensor, plan: Plan
    ) -> Tensor:
        factors = plan.filter_factors(inverse_root)
        ctx.plan = plan
        # An attribute, because in evaluation V is a buffer that a later training step may change in
        # place. For a saved tensor autograd would report that, although the usual backward pass
        # takes only `factors`.
        ctx.inverse_root = inverse_root
        with without_autocast(images):
            spectrum = plan.spectrum(images.to(plan.dtype))
            result = _products(spectrum, weight.to(plan.dtype), factors, plan)
            # Only narrow layers keep the spectrum for the backward pass: it takes more memory than
            # the images. Others free it before they make the output.
            if weight.shape[1] >= NARROW or not ctx.needs_input_grad[1]:
                spectrum = None
            ctx.save_for_backward(images, weight, factors, spectrum)
            return plan.output(result)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        images, weight, factors, spectrum = ctx.saved_tensors
        plan = ctx.plan
        needs_images, needs_weight, *_ = ctx.needs_input_grad
        # Gradients are enabled here only where the caller asked for create_graph.
        if torch.is_grad_enabled():
            return (*_differentiable_backward(ctx, grad), None, None)
        grad_images = None
        grad_weight = None
        with without_autocast(images):
            grads = plan.output_adjoint(grad.to(plan.dtype))
            if needs_weight:
                if spectrum is None:
                    spectrum = plan.spectrum(images.to(plan.dtype))
                grad_weight = _weight_gradient(grads, spectrum, weight, factors, plan)
                del spectrum
            if needs_images:
                result = _image_gradient(grads, weight.to(plan.dtype), factors, plan)
                del grads
                grad_images = plan.spectrum_adjoint(result).to(images.dtype)
        return grad_images, grad_weight, None, None


def _differentiable_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of images and weight that can be differentiated once more."""
    images, weight, *_ = ctx.saved_tensors
    needs_images, needs_weight, *_ = ctx.needs_input_grad
    # The same function made of operations that torch can differentiate twice.
    output = _by_convolution(images, weight, ctx.inverse_root, ctx.plan)
    inputs = []
    if needs_images:
        inputs.append(images)
    if needs_weight:
        inputs.append(weight)
    grads = list(torch.autograd.grad(output, inputs, grad, create_graph=True))
    grad_images = grads.pop(0) if needs_images else None
    grad_weight = grads.pop(0) if needs_weight else None
    return grad_images, grad_weight


def _by_convolution(images: Tensor, weight: Tensor, inverse_root: Tensor, plan: Plan) -> Tensor:
    rows, columns = plan.rows, plan.columns
    padding = (rows.extent, columns.extent)
    full = F.conv2d(images, weight, None, 1, padding, (rows.dilation, columns.dilation))
    return spectral_filter(full, inverse_root, rows.crop, columns.crop)


def _products(spectrum: Tensor, weight: Tensor, factors: Tensor, plan: Plan) -> Tensor:
    """The output's spectrum `(g, B, 2, C_out)`, from the images'."""
    batch = spectrum.shape[1]
    result = spectrum.new_empty(plan.frequencies, batch, 2, len(weight))
    for block in plan.blocks(batch, weight.shape[1], len(weight)):
        matrices = plan.kernel_matrices(weight, factors, block)
        plan.products.output(spectrum[block], matrices, result[block])
    return result


def _weight_gradient(
    grads: Tensor, spectrum: Tensor, weight: Tensor, factors: Tensor, plan: Plan
) -> Tensor:
    """The gradient of the weight, from the gradient `(g, B, 2, C_out)` of the output's spectrum and
    the images' spectrum.
    """
    # In the weight's precision, whatever the plan's is: the sum runs over many frequencies.
    total = weight.new_zeros(len(weight), weight[0, 0].numel(), weight.shape[1])
    for block in plan.blocks(spectrum.shape[1], weight.shape[1], len(weight)):
        kernel_grads = plan.products.kernel_gradient(grads[block], spectrum[block])
        plan.add_kernel_gradient(total, kernel_grads, factors, block)
    return total.mT.unflatten(2, weight.shape[2:])


def _image_gradient(grads: Tensor, weight: Tensor, factors: Tensor, plan: Plan) -> Tensor:
    """The gradient of the images' spectrum, from the gradient `(g, B, 2, C_out)` of the
    output's.
    """
    batch, channels = grads.shape[1], weight.shape[1]
    aliases = plan.rows.stride * plan.columns.stride
    spectrum = grads.new_empty(plan.frequencies, batch, 2, aliases * channels)
    for block in plan.blocks(batch, channels, len(weight)):
        matrices = plan.kernel_matrices(weight, factors, block)
        plan.products.image_gradient(grads[block], matrices, spectrum[block])
    return spectrum
