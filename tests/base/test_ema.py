"""The averaged model against the recursion written out, for every kind of tensor a network
holds."""

import pytest
import torch

import models.layers  # noqa: F401 - fills the layer tables
from base.ema import ModelEma
from models import build_model
from models.layers.conv_norm.kernel_energy import inverse_root_energy


def build(conv, norm):
    torch.manual_seed(0)
    return build_model(
        {"type": "simpleCNN", "args": {"conv_layer_type": conv, "norm_layer_type": norm}}
    )


def train(model, average, steps):
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.rand(8, 3, 32, 32)).square().mean().backward()
        optimizer.step()
        average.update()


def test_weights_and_running_statistics_follow_the_recursion():
    model = build("conv", "bn")
    average = ModelEma(model, 0.6)
    names = (
        "features.0.weight",
        "features.1.running_mean",
        "features.1.running_var",
        "classifier.bias",
    )
    expected = {name: model.state_dict()[name].clone() for name in names}
    for step in range(1, 9):
        train(model, average, 1)
        decay = min(0.6, (1 + step) / (10 + step))
        for name in names:
            expected[name] = decay * expected[name] + (1 - decay) * model.state_dict()[name]
    state = average.model.state_dict()
    for name in names:
        torch.testing.assert_close(state[name], expected[name])
    assert state["features.1.num_batches_tracked"] == 8
    assert not average.model.training
    assert not any(parameter.requires_grad for parameter in average.model.parameters())


def test_conv_norms_spectrum_is_that_of_the_averaged_kernels():
    model = build("prec_conv", "no")
    average = ModelEma(model, 0.5)
    train(model, average, 3)
    averaged = average.model
    layer = averaged.features[0]
    seen = []
    layer.batch_norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images = torch.rand(2, 3, 32, 32)
    averaged(images)
    spectrum = inverse_root_energy(layer.weight, (34, 34), layer.dilation).float()
    full = torch.nn.functional.conv2d(averaged.normalize(images), layer.weight, padding=2)
    expected = layer.bpconv(
        torch.fft.irfft2(torch.fft.rfft2(full) * spectrum, s=(34, 34))[..., 1:-1, 1:-1]
    )
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-5)
    assert model.features[0].running_V.ndim == 3, "the source keeps its own"


def test_spectral_norm_of_the_averaged_weights_is_one():
    model = build("sn_conv", "bn")
    average = ModelEma(model, 0.5)
    train(model, average, 3)
    weight = average.model.features[3].normalized_weight()
    assert float(torch.linalg.matrix_norm(weight.flatten(1), 2)) == pytest.approx(1, abs=0.02)


def test_a_saved_average_goes_on_as_if_it_had_not_stopped():
    model = build("prec_conv", "no")
    average = ModelEma(model, 0.9)
    train(model, average, 2)
    saved, updates = (
        {name: value.clone() for name, value in average.model.state_dict().items()},
        average.updates,
    )
    other = ModelEma(model, 0.9)
    other.load_state_dict(saved, updates)
    train(model, average, 1)
    other.update()
    first, second = average.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
