"""The Fourier engine of ConvNorm2d against its plain steps, which float64 always takes, and the
choice between the engine and a direct convolution.
"""

import copy

import pytest
import torch

from models.layers.conv_norm import fourier_convolution as fourier_module
from models.layers.conv_norm import fourier_plan
from models.layers.conv_norm.complex_products import (
    JOINED,
    SPLIT,
    choose_products,
)
from models.layers.conv_norm.fourier_convolution import fourier_convolution
from models.layers.conv_norm.fourier_plan import FOURIER_BATCH, Axis, plan_for, plan_for_layer
from models.layers.conv_norm.kernel_energy import inverse_root_energy
from models.layers.conv_norm.layer import ConvNorm2d
from models.layers.conv_norm.recomputation import NARROW

GEOMETRIES = {
    "plain": {"size": (9, 9), "kernel_size": (3, 3), "padding": (1, 1)},
    "stride": {"size": (8, 10), "kernel_size": (3, 3), "padding": (1, 1), "stride": (2, 2)},
    "one axis strides": {
        "size": (8, 7),
        "kernel_size": (3, 3),
        "padding": (1, 1),
        "stride": (2, 1),
    },
    "stride 3, no padding": {"size": (10, 13), "kernel_size": (3, 3), "stride": (3, 3)},
    "5 taps and 1": {"size": (7, 6), "kernel_size": (5, 1), "padding": (2, 0)},
    "even kernel": {"size": (7, 8), "kernel_size": (2, 4), "padding": (0, 3)},
    "dilation": {
        "size": (8, 8),
        "kernel_size": (3, 3),
        "padding": (2, 2),
        "dilation": (2, 2),
        "stride": (2, 2),
    },
    "all the padding there is": {"size": (4, 4), "kernel_size": (3, 3), "padding": (2, 2)},
}


@pytest.fixture(autouse=True)
def fourier_domain_for_any_channels(request, monkeypatch):
    """Layers of these tests have few channels, to be quick."""
    if "by_cost" not in request.fixturenames:
        monkeypatch.setattr(fourier_plan, "direct_cost", lambda *_: float("inf"))


@pytest.fixture
def by_cost():
    """A test that asks for this sees the real choice."""


def layer_and_plan(size, products=JOINED, **arguments):
    layer = ConvNorm2d(3, 5, affine=False, bn=False, **arguments).double()
    axes = zip(size, layer.kernel_size, layer.stride, layer.padding, layer.dilation, strict=True)
    axes = (Axis(*axis) for axis in axes)
    return layer, plan_for(*axes, products, torch.float64, torch.device("cpu"))


@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("products", [JOINED, SPLIT])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_agrees_with_convolution_and_filter(name, products, narrow, monkeypatch):
    monkeypatch.setattr(fourier_module, "NARROW", 4 if narrow else 3)
    torch.manual_seed(0)
    layer, plan = layer_and_plan(**GEOMETRIES[name], products=products)
    images = torch.randn(4, 3, *GEOMETRIES[name]["size"], dtype=torch.float64, requires_grad=True)
    expected = layer(images)
    seen = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, (images, layer.weight), seen)
    inverse_root = inverse_root_energy(layer.weight, plan.size, layer.dilation)
    output = fourier_convolution(images, layer.weight, None, inverse_root, plan)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    for actual, right in zip(
        torch.autograd.grad(output, (images, layer.weight), seen), gradients, strict=True
    ):
        torch.testing.assert_close(actual, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("channels", "frozen", "kept"),
    [(NARROW - 1, False, True), (NARROW, False, False), (NARROW - 1, True, False)],
)
def test_a_narrow_layer_keeps_the_spectrum_of_its_images(channels, frozen, kept):
    """Unless it is frozen: its weights then need no gradient."""
    layer = ConvNorm2d(channels, 4, 3, padding=1, affine=False, bn=False)
    layer.weight.requires_grad_(not frozen)
    output = layer(torch.rand(FOURIER_BATCH, channels, 6, 6, requires_grad=True))
    *_, spectrum = output.grad_fn.saved_tensors
    assert (spectrum is not None) == kept


