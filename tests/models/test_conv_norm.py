"""ConvNorm2d against the original's numbers and against a dense oracle in numpy that shares no code
with it.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from models.layers.conv_norm.kernel_energy import inverse_root_energy, kernel_energy
from models.layers.conv_norm.layer import ConvNorm2d
from tiny_runs import read_arrays

GOLDEN = Path(__file__).parents[1] / "golden"
GOLDEN_CASES = json.loads((GOLDEN / "conv_norm_layer.json").read_text())


def pair(value):
    return value if isinstance(value, tuple) else (value, value)


def dense_inverse_root(weight, size, dilation):
    """1 / sqrt(sum_c |DFT of kernel|^2) on the whole spectrum, by explicit sums of exponentials."""
    dft = [
        np.exp(-2j * np.pi * np.outer(np.arange(s), np.arange(k) * d) / s)
        for s, k, d in zip(size, weight.shape[2:], dilation, strict=True)
    ]
    spectrum = np.einsum("fy,ocyx,gx->ocfg", dft[0], weight, dft[1])
    return (np.abs(spectrum) ** 2).sum(1) ** -0.5


def dense_filter(
    x, weight, bias, inverse_root, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1
):
    """Full correlation tap by tap, dense DFT matrices, product with a given V (on the whole
    spectrum), crop, stride.
    """
    extent = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    pad = [max(p, e) for p, e in zip(padding, extent, strict=True)]
    size = [n + 2 * p - e for n, p, e in zip(x.shape[2:], pad, extent, strict=True)]
    x = np.pad(x, ((0, 0), (0, 0), (pad[0], pad[0]), (pad[1], pad[1])))
    full = np.zeros((x.shape[0], weight.shape[0], *size)) + (
        0 if bias is None else bias[:, None, None]
    )
    per_group = weight.shape[0] // groups
    for o in range(weight.shape[0]):
        for c in range(weight.shape[1]):
            source = x[:, (o // per_group) * weight.shape[1] + c]
            for i, j in np.ndindex(*weight.shape[2:]):
                y0, x0 = i * dilation[0], j * dilation[1]
                full[:, o] += weight[o, c, i, j] * source[:, y0 : y0 + size[0], x0 : x0 + size[1]]
    dft = [np.exp(-2j * np.pi * np.outer(np.arange(s), np.arange(s)) / s) for s in size]
    spectrum = np.einsum("fy,boyx,gx->bofg", dft[0], full, dft[1]) * inverse_root
    filtered = np.einsum(
        "yf,bofg,xg->boyx", dft[0].conj() / size[0], spectrum, dft[1].conj() / size[1]
    ).real
    crop = [
        slice(p - q, s - p + q, t) for p, q, s, t in zip(pad, padding, size, stride, strict=True)
    ]
    return filtered[:, :, crop[0], crop[1]], size


@pytest.mark.parametrize("case", range(len(GOLDEN_CASES)))
def test_agrees_with_the_original(case):
    golden = read_arrays(GOLDEN / "conv_norm_layer.npz")
    arguments = {
        key: value for key, value in GOLDEN_CASES[case].items() if key not in ("size", "batch")
    }
    layer = ConvNorm2d(**arguments)
    init = f"case{case}/init/"
    layer.load_state_dict(
        {k.removeprefix(init): torch.from_numpy(golden[k]) for k in golden if k.startswith(init)}
    )

    def assert_close(actual, name, atol=0.0):
        expected = torch.from_numpy(golden[f"case{case}/{name}"])
        assert actual.shape == expected.shape
        assert (actual.detach() - expected).abs().max() <= 1e-4 * expected.abs().max() + atol, name

    for step in ("step0", "step1", "step2"):
        inputs = torch.from_numpy(golden[f"case{case}/{step}/input"]).requires_grad_()
        layer.zero_grad()
        output = layer(inputs)
        output.backward(torch.from_numpy(golden[f"case{case}/{step}/grad_output"]))
        assert_close(output, f"{step}/output")
        assert_close(inputs.grad, f"{step}/grad_input")
        assert_close(layer.weight.grad, f"{step}/grad_weight")
        assert_close(layer.running_V, f"{step}/running_V")
        if layer.affine:
            # With one tap per channel before a batch norm the true gradient is nearly 0, and the
            # computed one is rounding.
            assert_close(
                layer.bpconv.weight.grad,
                f"{step}/grad_bpconv_weight",
                atol=1e-4 if layer.kernel_size == (1, 1) else 0,
            )
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(golden[f"case{case}/{step}/weight_after"]))
    layer.eval()
    assert_close(layer(torch.from_numpy(golden[f"case{case}/eval/input"])), "eval/output")


GEOMETRIES = {
    "plain": ({"kernel_size": 3}, (7, 6)),
    "strided": ({"kernel_size": 3, "stride": 2, "padding": 1}, (8, 7)),
    "non-square, dilated, grouped, biased": (
        {
            "kernel_size": (3, 4),
            "stride": (1, 2),
            "padding": (0, 3),
            "dilation": (2, 1),
            "groups": 2,
            "bias": True,
        },
        (7, 9),
    ),
    "one-dimensional": ({"kernel_size": (1, 3), "padding": (2, 1)}, (5, 6)),
    "pointwise": ({"kernel_size": 1, "stride": (2, 1), "padding": 1, "bias": True}, (5, 6)),
    "padding beyond the kernel": (
        {"kernel_size": 3, "padding": (5, 2), "stride": 3, "bias": True},
        (4, 5),
    ),
    "autocorrelation wraps around": ({"kernel_size": 5, "padding": 2}, (2, 3)),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_agrees_with_dense_operators_in_value_and_gradient(name):
    arguments, image_size = GEOMETRIES[name]
    torch.manual_seed(0)
    layer = ConvNorm2d(4, 6, **arguments, affine=False, bn=False).double()
    inputs = torch.randn(2, 4, *image_size, dtype=torch.float64, requires_grad=True)
    output = layer(inputs)

    keywords = {
        key: pair(arguments.get(key, default))
        for key, default in (("stride", 1), ("padding", 0), ("dilation", 1))
    }
    keywords["groups"] = layer.groups
    weight, bias = (
        layer.weight.detach().numpy(),
        None if layer.bias is None else layer.bias.detach().numpy(),
    )
    x = inputs.detach().numpy()
    _, size = dense_filter(x, weight, bias, 1.0, **keywords)
    inverse_root = dense_inverse_root(weight, size, keywords["dilation"])
    expected, _ = dense_filter(x, weight, bias, inverse_root, **keywords)
    np.testing.assert_allclose(output.detach().numpy(), expected, rtol=1e-9, atol=1e-11)
    assert output.shape == nn.Conv2d(4, 6, **arguments).double()(inputs).shape
    half = inverse_root if name != "pointwise" else inverse_root[..., :1, :1]
    np.testing.assert_allclose(
        layer.running_V.numpy(), half[..., : half.shape[-1] // 2 + 1], rtol=1e-9
    )

    # With a constant V the layer is linear in its weight and in its input, so the gradient is the
    # adjoint of the oracle.
    cotangent = torch.randn_like(output)
    output.backward(cotangent)
    change = np.random.default_rng(0).standard_normal(weight.shape)
    along, _ = dense_filter(x, change, None, inverse_root, **keywords)
    np.testing.assert_allclose(
        (layer.weight.grad.numpy() * change).sum(), (cotangent.numpy() * along).sum(), rtol=1e-9
    )
    change = np.random.default_rng(1).standard_normal(x.shape)
    along, _ = dense_filter(change, weight, None, inverse_root, **keywords)
    np.testing.assert_allclose(
        (inputs.grad.numpy() * change).sum(), (cotangent.numpy() * along).sum(), rtol=1e-9
    )


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_other_padding_modes_pad_the_input_first(mode):
    torch.manual_seed(0)
    layer = ConvNorm2d(
        3, 4, (3, 2), padding=(1, 2), padding_mode=mode, affine=False, bn=False
    ).double()
    x = np.random.default_rng(0).standard_normal((2, 3, 6, 5))
    numpy_mode = {"circular": "wrap", "reflect": "reflect", "replicate": "edge"}[mode]
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (2, 2)), mode=numpy_mode)
    weight = layer.weight.detach().numpy()
    _, size = dense_filter(padded, weight, None, 1.0)
    expected, _ = dense_filter(padded, weight, None, dense_inverse_root(weight, size, (1, 1)))
    np.testing.assert_allclose(
        layer(torch.from_numpy(x)).detach().numpy(), expected, rtol=1e-9, atol=1e-11
    )


def test_string_padding():
    torch.manual_seed(0)
    x = torch.randn(1, 2, 6, 7, dtype=torch.float64)
    same, valid = (
        ConvNorm2d(2, 3, (5, 4), padding=p, dilation=(1, 2), affine=False, bn=False).double()
        for p in ("same", "valid")
    )
    valid.load_state_dict(same.state_dict())
    assert same(x).shape == (1, 3, 6, 7)
    # "same" pads (2, 2) rows and (3, 3) columns here, and what "valid" gives is its middle
    torch.testing.assert_close(valid(x), same(x)[:, :, 2:-2, 3:-3])
    odd = ConvNorm2d(2, 3, 2, padding="same", affine=False, bn=False).double()
    padded = ConvNorm2d(2, 3, 2, padding=1, affine=False, bn=False).double()
    padded.load_state_dict(odd.state_dict())
    # The odd pixel goes to the end, as in nn.Conv2d
    torch.testing.assert_close(odd(x), padded(x)[:, :, 1:, 1:])


def test_an_even_kernel_keeps_the_size_through_bpconv():
    assert ConvNorm2d(2, 3, (4, 3), padding=(2, 1))(torch.rand(2, 2, 6, 6)).shape == (2, 3, 7, 6)


def test_gradcheck():
    torch.manual_seed(0)
    layer = ConvNorm2d(2, 4, 3, stride=2, padding=1, groups=2, bias=True).double()
    x = torch.randn(2, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    layer(x)
    layer.eval()  # in training finite differences would also see V change
    parameters = dict(layer.named_parameters())

    def function(inputs, *values):
        return torch.func.functional_call(
            layer, dict(zip(parameters, values, strict=True)), (inputs,)
        )

    assert torch.autograd.gradcheck(function, (x, *parameters.values()))
    assert torch.autograd.gradgradcheck(function, (x, *parameters.values()))


def test_running_v_follows_the_ramp_down_or_the_momentum():
    torch.manual_seed(0)
    x = torch.rand(2, 2, 5, 5)
    for momentum, counter, factor in (
        (None, 19999, 0.5),
        (None, 9999, 0.5 + 0.125**0.5),
        (None, 50000, 0.01),
        (0.3, 0, 0.3),
    ):
        layer = ConvNorm2d(2, 3, 3, momentum=momentum)
        layer(x)
        before = layer.running_V.clone()
        with torch.no_grad():
            layer.weight.mul_(2)
        layer.num_batches_tracked.fill_(counter)
        layer(x)
        torch.testing.assert_close(layer.running_V, before * (1 - factor) + before / 2 * factor)
        assert layer.num_batches_tracked == counter + 1


def test_eval_takes_running_v_where_it_fits_and_the_weights_otherwise():
    torch.manual_seed(0)
    layer = ConvNorm2d(2, 3, 3, padding=1, affine=False, bn=False)
    x, other = torch.rand(2, 2, 6, 6), torch.rand(2, 2, 6, 9)
    untrained = layer.eval()(x)
    torch.testing.assert_close(layer.train()(x), untrained)
    layer.eval()
    layer.running_V.mul_(2)
    torch.testing.assert_close(layer(x), 2 * untrained)
    from_weights = ConvNorm2d(2, 3, 3, padding=1, affine=False, bn=False, track_running_stats=False)
    from_weights.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(other), from_weights.eval()(other))
    torch.testing.assert_close(from_weights(x), untrained)
    before = layer.running_V.clone()
    from_weights.train()(other)
    assert from_weights.num_batches_tracked == 1  # what it loaded
    torch.testing.assert_close(from_weights.running_V, before)


def test_a_new_input_size_restarts_running_v_in_the_same_tensor():
    layer = ConvNorm2d(2, 3, 3)
    buffer = layer.running_V
    for size in (5, 8, 5):
        layer(torch.rand(2, 2, size, size))
        assert layer.running_V is buffer
        assert buffer.shape == (3, size + 2, (size + 2) // 2 + 1)
        torch.testing.assert_close(
            buffer, inverse_root_energy(layer.weight, (size + 2, size + 2)).float()
        )


def test_the_next_update_does_not_change_the_v_of_an_earlier_pass():
    """Losses over several forward passes need it."""
    torch.manual_seed(0)
    # In float64 no conversion copies V.
    layer = ConvNorm2d(2, 3, 3, affine=False, bn=False).double()
    x = torch.rand(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    # The next pass then has to set running_V to its size again.
    layer(torch.rand(1, 2, 9, 9, dtype=torch.float64))
    loss = layer(x).square().sum()
    layer.running_V.mul_(5)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], expected)


@pytest.mark.parametrize("kernel", [1, 3])
def test_training_does_not_change_the_v_of_a_pass_in_evaluation(kernel):
    torch.manual_seed(0)
    layer = ConvNorm2d(2, 3, kernel, affine=False, bn=False)
    images = torch.rand(1, 2, 5, 5)
    layer(images)
    loss = layer.eval()(images).square().sum()
    (expected,) = torch.autograd.grad(loss, layer.weight, retain_graph=True)
    layer.train()(images)
    assert torch.equal(torch.autograd.grad(loss, layer.weight)[0], expected)


@pytest.mark.parametrize("zero", ["all-zero", "spectral zero"])
def test_vanishing_energy_stays_finite(zero):
    layer = ConvNorm2d(1, 2, (1, 2))
    with torch.no_grad():
        layer.weight.zero_()
        if zero == "spectral zero":
            layer.weight.copy_(torch.tensor([1.0, -1.0]).expand_as(layer.weight))
    x = torch.rand(2, 1, 4, 5, requires_grad=True)
    output = layer(x)
    output.square().sum().backward()
    assert all(
        tensor.isfinite().all()
        for tensor in (output, x.grad, layer.running_V, *(p.grad for p in layer.parameters()))
    )
    floor = 1e-12 if zero == "all-zero" else 2e-6
    energy = kernel_energy(layer.weight, (4, 6)).clamp_min(floor)
    torch.testing.assert_close(layer.running_V.double().pow(-2), energy, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_an_image_without_a_batch_dimension_is_an_error(kernel_size):
    message = r"^expected images \(B, C, H, W\), not the shape \(3, 8, 8\)$"
    with pytest.raises(ValueError, match=message):
        ConvNorm2d(3, 4, kernel_size)(torch.rand(3, 8, 8))


def test_an_input_smaller_than_the_kernel_is_an_error():
    with pytest.raises(ValueError, match=r"input \(2, 4\) .* kernel \(3, 3\)"):
        ConvNorm2d(1, 1, 3)(torch.rand(1, 1, 2, 4))
