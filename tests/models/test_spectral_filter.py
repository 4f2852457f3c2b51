"""The filter and crop by FFT, one function with its own gradient, against its definition."""

import pytest
import torch

from models.layers.conv_norm.spectral_filter import spectral_filter

CROPS = {
    "whole": ((6, 6), slice(0, None), slice(0, None)),
    "crop": ((10, 7), slice(1, 9), slice(1, 6)),
    "stride": ((9, 8), slice(2, 9, 2), slice(0, 7, 3)),
}


def case(name):
    size, rows, columns = CROPS[name]
    torch.manual_seed(0)
    # V of a real kernel, so that the filter is real.
    kernel = torch.randn(4, *size, dtype=torch.float64)
    inverse_root = torch.fft.rfft2(kernel).abs().clamp_min(0.1).rsqrt()
    signal = torch.randn(3, 4, *size, dtype=torch.float64, requires_grad=True)
    return signal, inverse_root, rows, columns


def by_definition(signal, inverse_root, rows, columns):
    spectrum = torch.fft.rfft2(signal) * inverse_root
    return torch.fft.irfft2(spectrum, s=signal.shape[-2:])[..., rows, columns]


@pytest.mark.parametrize("name", CROPS)
def test_value_and_gradient_are_those_of_the_definition(name):
    signal, *others = case(name)
    expected = by_definition(signal, *others)
    output = spectral_filter(signal, *others)
    scale = expected.abs().max()
    assert (output - expected).abs().max() < 2e-15 * scale
    seen = torch.randn_like(output)
    (right,) = torch.autograd.grad(expected, signal, seen)
    (gradient,) = torch.autograd.grad(output, signal, seen)
    assert (gradient - right).abs().max() < 2e-15 * right.abs().max()


def test_an_empty_batch_has_an_empty_result_and_gradient():
    """MKL's FFT refuses it."""
    signal, *others = case("crop")
    empty = signal[:0].detach().requires_grad_()
    output = spectral_filter(empty, *others)
    output.sum().backward()
    assert output.shape == (0, 4, 8, 5)
    assert empty.grad.shape == empty.shape


@pytest.mark.parametrize("name", CROPS)
def test_first_and_second_derivatives(name):
    signal, *others = case(name)
    signal = signal[:1, :4].detach().requires_grad_()

    def function(x):
        return spectral_filter(x, *others).pow(2)

    assert torch.autograd.gradcheck(function, signal)
    assert torch.autograd.gradgradcheck(function, signal)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_result_and_gradient_have_the_dtype_of_the_signal(dtype):
    signal, *others = case("crop")
    low = signal.detach().to(dtype).requires_grad_()
    output = spectral_filter(low, *others)
    output.sum().backward()
    assert output.dtype == low.grad.dtype == dtype
    # The transforms themselves do not run in low precision: only the result is rounded.
    expected = by_definition(low.detach().double(), *others)
    error = (output.double() - expected).abs().max()
    assert error < 2 * torch.finfo(dtype).eps * expected.abs().max()


def test_no_pass_over_the_whole_output_but_the_transforms():
    """One pass each for crop and cast, and none for the division by the number of points."""
    signal, *others = case("crop")
    with torch.profiler.profile(acc_events=True) as profile:
        spectral_filter(signal.detach().bfloat16(), *others)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["aten::div"] == 1, "of V only"
    assert "aten::slice_backward" not in counts