def test_an_unsupported_geometry_has_no_plan():
    # More padding than the kernel reaches
    assert layer_and_plan((8, 8), kernel_size=3, padding=3)[1] is None
    # 9 is not a multiple of 2
    assert layer_and_plan((7, 8), kernel_size=3, padding=1, stride=2)[1] is None
    assert layer_and_plan((2, 8), kernel_size=3)[1] is None  # no output


@pytest.mark.parametrize("stride", [1, 2])
def test_a_whole_layer_is_the_same_with_and_without_the_engine(monkeypatch, stride):
    """In blocks of four frequencies, the last of them of two or one, with bias and depthwise
    convolution.
    """
    monkeypatch.setattr(fourier_plan, "BLOCK_BYTES", 1)
    monkeypatch.setattr(fourier_plan, "BLOCK_FREQUENCIES", 4)
    torch.manual_seed(0)
    layer = ConvNorm2d(4, 7, 3, stride=stride, padding=1, bias=True, bn=False)
    twin = copy.deepcopy(layer)
    images = torch.randn(FOURIER_BATCH, 4, 8, 8)

    def one_step(layer):
        mine = images.clone().requires_grad_()
        output = layer(mine)
        (
            output.sin() * torch.linspace(-1, 1, output[0].numel()).reshape(output.shape[1:])
        ).sum().backward()
        buffers = {
            name: buffer for name, buffer in layer.named_buffers() if buffer.is_floating_point()
        }
        return {
            "output": output,
            "images": mine.grad,
            **{n: p.grad for n, p in layer.named_parameters()},
            **buffers,
        }

    fast = one_step(layer)
    monkeypatch.setattr(fourier_plan, "FOURIER_BATCH", FOURIER_BATCH + 1)
    plain = one_step(twin)
    for name, value in plain.items():
        torch.testing.assert_close(
            fast[name],
            value,
            rtol=2e-4,
            atol=2e-5 * float(value.detach().abs().max()),
            msg=lambda m, n=name: n + m,
        )
    assert not torch.equal(fast["output"], plain["output"])  # they were computed differently


def test_small_batches_and_large_images_do_not_use_the_engine():
    layer = ConvNorm2d(3, 4, 3, padding=1)
    images = torch.zeros(FOURIER_BATCH, 3, 8, 8)
    assert plan_for_layer(layer, images) is not None
    assert plan_for_layer(layer, images[1:]) is None
    assert plan_for_layer(layer, images.double()) is None
    assert plan_for_layer(layer, torch.zeros(FOURIER_BATCH, 3, 64, 8)) is None
    assert plan_for_layer(ConvNorm2d(3, 4, 3, padding=1, padding_mode="circular"), images) is None
    assert plan_for_layer(ConvNorm2d(3, 4, 3, padding="same"), images) is None
    assert plan_for_layer(ConvNorm2d(3, 3, 3, groups=3), images) is None


def test_an_attack_gets_its_gradient_without_those_of_the_weights(monkeypatch):
    layer = ConvNorm2d(3, 4, 3, padding=1, bn=False).eval().requires_grad_(False)
    images = torch.rand(FOURIER_BATCH, 3, 8, 8, requires_grad=True)
    (fast,) = torch.autograd.grad(layer(images).square().sum(), images)
    monkeypatch.setattr(fourier_plan, "FOURIER_BATCH", FOURIER_BATCH + 1)
    (plain,) = torch.autograd.grad(layer(images).square().sum(), images)
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)


def test_second_derivatives(monkeypatch):
    """Penalties on gradients need them."""
    torch.manual_seed(0)
    layer = ConvNorm2d(3, 4, 3, stride=2, padding=1, affine=False, bn=False)
    images = torch.rand(FOURIER_BATCH, 3, 8, 8, requires_grad=True)

    def of_penalty():
        (gradient,) = torch.autograd.grad(layer(images).pow(3).sum(), images, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), (images, layer.weight))

    fast = of_penalty()
    monkeypatch.setattr(fourier_plan, "FOURIER_BATCH", FOURIER_BATCH + 1)
    for actual, expected in zip(fast, of_penalty(), strict=True):
        torch.testing.assert_close(
            actual, expected, rtol=1e-3, atol=1e-4 * float(expected.detach().abs().max())
        )


