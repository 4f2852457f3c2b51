"""The formulas of the examples against other implementations."""

import importlib.util
import sys
from math import log, sqrt
from pathlib import Path

import pytest
import torch
from torch import nn

from base.config.imports import tables

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example():
    """Load an example by its name; its entries and modules are gone afterwards."""
    before = {name: dict(table) for name, table in tables().items()}
    loaded = []

    def load(name):
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        loaded.append(spec.name)
        spec.loader.exec_module(module)
        return module

    yield load
    for name in loaded:
        del sys.modules[name]
    for name, table in tables().items():
        table.clear()
        table.update(before[name])


def test_filter_response_norm(example):
    frn = example("frn")
    layer = frn.FilterResponseNorm(2, eps=0.5)
    nn.init.constant_(layer.scale, 3.0)
    nn.init.constant_(layer.shift, 1.0)
    x = torch.tensor([[[[1.0, 2.0]], [[0.0, 0.0]]]])
    size = sqrt((1 + 4) / 2 + 0.5)
    expected = torch.tensor([[[[1 + 3 / size, 1 + 6 / size]], [[1.0, 1.0]]]])
    torch.testing.assert_close(layer(x), expected)
    activation = frn.ThresholdedLinearUnit(1)
    nn.init.constant_(activation.threshold, -1.0)
    assert activation(torch.tensor([[[[-2.0, 0.5]]]])).tolist() == [[[[-1.0, 0.5]]]]


def test_generalized_cross_entropy(example):
    gce = example("gce")
    logits = torch.tensor([[log(0.8), log(0.2)], [log(0.3), log(0.7)]], requires_grad=True)
    losses = gce.generalized_cross_entropy(logits, torch.tensor([0, 0]))
    torch.testing.assert_close(losses, torch.tensor([(1 - 0.8**0.7) / 0.7, (1 - 0.3**0.7) / 0.7]))
    mixed = gce.generalized_cross_entropy(logits, torch.tensor([[0.25, 0.75], [1.0, 0.0]]))
    expected = 0.25 * (1 - 0.8**0.7) / 0.7 + 0.75 * (1 - 0.2**0.7) / 0.7
    assert mixed[0].item() == pytest.approx(expected)
    hopeless = torch.tensor([[0.0, 500.0]], requires_grad=True)
    gce.generalized_cross_entropy(hopeless, torch.tensor([0])).sum().backward()
    assert hopeless.grad.isfinite().all()


def test_the_loss_of_mart(example):
    clean, attacked = torch.tensor([[0.6, 0.3, 0.1]]), torch.tensor([[0.2, 0.5, 0.3]])
    losses = example("mart").mart_losses(clean.log(), attacked.log(), torch.tensor([0]), 5.0)
    divergence = sum(p * log(p / q) for p, q in zip((0.6, 0.3, 0.1), (0.2, 0.5, 0.3), strict=True))
    assert losses.tolist() == pytest.approx(
        [-log(0.2) - log(1.0001 - 0.5) + 5 * divergence * (1 - 0.6)]
    )


def test_momentum_fgsm_remembers_gradients_by_their_l1_norm(example):
    attack = example("mi_fgsm").MomentumFGSM(0.4, 0.1, steps=2, decay=1.0)
    seen = []

    def model(images):
        seen.append(images.detach().clone())
        slope = torch.tensor([3.0, 1.0]) if len(seen) == 1 else torch.tensor([0.5, -1.0])
        score = (images.flatten(1) * slope).sum(dim=1)
        return torch.stack([-score, score], dim=1)

    found = attack(model, torch.full((1, 1, 1, 2), 0.5), torch.tensor([0]))
    # 3/4 + 1/3 and 1/4 - 2/3: the second pixel turns back
    torch.testing.assert_close(found.flatten(), torch.tensor([0.7, 0.5]))


def test_lion_and_its_schedule(example):
    lion = example("lion")
    weight = nn.Parameter(torch.tensor([1.0, -1.0]))
    optimizer = lion.Lion([weight], lr=0.1, betas=(0.5, 0.9), weight_decay=0.2)
    schedule = lion.InverseSquareRoot(optimizer)
    for gradient in ([1.0, -2.0], [-3.0, -1.0]):
        weight.grad = torch.tensor(gradient)
        optimizer.step()
        schedule.step()
    rates = [0.1, 0.1 / sqrt(2)]
    # Averages after the first step are 0.1 and -0.2, directions of the second -1 and -1
    first = [1 * (1 - 0.2 * rates[0]) - rates[0], -1 * (1 - 0.2 * rates[0]) + rates[0]]
    second = [value * (1 - 0.2 * rates[1]) + rates[1] for value in first]
    torch.testing.assert_close(weight.detach(), torch.tensor(second))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / sqrt(3))


def test_a_sure_answer_has_nine_tenths_of_the_probability(example):
    logits = torch.tensor([[0.91, 0.09], [0.89, 0.11], [0.05, 0.95]]).log()
    assert example("sure").sure(logits, torch.tensor([0, 0, 0])).item() == 1


def test_tiny_digits_are_split_without_overlap(example):
    train = example("tiny_digits").TinyDigits(test_every=3)
    test = train.test_loader()
    assert (len(train.labels), len(test.labels)) == (1198, 599)
    images = train.images_at(torch.tensor([0, 5]))
    assert images.shape == (2, 1, 8, 8)
    assert 0 <= images.min() <= images.max() <= 1
