"""Under autocast an attack casts each frozen weight once, and computes the same bits."""

from contextlib import nullcontext
from copy import deepcopy
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode

from attacks import PGD
from attacks.cast_once import cast_once
from attacks.frozen import frozen
from evaluation.attack_batch import attack_batch
from models import build_model
from trainer.adversarial_trainer import AdversarialTrainer

ATTACK = PGD(2 / 255, 0.5 / 255, 5)


class WeightCasts(TorchDispatchMode):
    """Counts the casts of a model's parameters."""

    def __init__(self, model):
        super().__init__()
        self.weights = {parameter.data_ptr() for parameter in model.parameters()}
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "_to_copy" in str(func) and args[0].data_ptr() in self.weights:
            self.count += 1
        return func(*args, **(kwargs or {}))


class Unusual(nn.Module):
    """Reads weights in ways that a copy must not change."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Conv2d(3, 6, 3, bias=False)
        self.standard = nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular")
        self.normed = weight_norm(nn.Conv2d(6, 6, 3))
        self.norm = nn.GroupNorm(2, 6)
        self.last = nn.Linear(6, 4)
        self.exact = nn.Linear(6, 4)
        self.float64 = nn.Linear(6, 4).double()

    def forward(self, images):
        weight = self.shared.weight
        assert weight.dtype == torch.float32
        weight = weight - weight.mean(dim=(1, 2, 3), keepdim=True)
        x = F.conv2d(images, weight, padding=1) + self.standard(images)
        x = self.norm(self.normed(x)).relu().mean(dim=(2, 3))
        with torch.autocast("cpu", enabled=False):
            exact = self.exact(x.float()) + self.float64(x.double()).float()
        return self.last(x) + exact + F.linear(x, self.last.weight.square())


def problem(n=6):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(n, 3, 32, 32, generator=generator)
    return images, torch.randint(4, (n,), generator=generator)


def bf16():
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.fixture(params=["simpleCNN", "unusual"])
def model(request):
    torch.manual_seed(0)
    if request.param == "unusual":
        return Unusual()
    return build_model({"type": "simpleCNN", "args": {"num_classes": 4}})


def test_an_attack_casts_each_weight_once_and_finds_the_same(model, monkeypatch):
    images, labels = problem()
    state = deepcopy(model.state_dict())
    with bf16(), WeightCasts(model) as casts:
        found = ATTACK(model, images, labels)
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    monkeypatch.setattr(import_module("attacks.frozen"), "cast_once", nullcontext)
    with bf16(), WeightCasts(model) as casts_without:
        expected = ATTACK(model, images, labels)
    assert torch.equal(found, expected)
    if isinstance(model, Unusual):
        # The four parameters of `standard` and `last`; the second use of the last layer's weight
        # and the other layers cast in each pass
        assert casts_without.count - casts.count == 4 * (ATTACK.steps - 1)
    else:
        assert 0 < casts.count <= len(list(model.parameters()))
        assert casts_without.count == ATTACK.steps * casts.count


def test_an_evaluation_and_a_training_attack_cast_once_too(model):
    images, labels = problem()
    model.eval()
    labels = model(images).argmax(dim=1).detach()
    counts = {}
    for steps in (2, 6):
        attack = PGD(0.0, 0.0, steps, random_start=False, early_stop=True)
        with WeightCasts(model) as casts:
            attack_batch(
                model, images, labels, attack, positions=torch.arange(6), seed=0, autocast=bf16
            )
        counts["evaluation", steps] = casts.count
        trainer = AdversarialTrainer.__new__(AdversarialTrainer)
        trainer.model, trainer.bn_mode, trainer.autocast = model, "eval", bf16
        with WeightCasts(model) as casts, trainer.attacking():
            attack.perturb(model, images, labels, torch.Generator())
        counts["training", steps] = casts.count
    if isinstance(model, Unusual):
        pytest.skip("it has layers that cast in each pass")
    assert counts["evaluation", 2] == counts["evaluation", 6] > 0
    assert counts["training", 2] == counts["training", 6] > 0


def test_weights_that_change_are_cast_again():
    layer = nn.Linear(4, 3)
    images = torch.rand(2, 4)
    with frozen(layer), cast_once(layer), bf16():
        first = layer(images)
        copy = deepcopy(layer)
        layer.weight.data = layer.weight.data + 1
        with torch.no_grad():
            layer.bias.add_(1)
        second = layer(images)
        assert torch.equal(copy(images), first)
        other = {"weight": torch.zeros(3, 4), "bias": torch.zeros(3)}
        third = torch.func.functional_call(layer, other, images)

        def total(weights):
            return torch.func.functional_call(layer, weights, images).sum()

        gradient = torch.func.grad(total)(other)
    with bf16():
        assert torch.equal(layer(images), second)
        assert not torch.equal(first, second)
    assert third.dtype == torch.bfloat16
    assert not third.any()
    assert torch.equal(gradient["bias"], torch.full((3,), 2.0))


def test_contexts_within_each_other_and_parts_that_are_compiled_or_replicated_are_left_alone():
    layer = nn.Linear(4, 3)
    with cast_once(layer):
        outer = layer.forward
        with cast_once(layer):
            assert layer.forward is outer
        assert layer.forward is outer
    assert "forward" not in vars(layer)
    whole = nn.Sequential(nn.Linear(4, 4), layer)
    layer.compile()
    for model in (whole, nn.Sequential(nn.DataParallel(nn.Linear(4, 3)))):
        with cast_once(model):
            assert not any("forward" in vars(module) for module in model.modules())
