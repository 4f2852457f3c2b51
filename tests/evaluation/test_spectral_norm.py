"""Spectra of operators, compared with the singular values of the explicit matrix.

The matrix is made column by column from unit vectors.
"""

from math import sqrt

import numpy as np
import pytest
import torch
from torch import nn

from base.errors import NonFiniteError
from evaluation.layer_trace import LayerCall
from evaluation.spectral_norm import layer_spectra, measure, operator_spectrum, product_of_norms
from models.layers import ConvNorm2d, ONIConv2d, OWNConv2d, SpectralNormConv2d

CONV_TYPES = (nn.Conv2d, ConvNorm2d, SpectralNormConv2d, ONIConv2d, OWNConv2d)
GEOMETRIES = {
    "padding": {"kernel_size": 3, "padding": 1},
    "no padding": {"kernel_size": 3},
    "stride": {"kernel_size": 3, "padding": 1, "stride": 2},
    "groups": {"kernel_size": 3, "padding": 1, "groups": 2},
    "dilation": {"kernel_size": (3, 2), "padding": 1, "dilation": 2},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "pointwise": {"kernel_size": 1, "stride": 2},
}


def singular_values(layer, shape):
    """Return the matrix of a layer that has only a linear part and a bias."""
    layer = layer.double().eval()
    units = torch.eye(torch.Size(shape).numel(), dtype=torch.float64).unflatten(1, shape)
    with torch.no_grad():
        matrix = (layer(units) - layer(torch.zeros_like(units))).flatten(1).T
    # Inputs that a stride skips do not count
    matrix = matrix[:, matrix.abs().sum(0) > 0]
    return np.linalg.svd(matrix.numpy(), compute_uv=False)


def spectrum(layer, shape, **options):
    return measure(LayerCall("layer", layer, shape, None), **{"tolerance": 1e-7, **options})


def trained(layer, shape):
    """Return a layer after some training steps, with weights that have changed since."""
    torch.manual_seed(1)
    for _ in range(3):
        layer.train()(torch.randn(2, *shape))
    with torch.no_grad():
        layer.weight += 0.05 * torch.randn_like(layer.weight)
    return layer


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("conv", CONV_TYPES)
def test_agrees_with_svd(conv, geometry):
    torch.manual_seed(0)
    for channels in ((2, 4), (4, 2)):
        shape = (channels[0], 5, 6)
        layer = trained(conv(*channels, **GEOMETRIES[geometry]), shape)
        bare = layer
        if conv is ConvNorm2d:
            bare = ConvNorm2d(*channels, **GEOMETRIES[geometry], affine=False, bn=False)
            bare.load_state_dict(layer.state_dict(), strict=False)
        found, exact = spectrum(layer, shape), singular_values(bare, shape)
        assert found.converged
        assert found.norm == pytest.approx(exact[0], rel=1e-5)
        # At most 64 singular values here, so nothing is estimated
        assert len(exact) <= 64
        assert found.mean_square == pytest.approx((exact**2).mean(), rel=1e-5)
        assert found.orthogonality_error == pytest.approx(
            sqrt(((exact**2 - 1) ** 2).mean()), rel=1e-5
        )
        assert found.spread == pytest.approx(
            (exact**2).std() / (exact**2).mean(), rel=1e-5, abs=1e-6
        )


