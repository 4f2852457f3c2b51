"""Spectral norm, ONI, OWN and OCNN against the original's numbers and against numpy's singular
value decomposition.
"""

import copy
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from models.layers import ConvNorm2d, ONIConv2d, OWNConv2d, SpectralNormConv2d
from models.layers.oni import EPSILON
from models.layers.own import whiten_rows
from models.ocnn import conv_orthogonality, matrix_orthogonality, penalty
from tiny_runs import read_arrays

GOLDEN = read_arrays(Path(__file__).parents[1] / "golden" / "orthogonal_layers.npz")


def golden(name):
    return torch.from_numpy(GOLDEN[name])


def centered(weight, groups):
    rows = weight.detach().double().numpy().reshape(groups, weight.shape[0] // groups, -1)
    return rows - rows.mean(-1, keepdims=True)


def test_oni_and_own_agree_with_the_original():
    for name, layer in (
        ("oni", ONIConv2d(8, 16, 3, padding=1, bias=False)),
        ("own", OWNConv2d(16, 64, 3, padding=1, bias=False, norm_groups=4)),
    ):
        layer.load_state_dict(
            {"weight": golden(f"{name}/weight"), "WNScale": golden(f"{name}/scale")}
        )
        expected = golden(f"{name}/normalized_weight")  # before the scale
        assert (
            layer.normalized_weight() / layer.WNScale - expected
        ).abs().max() < 1e-4 * expected.abs().max()
        expected = golden(f"{name}/output")
        assert (layer(golden(f"{name}/input")) - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    ("in_channels", "out_channels", "groups"), [(4, 6, 1), (2, 30, 1), (4, 8, 2), (2, 24, 2)]
)
@pytest.mark.parametrize("iterations", [3, 40])
def test_oni_is_newtons_recurrence_on_singular_values(
    in_channels, out_channels, groups, iterations
):
    torch.manual_seed(0)
    layer = ONIConv2d(
        in_channels, out_channels, (2, 3), groups=groups, iterations=iterations
    ).double()
    actual = (
        layer.normalized_weight().detach().numpy().reshape(groups, out_channels // groups, -1)
        / 2**0.5
    )
    for got, matrix in zip(actual, centered(layer.weight, groups), strict=True):
        left, sigma, right = np.linalg.svd(matrix, full_matrices=False)
        eigenvalues = sigma**2 + EPSILON  # all of the smaller Gram matrix
        norm = np.linalg.norm(eigenvalues)
        root = np.ones_like(sigma)
        for _ in range(iterations):
            root = 1.5 * root - 0.5 * root**3 * eigenvalues / norm
        np.testing.assert_allclose(got, left * (root * sigma / norm**0.5) @ right, atol=1e-10)
        # The polar factor, up to the 1e-5 on the diagonal and the direction that centering removed
        if iterations == 40:
            kept = sigma > 1e-8
            np.testing.assert_allclose(got, left[:, kept] @ right[kept], atol=1e-3)


def test_oni_has_the_originals_rule_for_more_rows_than_columns():
    golden = read_arrays(Path(__file__).parents[1] / "golden" / "oni_more_rows_than_columns.npz")
    for case in ("case0", "case1"):
        weight, expected = (
            torch.from_numpy(golden[f"{case}/{name}"]).double() for name in ("weight", "effective")
        )
        out_channels, in_channels, *kernel_size = weight.shape
        found = {}
        for rule in ("original", "paper"):
            iterations = int(golden["iterations"])
            layer = ONIConv2d(
                in_channels, out_channels, kernel_size, bias=False, iterations=iterations, rule=rule
            ).double()
            layer.load_state_dict({"weight": weight, "WNScale": torch.ones_like(layer.WNScale)})
            found[rule] = layer.normalized_weight()
        largest = expected.abs().max()
        assert (found["original"] - expected).abs().max() < 1e-6 * largest
        assert (found["paper"] - expected).abs().max() > 0.1 * largest


@pytest.mark.parametrize(
    ("shape", "groups"), [((10, 3, 1, 2), 1), ((12, 2, 2, 1), 2), ((4, 5, 3, 3), 1)]
)
def test_onis_two_rules_differ_in_one_division(shape, groups):
    torch.manual_seed(1)
    out_channels, in_channels, *kernel_size = shape
    args = (in_channels * groups, out_channels, tuple(kernel_size))
    layer = ONIConv2d(*args, groups=groups, bias=False, iterations=2, rule="original").double()
    actual = (
        layer.normalized_weight().detach().numpy().reshape(groups, out_channels // groups, -1)
        / 2**0.5
    )
    for got, matrix in zip(actual, centered(layer.weight, groups), strict=True):
        is_tall = matrix.shape[0] > matrix.shape[1]
        gram = matrix.T @ matrix if is_tall else matrix @ matrix.T
        gram = gram + EPSILON * np.eye(len(gram))
        norm = np.linalg.norm(gram)
        root = np.eye(len(gram))
        for _ in range(2):
            root = 1.5 * root - 0.5 * root @ root @ root @ (gram if is_tall else gram / norm)
        np.testing.assert_allclose(
            got, (matrix @ root if is_tall else root @ matrix) / norm**0.5, atol=1e-12
        )


def test_oni_knows_two_rules():
    with pytest.raises(ValueError, match="rule='newton': expected 'paper' or 'original'"):
        ONIConv2d(3, 4, 1, rule="newton")


@pytest.mark.parametrize(
    ("in_channels", "out_channels", "groups", "asked", "norm_groups"),
    [(4, 6, 1, None, 1), (4, 6, 1, 3, 3), (1, 24, 1, None, 3), (4, 8, 2, None, 2)],
)
def test_own_is_the_polar_factor_of_each_group(
    in_channels, out_channels, groups, asked, norm_groups
):
    torch.manual_seed(0)
    layer = OWNConv2d(in_channels, out_channels, 3, groups=groups, norm_groups=asked).double()
    assert layer.norm_groups == norm_groups
    actual = (
        layer.normalized_weight()
        .numpy(force=True)
        .reshape(norm_groups, out_channels // norm_groups, -1)
        / 2**0.5
    )
    for got, matrix in zip(actual, centered(layer.weight, norm_groups), strict=True):
        left, _, right = np.linalg.svd(matrix, full_matrices=False)
        np.testing.assert_allclose(got, left @ right, atol=1e-9)


def test_own_chooses_large_groups_that_can_be_orthogonal():
    for arguments, size in (
        ((64, 256, 3), 64),
        ((3, 64, 3), 16),
        ((3, 6, 1), 2),
        ((8, 20, 3), 20),
        ((1, 4, 1), 1),
    ):
        assert arguments[1] // OWNConv2d(*arguments).norm_groups == size
    with pytest.raises(ValueError, match="norm_groups=5 does not divide out_channels=6"):
        OWNConv2d(3, 6, 3, norm_groups=5)


@pytest.mark.parametrize("make", [ONIConv2d, OWNConv2d, SpectralNormConv2d])
@pytest.mark.parametrize("out_channels", [3, 10])
def test_gradcheck(make, out_channels):
    torch.manual_seed(0)
    # Spectral norm: without iterating between the evaluations
    layer = make(2, out_channels, 2, bias=True).double().eval()
    x = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    parameters = dict(layer.named_parameters())

    def function(inputs, *values):
        return torch.func.functional_call(
            layer, dict(zip(parameters, values, strict=True)), (inputs,)
        )

    assert torch.autograd.gradcheck(function, (x, *parameters.values()))


def test_own_gradient_at_equal_eigenvalues():
    """Where all eigenvalues of Z Z^T are equal, the gradient of an eigendecomposition would be 0 /
    0.
    """
    basis = torch.linalg.qr(torch.cat([torch.ones(9, 1), torch.eye(9)[:, :4]], 1).double())[0][
        :, 1:
    ].mT.contiguous()
    layer = OWNConv2d(1, 4, 3, bias=False).double()
    x = torch.randn(1, 1, 3, 3, dtype=torch.float64)

    def function(weight):
        return torch.func.functional_call(layer, {"weight": weight}, (x,))

    weight = basis.reshape(4, 1, 3, 3).requires_grad_()
    torch.testing.assert_close(
        weight.flatten(1) @ weight.flatten(1).mT, torch.eye(4, dtype=torch.float64)
    )
    assert torch.autograd.gradcheck(function, (weight,))


@pytest.mark.parametrize("make", [ONIConv2d, OWNConv2d, SpectralNormConv2d])
def test_degenerate_weights_stay_finite(make):
    for fill in (0.0, 1.0):
        layer = make(2, 4, 3)
        nn.init.constant_(layer.weight, fill)
        for _ in range(2):
            layer.zero_grad()
            output = layer(torch.rand(1, 2, 5, 5))
            output.square().sum().backward()
            assert output.isfinite().all()
            assert layer.weight.grad.isfinite().all()
        nn.init.normal_(layer.weight)  # and it recovers
        for _ in range(20):
            output = layer(torch.rand(1, 2, 5, 5))
        sigma = np.linalg.svd(
            layer.normalized_weight().numpy(force=True).reshape(4, -1), compute_uv=False
        )[0]
        assert 0.9 < sigma < 1.5


def test_spectral_norm_is_the_largest_singular_value():
    torch.manual_seed(0)
    layer = SpectralNormConv2d(3, 5, 3, padding=1, groups=1, padding_mode="reflect")
    first = layer.weight_u.clone()
    # Two passes before one backward
    (layer(torch.rand(1, 3, 6, 6)) + layer(torch.rand(1, 3, 6, 6))).sum().backward()
    for _ in range(60):
        layer(torch.rand(1, 3, 6, 6))
    sigma = np.linalg.svd(layer.weight.numpy(force=True).reshape(5, -1), compute_uv=False)[0]
    np.testing.assert_allclose(
        layer.normalized_weight().numpy(force=True),
        layer.weight.numpy(force=True) / sigma,
        rtol=1e-5,
    )
    assert not torch.equal(layer.weight_u, first)
    layer.eval()
    stored = layer.weight_u.clone()
    nn.init.normal_(layer.weight)
    layer(torch.rand(1, 3, 6, 6))
    assert torch.equal(layer.weight_u, stored)


class Wrapped(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv = conv


def old_spectral_norm(conv):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.spectral_norm(conv)


@pytest.mark.parametrize("wrap", [lambda conv: conv, Wrapped])
@pytest.mark.parametrize("reference", [old_spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_spectral_norm_takes_over_from_pytorchs(reference, wrap):
    torch.manual_seed(0)
    conv = reference(nn.Conv2d(3, 4, 3, bias=True))
    layer = nn.Sequential(SpectralNormConv2d(3, 4, 3, bias=True))
    layer.load_state_dict(nn.Sequential(wrap(conv)).state_dict())  # strict
    assert list(layer.state_dict()) == ["0.weight", "0.bias", "0.weight_u", "0.weight_v"]
    x = torch.rand(2, 3, 6, 6)
    for _ in range(2 if reference is old_spectral_norm else 0):  # the newer one updates u before v
        expected, actual = conv(x), layer(x)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual.square().sum(), layer[0].weight),
            torch.autograd.grad(expected.square().sum(), conv.weight_orig),
        )
    conv.eval(), layer.eval()
    torch.testing.assert_close(layer(x), conv(x))


@pytest.mark.parametrize("make", [ONIConv2d, OWNConv2d, SpectralNormConv2d])
def test_autocast_normalizes_in_float32(make):
    torch.manual_seed(0)
    layer = make(3, 8, 3)
    twin = copy.deepcopy(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weight = twin.normalized_weight()
        assert twin(torch.rand(1, 3, 4, 4)).dtype == torch.bfloat16
    torch.testing.assert_close(weight, layer.normalized_weight())


@pytest.mark.parametrize("make", [ONIConv2d, OWNConv2d, SpectralNormConv2d])
def test_compiles_as_one_graph(make):
    torch.manual_seed(0)
    layer = make(3, 8, 3)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.rand(1, 3, 4, 4)
    for _ in range(2):
        output, expected = compiled(x), twin(x)
        torch.testing.assert_close(output, expected)
        output.square().sum().backward()
        expected.square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, twin.weight.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_own_in_half_precision_rounds_the_exact_weight_once(dtype):
    layer = OWNConv2d(4, 12, 3).to(dtype)
    exact = copy.deepcopy(layer).float()
    images = torch.rand(2, 4, 5, 5)
    assert torch.equal(
        whiten_rows(layer.weight.flatten(1)[None]),
        whiten_rows(exact.weight.flatten(1)[None]).to(dtype),
    )
    torch.testing.assert_close(layer(images.to(dtype)).float(), exact(images), rtol=0, atol=0.05)
    layer(images.to(dtype)).square().sum().backward()
    assert layer.weight.grad.isfinite().all()


def test_own_works_with_vmap():
    weights = torch.randn(3, 1, 5, 8)

    def energy(weight):
        return (whiten_rows(weight) * weight.exp()).sum()

    vectorized = torch.func.vmap(torch.func.grad(energy))(weights)
    weights.requires_grad_()
    sum(energy(weight) for weight in weights).backward()
    torch.testing.assert_close(vectorized, weights.grad)


def test_ocnn_agrees_with_the_original():
    kernel, matrix = golden("ocnn/kernel"), golden("ocnn/matrix")
    for actual, name in (
        (conv_orthogonality(kernel, 1, 1), "ocnn/conv_orth_stride1_pad1"),
        (conv_orthogonality(kernel, 2, 1), "ocnn/conv_orth_stride2_pad1"),
        (matrix_orthogonality(matrix), "ocnn/orth"),
    ):
        torch.testing.assert_close(actual, golden(name), rtol=1e-4, atol=0)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_ocnn_measures_the_rows_of_the_convolution_operator(stride):
    """The distance is that of the Gram matrix of shifted filters, built here by sliding them over a
    large zero canvas.
    """
    kernel = np.random.default_rng(0).standard_normal((3, 2, 3, 4))
    shifts = [(i * stride, j * stride) for i in range(-3, 4) for j in range(-3, 4)]

    def placed(filter_, shift):
        canvas = np.zeros((2, 30, 30))
        canvas[:, 12 + shift[0] : 15 + shift[0], 12 + shift[1] : 16 + shift[1]] = filter_
        return canvas

    total = sum(
        (
            (placed(kernel[o], (0, 0)) * placed(kernel[p], shift)).sum()
            - (o == p and shift == (0, 0))
        )
        ** 2
        for o in range(3)
        for p in range(3)
        for shift in shifts
    )
    np.testing.assert_allclose(
        conv_orthogonality(torch.from_numpy(kernel), stride).item(), total**0.5
    )


def test_ocnn_gradient_at_distance_zero():
    kernel = torch.zeros(2, 3, 3, 3)
    nn.init.dirac_(kernel)
    for function, weight in (
        (conv_orthogonality, kernel),
        (matrix_orthogonality, torch.eye(4)[:2].reshape(2, 4, 1, 1)),
    ):
        weight.requires_grad_()
        distance = function(weight)
        distance.backward()
        assert distance == 0
        assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_ocnn_penalty_sums_every_convolution():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        ConvNorm2d(4, 6, 3),  # its bpconv is depthwise and does not count
        nn.Conv2d(6, 6, 3, groups=6),
        nn.Conv2d(6, 4, (2, 3), groups=2, stride=2, dilation=2),
        SpectralNormConv2d(4, 5, 1),
        nn.Linear(5, 2),
    )
    halves = model[3].weight.chunk(2)
    expected = (
        conv_orthogonality(model[0].weight, 2)
        + conv_orthogonality(model[1].weight)
        # Dilation 2: a stride of 2 passes over no overlap
        + sum(conv_orthogonality(half, 1) for half in halves)
        + matrix_orthogonality(model[4].weight)
    )
    actual = penalty(model)
    torch.testing.assert_close(actual, expected)
    actual.backward()
    assert all((model[i].weight.grad is None) == (i == 2) for i in range(5))
    assert model[1].bpconv.weight.grad is None
    assert penalty(nn.Linear(2, 2)) == 0
