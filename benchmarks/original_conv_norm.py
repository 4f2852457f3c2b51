"""ConvNorm with the algorithm of its authors' code: a plain reference for timings and tests."""

from math import cos, pi

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import ConvNorm2d
from models.layers.conv_norm.layer import MIN_FACTOR, RAMPDOWN_STEPS


class OriginalConvNorm(nn.Module):
    """The original's algorithm on the parameters of a `ConvNorm2d`, for odd square kernels and zero
    padding.

    Every forward pass in training transforms all `C_out x C_in` kernels, padded with zeros to the
    size of the full convolution, and sums their squared magnitudes over the inputs: `V = 1 /
    sqrt(sum_c |w^_c|^2)`, a constant for the gradient. The full convolution has stride 1 whatever
    the layer's stride. Its output is transformed, multiplied by V, transformed back and cropped,
    and every `stride`-th row and column is kept. A depthwise affine convolution and a batch
    normalization follow.

    A 1x1 kernel has the same energy at every frequency, so V is one number per channel, and nothing
    is transformed. The energy has no floor, and the gradient of the transforms is torch's own.

    Args:
        layer: the layer whose weight, `bpconv` and `batch_norm` are used; they stay the same
            objects.
    """

    running_V: Tensor  # noqa: N815 - the original's name

    def __init__(self, layer: ConvNorm2d) -> None:
        super().__init__()
        self.weight = layer.weight
        self.bias = layer.bias
        self.bpconv = layer.bpconv
        self.batch_norm = layer.batch_norm if layer.bn else nn.Identity()
        self.stride = layer.stride[0]
        self.padding = layer.padding[0]
        self.extent = layer.kernel_size[0] - 1
        self.steps = 0
        self.register_buffer("running_V", torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        """`(B, C_in, H, W)` -> `(B, C_out, H', W')`, with H' and W' as in `nn.Conv2d`."""
        full = F.conv2d(images, self.weight, self.bias, padding=self.extent)
        height, width = full.shape[-2:]
        if self.extent == 0:
            filtered = full * self._inverse_root(1, 1)
        else:
            filtered = self._filtered(_at_least_float32(full))
        first = self.extent - self.padding
        cropped = filtered[:, :, first : height - first, first : width - first]
        return self.batch_norm(self.bpconv(cropped[:, :, :: self.stride, :: self.stride]))

    def _filtered(self, full: Tensor) -> Tensor:
        size = (full.shape[-2], full.shape[-1])
        return torch.fft.irfft2(torch.fft.rfft2(full) * self._inverse_root(*size), s=size)

    @torch.no_grad()
    def _inverse_root(self, height: int, width: int) -> Tensor:
        if not self.training and self.running_V.dim() == 3:
            return self.running_V
        transformed = torch.fft.rfft2(_at_least_float32(self.weight), s=(height, width))
        inverse_root = torch.view_as_real(transformed).square().sum(dim=-1).sum(dim=1).rsqrt()
        if self.training:
            self.steps += 1
            progress = min(self.steps, RAMPDOWN_STEPS) / RAMPDOWN_STEPS
            factor = max(0.5 * (cos(pi * progress) + 1), MIN_FACTOR)
            self.running_V = factor * inverse_root + (1 - factor) * self.running_V
        return inverse_root


def use_original_conv_norm(model: nn.Module) -> nn.Module:
    """Replace every `ConvNorm2d` of a network by an `OriginalConvNorm` on the same parameters, in
    place.
    """
    for name, child in model.named_children():
        if isinstance(child, nn.Conv2d) and hasattr(child, "running_V"):
            setattr(model, name, OriginalConvNorm(child).train(child.training))
        else:
            use_original_conv_norm(child)
    return model


def _at_least_float32(tensor: Tensor) -> Tensor:
    # torch has no FFT for bfloat16.
    return tensor if tensor.dtype == torch.float64 else tensor.float()
