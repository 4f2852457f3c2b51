"""The filter of ConvNorm with its crop, by FFT."""

from typing import Any

import torch
from torch import Tensor


def spectral_filter(signal: Tensor, inverse_root: Tensor, rows: slice, columns: slice) -> Tensor:
    """`IDFT(V . DFT(signal))[..., rows, columns]`, where V is real and takes no gradient.

    Args:
        signal: `(..., S_h, S_w)`. The transforms run in float32 at least.
        inverse_root: V on the half spectrum, `(..., S_h, S_w // 2 + 1)`.
        rows, columns: what is kept of the result.

    Returns:
        `(..., H', W')`, in the dtype of `signal`.
    """
    height, width = signal.shape[-2:]
    # torch has no FFT for bfloat16.
    dtype = torch.promote_types(signal.dtype, torch.float32)
    # V is small: dividing it by the number of points spares the inverse transform a pass over its
    # whole output.
    factors = (inverse_root / (height * width)).to(dtype)
    return _FilterAndCrop.apply(signal, factors, rows, columns)


class _FilterAndCrop(torch.autograd.Function):
    # A filter with a real spectrum is its own adjoint. PyTorch's own gradient of a half-spectrum
    # transform would run a complex transform of the whole spectrum instead.

    @staticmethod
    def forward(signal: Tensor, factors: Tensor, rows: slice, columns: slice) -> Tensor:
        filtered = _filter(signal.to(factors.dtype), factors)
        # A copy: a view would keep the whole map alive, and could not be changed in place.
        return filtered[..., rows, columns].to(signal.dtype, copy=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        signal, factors, rows, columns = inputs
        ctx.save_for_backward(factors)
        ctx.size = signal.shape[-2:]
        ctx.crop = (rows, columns)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (factors,) = ctx.saved_tensors
        return _EmbedAndFilter.apply(grad, factors, ctx.size, *ctx.crop), None, None, None


class _EmbedAndFilter(torch.autograd.Function):
    """The adjoint of `_FilterAndCrop`: zeros where the crop has left something out, then the
    filter.
    """

    @staticmethod
    def forward(
        kept: Tensor, factors: Tensor, size: tuple[int, int], rows: slice, columns: slice
    ) -> Tensor:
        signal = factors.new_zeros((*kept.shape[:-2], *size))
        signal[..., rows, columns] = kept
        return _cast(_filter(signal, factors), kept.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, factors, _, rows, columns = inputs
        ctx.save_for_backward(factors)
        ctx.crop = (rows, columns)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (factors,) = ctx.saved_tensors
        return _FilterAndCrop.apply(grad, factors, *ctx.crop), None, None, None, None


def _filter(signal: Tensor, factors: Tensor) -> Tensor:
    """`IDFT(factors . DFT(signal))` without the inverse transform's division by the number of
    points.
    """
    # MKL has no FFT for an empty batch. Asking for the size would fix it in an exported network.
    if not torch.compiler.is_compiling() and signal.numel() == 0:
        return signal
    # The factors are real: scaling real and imaginary parts takes half the work of a complex
    # product.
    spectrum = torch.view_as_real(torch.fft.rfft2(signal)) * factors.unsqueeze(-1)
    return torch.fft.irfft2(torch.view_as_complex(spectrum), s=signal.shape[-2:], norm="forward")


def _cast(result: Tensor, dtype: torch.dtype) -> Tensor:
    """`result.to(dtype)`, for the last line of an autograd function."""
    # torch 2.11 compiles a function that ends in a cast to the same dtype without its gradient.
    if result.dtype == dtype:
        return result
    return result.to(dtype)
