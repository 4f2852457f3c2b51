"""The filter of ConvNorm, which multiplies every frequency of a signal by a real number."""

from typing import Any

import torch
from torch import Tensor


def spectral_filter(signal: Tensor, inverse_root: Tensor) -> Tensor:
    """`IDFT(V . DFT(signal))`, where V is real and takes no gradient.

    Args:
        signal: `(..., S_h, S_w)`.
        inverse_root: V on the half spectrum, `(..., S_h, S_w // 2 + 1)`.

    Returns:
        The shape of `signal`, in float32 (float64 for a float64 signal).
    """
    # torch has no FFT for bfloat16.
    if signal.dtype != torch.float64:
        signal = signal.float()
    return _SpectralFilter.apply(signal, inverse_root.to(signal.dtype))


class _SpectralFilter(torch.autograd.Function):
    # A filter with a real spectrum is its own adjoint, so the backward pass is the forward pass on
    # the gradient. PyTorch's own gradient of a half-spectrum transform would run a complex
    # transform of the whole spectrum instead.

    @staticmethod
    def forward(signal: Tensor, inverse_root: Tensor) -> Tensor:
        # V is real: scaling real and imaginary parts takes half the work of a complex product.
        spectrum = torch.view_as_real(torch.fft.rfft2(signal)) * inverse_root.unsqueeze(-1)
        return torch.fft.irfft2(torch.view_as_complex(spectrum), s=signal.shape[-2:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        _, inverse_root = inputs
        ctx.save_for_backward(inverse_root)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (inverse_root,) = ctx.saved_tensors
        return _SpectralFilter.apply(grad, inverse_root), None
