"""Every entry of the tables of models, layers, losses and metrics keeps its table's contract. New
entries are tested without being listed here.
"""

from collections import Counter

import pytest
import torch
from torch import nn

from base.base_model import BaseModel
from base.config.arguments import takes
from base.registry import (
    ACTIVATION_LAYERS,
    CONV_LAYERS,
    LINEAR_LAYERS,
    LOSSES,
    METRICS,
    MODELS,
    NORM_LAYERS,
)
from models import build_model

SMALL = 10**6
"""The largest number of parameters with which a network takes a real step here. Larger ones run on
the meta device only.
"""
LAYERS = {
    "norm": (NORM_LAYERS, lambda make: make(6)),
    "conv": (CONV_LAYERS, lambda make: make(6, 8, kernel_size=3, stride=2, padding=1, bias=False)),
    "pointwise": (CONV_LAYERS, lambda make: make(6, 8, kernel_size=1, bias=False)),
    "activation": (ACTIVATION_LAYERS, lambda make: make(6, inplace=False)),
}
ENTRIES = [(kind, name) for kind, (table, _) in LAYERS.items() for name in table]


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_a_layer_trains_and_evaluates_each_image_on_its_own(kind, name):
    torch.manual_seed(0)
    table, make = LAYERS[kind]
    layer = make(table[name])
    side = 3 if kind == "conv" else 5
    channels = 8 if kind in ("conv", "pointwise") else 6
    images = torch.randn(4, 6, 5, 5, requires_grad=True)
    before = images.detach().clone()
    for _ in range(2):
        out = layer(images)
        assert out.shape == (4, channels, side, side)
        out.square().sum().backward()
        assert torch.equal(images, before), "the caller's images are not overwritten"
        for parameter in (images, *layer.parameters()):
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all()
    layer.eval()
    with torch.no_grad():
        whole = layer(images)
        torch.testing.assert_close(
            torch.cat([layer(image[None]) for image in images]), whole, rtol=1e-4, atol=1e-5
        )
        copy = make(table[name]).eval()
        copy(images)
        copy.load_state_dict(layer.state_dict())
        torch.testing.assert_close(copy(images), whole)


@pytest.mark.parametrize("name", LINEAR_LAYERS)
def test_a_classifier_trains(name):
    layer = LINEAR_LAYERS[name](6, 3)
    out = layer(torch.randn(4, 6))
    assert out.shape == (4, 3)
    out.square().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def step(name, device):
    with torch.device(device):
        model = build_model({"type": name, "args": {"num_classes": 7}}, [0.5] * 3, [0.2] * 3)
        images, labels = torch.rand(2, 3, 32, 32), torch.tensor([1, 2])
    # Outside of the context, which would slow down every single call.
    logits = model(images)
    LOSSES["cross_entropy"](logits, labels).mean().backward()
    assert logits.shape == (2, 7)
    missed = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert missed == []
    return model


@pytest.mark.parametrize("name", MODELS)
def test_a_network_takes_a_step_on_small_images(name):
    model = step(name, "meta")
    assert isinstance(model, BaseModel)
    assert all(
        takes(MODELS[name], argument) for argument in ("num_classes", "in_channels", "mean", "std")
    )
    if model.num_parameters() <= SMALL:
        model = step(name, "cpu")
        torch.optim.SGD(model.parameters(), lr=0.01).step()
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        model.eval()
        assert model(torch.rand(3, 3, 32, 32)).isfinite().all()


USUAL = {
    "norm_layer_type": (NORM_LAYERS, "bn"),
    "conv_layer_type": (CONV_LAYERS, "conv"),
    "activation_layer_type": (ACTIVATION_LAYERS, "relu"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_network_is_built_from_the_layers_of_its_config(name, monkeypatch):
    seen = Counter()

    def counted(kind):
        table, usual = USUAL[kind]

        def make(*args, **kwargs):
            seen[kind] += 1
            return table[usual](*args, **kwargs)

        return make

    for kind, (table, _) in USUAL.items():
        monkeypatch.setitem(table, "counted", counted(kind))
    with torch.device("meta"):
        build_model({"type": name, "args": dict.fromkeys(USUAL, "counted")})
    assert all(seen[kind] > 2 for kind in USUAL), seen


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_one_number_per_sample(name):
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    losses = LOSSES[name](logits, labels)
    assert losses.shape == (6,)
    assert losses.isfinite().all()
    torch.testing.assert_close(
        torch.cat([LOSSES[name](logits[:2], labels[:2]), LOSSES[name](logits[2:], labels[2:])]),
        losses,
    )
    torch.testing.assert_close(
        LOSSES[name](logits, nn.functional.one_hot(labels, 4).float()), losses
    )
    losses.sum().backward()
    assert (logits.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_counts_samples(name):
    logits = torch.randn(40, 9, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 9
    count = METRICS[name](logits, labels)
    assert count.shape == ()
    assert 0 <= count <= 40
    assert (
        METRICS[name](logits[:13], labels[:13]) + METRICS[name](logits[13:], labels[13:]) == count
    )
    right = 9.0 * nn.functional.one_hot(labels, 9)
    assert (
        METRICS[name](right, labels)
        == METRICS[name](right, nn.functional.one_hot(labels, 9).double())
        == 40
    )
    assert METRICS[name](torch.full((40, 9), torch.nan), labels) == 0
