"""The filter as products with DFT matrices against the one with FFTs."""

import pytest
import torch

from models.layers.conv_norm import dft_filter as module
from models.layers.conv_norm.dft_filter import dft_filter, dft_filter_is_faster
from models.layers.conv_norm.layer import ConvNorm2d
from models.layers.conv_norm.spectral_filter import spectral_filter

WHOLE = slice(0, None)
GEOMETRIES = {
    "whole": ((6, 6), WHOLE, WHOLE),
    "crop": ((10, 10), slice(1, 9), slice(1, 9)),
    "odd sizes": ((7, 9), slice(2, 6), slice(1, 8)),
    "one axis even": ((8, 5), slice(0, 7), slice(1, 5)),
    "strides that do not divide the grid": ((11, 10), slice(1, 10, 2), slice(0, 9, 3)),
    "one row": ((1, 8), WHOLE, slice(3, 4)),
    "two columns": ((5, 2), slice(1, 4), WHOLE),
}


def signal_and_factors(size):
    torch.manual_seed(0)
    signal = torch.randn(3, 4, *size, dtype=torch.float64)
    inverse_root = 0.5 + torch.rand(4, size[0], size[1] // 2 + 1, dtype=torch.float64)
    # V belongs to a real kernel: in the columns that are their own opposites, opposite rows agree.
    opposite = -torch.arange(size[0]) % size[0]
    for column in {0, size[1] // 2} if size[1] % 2 == 0 else {0}:
        inverse_root[:, :, column] += inverse_root[:, opposite, column]
    return signal, inverse_root


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_agrees_with_ffts(name, memory_format):
    size, rows, columns = GEOMETRIES[name]
    signal, inverse_root = signal_and_factors(size)
    signal = signal.contiguous(memory_format=memory_format).requires_grad_()
    expected = spectral_filter(signal, inverse_root, rows, columns)
    output = dft_filter(signal, inverse_root, rows, columns)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    assert output.is_contiguous(memory_format=memory_format)
    seen = torch.randn_like(expected)
    (right,) = torch.autograd.grad(expected, signal, seen)
    (gradient,) = torch.autograd.grad(output, signal, seen)
    torch.testing.assert_close(gradient, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (3, 2), (1, 4)])
def test_small_maps_and_empty_batches(size):
    signal, inverse_root = signal_and_factors(size)
    for images in (signal, signal[:1]):
        expected = spectral_filter(images, inverse_root, WHOLE, WHOLE)
        output = dft_filter(images, inverse_root, WHOLE, WHOLE)
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    assert dft_filter(signal[:0], inverse_root, WHOLE, WHOLE).shape == (0, *signal.shape[1:])


@pytest.fixture
def one_thread():
    """Several threads divide a product by its number of images, which changes its rounding."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_filtered_in_blocks_have_the_same_bits(dtype, monkeypatch, one_thread):
    signal, inverse_root = signal_and_factors((7, 8))
    signal = signal.to(dtype).requires_grad_()
    seen = torch.randn(3, 4, 5, 8).to(dtype)

    def one_step():
        output = dft_filter(signal, inverse_root, slice(1, 6), WHOLE)
        return output, *torch.autograd.grad(output, signal, seen)

    at_once = one_step()
    for images_per_block in (1, 2):
        monkeypatch.setattr(module, "BLOCK_BYTES", images_per_block * signal[0].nbytes)
        for in_blocks, expected in zip(one_step(), at_once, strict=True):
            assert torch.equal(in_blocks, expected)


def test_a_default_device_does_not_get_into_the_caches():
    layer = ConvNorm2d(4, 4, 3, padding=1, bn=False)
    images = torch.randn(16, 4, 13, 11)
    with torch.device("meta"):
        first = layer(images)
    torch.testing.assert_close(layer(images), first, rtol=0, atol=0)


def test_first_and_second_derivatives():
    signal, inverse_root = signal_and_factors((6, 5))
    signal.requires_grad_()

    def function(x):
        return dft_filter(x, inverse_root, slice(1, 5), slice(0, 4, 2)).pow(2)

    assert torch.autograd.gradcheck(function, signal)
    assert torch.autograd.gradgradcheck(function, signal)


LAYERS = {
    "plain": {"padding": 1},
    "stride": {"padding": 1, "stride": 2},
    "stride beside the grid": {"padding": 1, "stride": 3, "bias": True},
    "dilation": {"padding": 2, "dilation": 2},
    "groups": {"padding": 1, "groups": 2},
    "no padding": {},
    "same": {"padding": "same"},
    "wide padding": {"padding": 4},
    "circular": {"padding": 1, "padding_mode": "circular"},
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_agrees_with_its_plain_steps_in_float64(name, monkeypatch):
    torch.manual_seed(0)
    layer = ConvNorm2d(4, 6, 3, affine=False, bn=False, **LAYERS[name]).double()
    images = torch.randn(2, 4, 9, 8, dtype=torch.float64, requires_grad=True)

    def one_step():
        output = layer(images)
        seen = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)
        return output, *torch.autograd.grad(output, (images, layer.weight), seen)

    plain = one_step()
    used = []

    def use(signal):
        used.append(signal.shape)
        return True

    monkeypatch.setattr("models.layers.conv_norm.layer.dft_filter_is_faster", use)
    for actual, expected in zip(one_step(), plain, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert used


def test_large_maps_and_float64_take_ffts():
    assert dft_filter_is_faster(torch.empty(1, 1, 34, 34))
    assert dft_filter_is_faster(torch.empty(1, 1, 34, 34, dtype=torch.bfloat16))
    assert not dft_filter_is_faster(torch.empty(1, 1, 34, 34, dtype=torch.float64))
    assert not dft_filter_is_faster(torch.empty(1, 1, 34, 34, device="meta"))
    assert not dft_filter_is_faster(torch.empty(1, 1, 2, module.FILTER_SIZE + 1))


@pytest.mark.parametrize("smooth", [False, True])
def test_in_bfloat16_the_filter_adds_little_to_the_rounding_of_the_convolution(smooth, monkeypatch):
    torch.manual_seed(0)
    layer = ConvNorm2d(16, 16, 3, padding=1, affine=False, bn=False)
    # Nearly equal taps, as trained kernels have them: small energies at high frequencies
    if smooth:
        layer.weight.data = 0.2 * layer.weight.data + 0.05 * torch.randn(16, 16, 1, 1)
    images = torch.rand(16, 16, 32, 32)
    exact = layer(images).detach()

    def error():
        with torch.autocast("cpu", torch.bfloat16):
            output = layer(images)
        assert output.dtype == torch.bfloat16
        return float((output.detach().float() - exact).norm() / exact.norm())

    fast = error()
    monkeypatch.setattr("models.layers.conv_norm.layer.dft_filter_is_faster", lambda _: False)
    plain = error()
    print(f"bfloat16: {fast:.4f}, with a filter in float32 {plain:.4f}")
    assert plain < fast < 1.5 * plain + 0.005