@pytest.mark.parametrize("smooth", [False, True])
def test_bfloat16_is_off_by_less_than_a_hundredth(smooth, monkeypatch):
    torch.manual_seed(0)
    layer = ConvNorm2d(32, 32, 3, padding=1, affine=False, bn=False)
    # Nearly equal taps, as trained kernels have them: small energies at high frequencies
    if smooth:
        layer.weight.data = 0.2 * layer.weight.data + 0.05 * torch.randn(32, 32, 1, 1)
    images = torch.rand(FOURIER_BATCH, 32, 8, 8)
    exact = copy.deepcopy(layer).double()(images.double())

    def error():
        with torch.autocast("cpu", torch.bfloat16):
            output = layer(images)
        assert output.dtype == torch.bfloat16
        return float((output.detach().double() - exact.detach()).norm() / exact.detach().norm())

    fast = error()
    monkeypatch.setattr(fourier_plan, "FOURIER_BATCH", FOURIER_BATCH + 1)
    assert fast < 0.01
    if smooth:
        assert fast < 0.7 * error()


def test_gradients_of_kernels_add_up_in_float32_under_bfloat16(monkeypatch):
    """A sum over many blocks is as exact as one over a single block. In bfloat16 it would be
    coarser with every block.
    """
    torch.manual_seed(0)
    layer = ConvNorm2d(8, 8, 3, padding=1, affine=False, bn=False)
    images = torch.rand(FOURIER_BATCH, 8, 20, 20)
    seen = torch.randn(FOURIER_BATCH, 8, 20, 20)
    twin = copy.deepcopy(layer).double()
    (exact,) = torch.autograd.grad(twin(images.double()), twin.weight, seen.double())

    def error(frequencies):
        monkeypatch.setattr(fourier_plan, "BLOCK_BYTES", 1)
        monkeypatch.setattr(fourier_plan, "BLOCK_FREQUENCIES", frequencies)
        with torch.autocast("cpu", torch.bfloat16):
            output = layer(images)
        (gradient,) = torch.autograd.grad(output, layer.weight, seen.to(output.dtype))
        return float((gradient.double() - exact).norm() / exact.norm())

    assert error(2) < 1.2 * error(1000)


CHOICES = {
    # in_channels, out_channels, image size, stride -> whether the Fourier domain is cheaper for 128
    # images in float32 and in bfloat16
    "WRN-16-1, first layer": (3, 16, 32, 1, False, False),
    "WRN-16-1, block 1": (16, 16, 32, 1, False, False),
    "simpleCNN, second stage": (8, 16, 16, 1, False, False),
    "WRN-16-1, stride": (16, 32, 32, 2, True, True),
    "WRN-16-2, block 1": (32, 32, 32, 1, True, True),
    "ResNet-18, first stage": (64, 64, 32, 1, True, True),
    "ResNet-18, last stage": (512, 512, 4, 1, True, True),
}


@pytest.mark.parametrize("name", CHOICES)
def test_the_choice_follows_the_cost_of_a_geometry(name, by_cost):
    in_channels, out_channels, size, stride, in_float32, in_bfloat16 = CHOICES[name]
    layer = ConvNorm2d(in_channels, out_channels, 3, stride=stride, padding=1)
    images = torch.empty(1).expand(128, in_channels, size, size)
    assert (plan_for_layer(layer, images) is not None) == in_float32
    assert (plan_for_layer(layer, images.bfloat16()) is not None) == in_bfloat16


def test_with_few_images_products_weigh_more(by_cost):
    layer = ConvNorm2d(32, 32, 3, padding=1)
    assert plan_for_layer(layer, torch.empty(63, 32, 32, 32)) is None
    assert plan_for_layer(layer, torch.empty(64, 32, 32, 32)) is not None


def test_kernels_are_joined_where_there_are_enough_images():
    weight = torch.empty(64, 32, 3, 3)
    for other in (weight, weight.transpose(0, 1)):
        assert choose_products(64, other, torch.bfloat16) is JOINED
        assert choose_products(63, other, torch.bfloat16) is SPLIT
        assert choose_products(128, other, torch.float32) is JOINED
        assert choose_products(127, other, torch.float32) is SPLIT
    layer = ConvNorm2d(32, 64, 3, padding=1)
    images = torch.empty(1).expand(128, 32, 8, 8)
    assert plan_for_layer(layer, images).products is JOINED
    assert plan_for_layer(layer, images[1:]).products is SPLIT