def test_a_matrix_by_hand():
    layer = nn.Conv2d(1, 1, (1, 2), bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    found = spectrum(layer, (1, 1, 3))  # [[1, 1, 0], [0, 1, 1]], squared singular values 3 and 1
    assert found.norm == pytest.approx(sqrt(3))
    assert (found.mean_square, found.orthogonality_error, found.spread) == pytest.approx(
        (2, sqrt(2), 0.5)
    )


def test_linear_layers():
    torch.manual_seed(0)
    layer = nn.Linear(7, 5)
    exact = np.linalg.svd(layer.weight.detach().double().numpy(), compute_uv=False)
    found = spectrum(layer, (7,))
    assert found.norm == pytest.approx(exact[0], rel=1e-6)
    assert found.orthogonality_error == pytest.approx(sqrt(((exact**2 - 1) ** 2).mean()), rel=1e-9)


def test_many_singular_values_are_estimated():
    torch.manual_seed(0)
    layer, shape = nn.Conv2d(4, 6, 3, padding=1), (4, 9, 9)
    found, exact = spectrum(layer, shape), singular_values(layer, shape)
    assert len(exact) > 300
    assert spectrum(nn.Conv2d(2, 2, 3), (2, 4, 4)).standard_errors is None, "exact"
    assert found.norm == pytest.approx(exact[0], rel=1e-6)
    assert found.mean_square == pytest.approx((exact**2).mean(), rel=0.05)
    assert found.orthogonality_error == pytest.approx(sqrt(((exact**2 - 1) ** 2).mean()), rel=0.05)
    assert found.spread == pytest.approx((exact**2).std() / (exact**2).mean(), rel=0.1)
    # The standard errors are as large as the spread of the estimates over seeds
    call = LayerCall("layer", layer, shape, None)
    estimates = [measure(call, max_iterations=1, seed=seed) for seed in range(40)]
    for name, error in found.standard_errors.items():
        spread = np.std([getattr(one, name) for one in estimates])
        mean = np.mean([one.standard_errors[name] for one in estimates])
        assert mean == pytest.approx(spread, rel=0.4)
        assert 0.4 < error / spread < 2.5


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [(16, 16), (8, 16), (16, 8)])
def test_an_orthogonal_kernel_has_norm_1_and_no_error_and_a_perturbed_one_does_not(
    channels, stride
):
    torch.manual_seed(0)
    layer = nn.Conv2d(*channels, 1, stride).double()
    with torch.no_grad():
        layer.weight.copy_(
            nn.init.orthogonal_(torch.empty(channels[1], channels[0], dtype=torch.float64))[
                ..., None, None
            ]
        )
    shape = (channels[0], 9, 9)
    found = spectrum(layer, shape)
    assert found.norm == pytest.approx(1, abs=1e-12)
    assert found.orthogonality_error < 1e-12
    assert found.spread < 1e-6
    with torch.no_grad():
        layer.weight[0, 0] += 0.1
    perturbed = spectrum(layer, shape)
    assert perturbed.norm > 1.001
    assert perturbed.orthogonality_error > 1e-3
    with torch.no_grad():
        layer.weight.copy_(
            2 * nn.init.orthogonal_(layer.weight.flatten(1)).reshape(layer.weight.shape)
        )
    scaled = spectrum(layer, shape)
    assert scaled.norm == pytest.approx(2)
    assert scaled.orthogonality_error == pytest.approx(3)
    assert scaled.spread < 1e-6


def test_the_layer_stays_as_it_was():
    for conv in CONV_TYPES:
        layer = trained(conv(2, 4, 3, padding=1), (2, 5, 5))
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        spectrum(layer, (2, 5, 5))
        assert layer.training
        assert all(
            parameter.requires_grad and parameter.grad is None for parameter in layer.parameters()
        )
        assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_seeds_precision_and_the_cap():
    torch.manual_seed(0)
    layer, shape = nn.Conv2d(3, 5, 3, padding=1), (3, 8, 8)
    exact = singular_values(layer, shape)[0]
    layer = layer.float()
    first = spectrum(layer, shape, tolerance=1e-3)
    assert first == spectrum(layer, shape, tolerance=1e-3)
    other = spectrum(layer, shape, tolerance=1e-3, seed=1)
    assert other.mean_square != first.mean_square
    for found in (first, other, spectrum(layer, shape, tolerance=1e-3, dtype=torch.float32)):
        assert found.converged
        assert exact * (1 - 5e-4) <= found.norm <= exact * (1 + 1e-5)
    capped = spectrum(layer, shape, max_iterations=2)
    assert (capped.converged, capped.iterations) == (False, 2)
    assert capped.norm < first.norm
    assert capped.residual > 1e-3


def test_a_zero_operator_and_one_that_is_not_finite():
    layer = nn.Conv2d(2, 2, 3)
    with torch.no_grad():
        layer.weight.zero_()
    found = spectrum(layer, (2, 4, 4))
    assert (found.norm, found.mean_square, found.orthogonality_error, found.spread) == (0, 0, 1, 0)
    assert found.converged
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(
        NonFiniteError, match=r"^layer: its weights or running statistics are infinite or NaN$"
    ):
        spectrum(layer, (2, 4, 4))


def test_any_operator_with_an_adjoint():
    found = operator_spectrum(lambda vectors: 3 * vectors.flip(-1)[:, 1:], (5,))
    assert (found.norm, found.mean_square, found.orthogonality_error) == pytest.approx((3, 9, 8))


def test_one_singular_value_above_a_great_many_equal_ones_is_found():
    """The residual of a random vector is below the tolerance from the start."""
    scales = torch.ones(40000, dtype=torch.float64)
    scales[123] = 1.05
    assert operator_spectrum(lambda vectors: vectors * scales, (40000,)).norm == pytest.approx(
        1.05, rel=1e-4
    )


def test_product_of_norms():
    assert product_of_norms([10, 0.1, 100]) == pytest.approx(2)
    assert product_of_norms([10, 0]) is None


def test_a_batch_norm_that_scales_by_zero_ends_the_product():
    """As one that starts at zero at the end of a residual branch does."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
    assert layer_spectra(network, (3, 6, 6)).log10_product_with_batch_norms is not None
    nn.init.zeros_(network[1].weight)
    found = layer_spectra(network, (3, 6, 6))
    assert [layer.batch_norm_scale for layer in found.layers] == [0, None]
    assert found.log10_product_with_batch_norms is None
