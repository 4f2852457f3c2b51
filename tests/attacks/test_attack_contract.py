"""The contract of Attack: the entries of its table are frozen dataclasses, and the base class keeps
its promises for every subclass."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from own_attacks import MomentumFGSM
from torch import nn

from attacks import APGD, ATTACKS, FGSM, PGD, Attack, AutoAttack, Square
from attacks.attack import arguments, settings
from attacks.threat_model import draw, generators_of
from evaluation.report import describe_attack

OFFERED = {"epsilon": 0.03, "norm": "l2", "steps": 4, "step_size": 0.01, "seed": 3, "loss": "ce"}


def offered(kind):
    return {name: value for name, value in OFFERED.items() if name in arguments(kind)}


@pytest.mark.parametrize("kind", [*ATTACKS.values(), MomentumFGSM])
def test_attacks_are_values(kind):
    attack = kind(**offered(kind))
    assert eval(repr(attack)) == attack  # noqa: S307 - what repr is for
    assert hash(eval(repr(attack))) == hash(attack)  # noqa: S307
    assert attack.threat_model.epsilon == 0.03
    larger = dataclasses.replace(attack, epsilon=0.05)
    assert larger.threat_model.epsilon == 0.05
    assert larger != attack
    assert dataclasses.replace(larger, epsilon=0.03) == attack
    with pytest.raises(dataclasses.FrozenInstanceError):
        attack.epsilon = 1.0
    with pytest.raises(ValueError, match="^epsilon: expected at least 0, not -1$"):
        dataclasses.replace(attack, epsilon=-1)
    assert settings(attack).keys() <= describe_attack(attack).keys()
    json.dumps(describe_attack(attack))


def test_numbers_of_other_kinds_become_plain():
    attack = PGD(np.float32(0.5), np.float64(0.25), np.int64(3), early_stop=True)
    assert repr(attack) == (
        "PGD(epsilon=0.5, step_size=0.25, steps=3, norm='linf', restarts=1, random_start=True,"
        " early_stop=1, targeted=False, loss='ce', seed=0, confidence=0.0)"
    )
    assert (
        repr(FGSM(1))
        == "FGSM(epsilon=1.0, norm='linf', early_stop=0, targeted=False, loss='ce', confidence=0.0)"
    )


def test_variants_keep_the_class_and_everything_else():
    class Own(PGD):
        pass

    attack = Own(0.1, 0.05, 3, "l2", restarts=2, early_stop=5, loss="margin", seed=4)
    half = attack.scaled(0.5)
    assert type(half) is Own
    assert (half.epsilon, half.step_size) == (0.05, 0.025)
    assert half.scaled(2) == attack
    assert attack.confident(0.1).confidence == 0.1
    assert attack.confident(0.1).confident(0.02).confidence == 0.1
    assert FGSM(0.1, "l2", loss="margin").scaled(0.5) == FGSM(0.05, "l2", loss="margin")
    # Longer steps than the pixel range would be rejected as given in 1/255.
    steps = [PGD(0.2, 0.8, 5, norm).scaled(2).step_size for norm in ("linf", "l2")]
    assert steps == [1, 1.6]
    square = Square(0.1)
    assert square.confident(0.1) is square, "it has no confidence"


def test_fgsm_becomes_a_pgd_of_which_every_argument_can_be_replaced():
    attack = FGSM(0.1, "l2", early_stop=5, loss="margin")
    plain = PGD(0.1, 0.1, 1, "l2", random_start=False, early_stop=5, loss="margin")
    assert attack.as_pgd() == plain
    assert (attack.single_step, plain.single_step, plain.scaled(0.5).single_step) == (
        True,
        True,
        True,
    )
    assert not dataclasses.replace(plain, steps=2).single_step


def test_classes_that_an_attack_needs():
    needed = {"ce": PGD(0.1, 0.1, 1), "dlr": APGD(0.1, loss="dlr"), "all": AutoAttack(0.1)}
    assert [attack.min_classes for attack in needed.values()] == [2, 3, 4]


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout()
        self.linear = nn.Linear(12, 3)

    def forward(self, images):
        return self.linear(self.dropout(images).flatten(1))


@pytest.fixture
def problem():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, images = Linear(), torch.rand(5, 3, 2, 2)
    return model, images, model.eval()(images).argmax(1)


@dataclasses.dataclass
class Careless(Attack):
    """A dataclass that is not frozen, and changes everything that it can reach."""

    epsilon: float
    wild: float = 2.0

    def perturb(self, model, images, labels, generators):
        torch.set_grad_enabled(False)
        images.add_(self.wild)
        labels.zero_()
        model.model.train()
        return images.double().requires_grad_()


class NoDataclass(Attack):
    """With a constructor that does not call that of the base class."""

    def __init__(self, reach):
        self.epsilon, self.reach = reach, reach

    def perturb(self, model, images, labels, generators):
        images.requires_grad_()
        (gradient,) = torch.autograd.grad(self.losses(model(images), labels).sum(), images)
        return images + 2 * self.reach * gradient.sign()


class BaseConstructor(Attack):
    """With the base class's constructor."""

    def perturb(self, model, images, labels, generators):
        own = generators_of(generators, torch.arange(len(images)))
        return images + draw(torch.randn, images, own)


@pytest.mark.parametrize(
    "attack",
    [Careless(0.1), NoDataclass(0.1), BaseConstructor(0.1, seed=2)],
    ids=lambda attack: type(attack).__name__,
)
def test_promises_are_kept_for_every_subclass(problem, attack):
    model, images, labels = problem
    model.train()
    given, true = images.clone(), labels.clone()
    with torch.no_grad():
        found = attack(model, images, labels)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    assert torch.equal(images, given)
    assert torch.equal(labels, true)
    assert (found.dtype, found.requires_grad) == (torch.float32, False)
    assert (found - images).abs().max() <= 0.1 + 1e-6
    assert found.amin() >= 0
    assert found.amax() <= 1
    assert not torch.equal(found, images)
    assert all(module.training for module in model.modules())
    assert all(value.requires_grad and value.grad is None for value in model.parameters())
    assert torch.equal(attack(model, images, labels), found)
    json.dumps(describe_attack(attack))
    assert repr(attack).startswith(f"{type(attack).__qualname__}(epsilon=0.1, ")


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (
            lambda images: None,
            TypeError,
            r"^Returns.perturb: must return a tensor of images, not NoneType$",
        ),
        (
            lambda images: images[:2],
            ValueError,
            r"^Returns.perturb: must return images of the shape \(5, 3, 2, 2\), "
            r"not \(2, 3, 2, 2\)$",
        ),
    ],
)
def test_the_result_of_perturb_is_checked(problem, result, error, message):
    class Returns(Attack):
        def perturb(self, model, images, labels, generators):
            return result(images)

    with pytest.raises(error, match=message):
        Returns(0.1)(*problem)


def test_shared_fields_are_checked_in_a_users_attacks_too():
    with pytest.raises(ValueError, match="^steps: expected an integer of at least 1, not 0$"):
        MomentumFGSM(0.1, steps=0)
    with pytest.raises(ValueError, match="^step_size: l-inf sizes .* not 2; 2/255\\?$"):
        MomentumFGSM(0.1, step_size=2)
    with pytest.raises(ValueError, match="^norm 'l1' is not one of: linf, l2$"):
        MomentumFGSM(0.1, "l1")
    with pytest.raises(ValueError, match="^loss 'cw' is not one of: ce, margin, dlr$"):
        BaseConstructor(0.1, loss="cw")

    @dataclasses.dataclass(frozen=True)
    class NoEpsilon(BaseConstructor):
        steps: int = 10

    with pytest.raises(TypeError, match="^NoEpsilon has no epsilon: declare it as a field, `eps"):
        NoEpsilon()

    @dataclasses.dataclass(frozen=True)
    class OwnLoss(MomentumFGSM):
        loss: str = "mine"

        def losses(self, logits, labels):
            return -logits[:, 0]

    assert OwnLoss(0.1).loss == "mine"


def test_momentum_fgsm_is_the_published_iteration(problem):
    """Dong et al., arXiv:1710.06081, algorithm 1, written out in numpy."""
    model, images, labels = problem
    weight = model.linear.weight.detach().double().numpy()
    bias = model.linear.bias.detach().double().numpy()
    start = images.double().numpy().reshape(5, 12)
    points, velocity = start.copy(), np.zeros_like(start)
    for _ in range(4):
        logits = points @ weight.T + bias
        shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        gradient = (shares - np.eye(3)[labels]) @ weight
        velocity = 0.9 * velocity + gradient / np.abs(gradient).sum(1, keepdims=True)
        points = np.clip(points + 0.03 * np.sign(velocity), start - 0.1, start + 0.1).clip(0, 1)
    found = MomentumFGSM(0.1, steps=4, step_size=0.03, momentum=0.9)(model, images, labels)
    np.testing.assert_allclose(found.numpy().reshape(5, 12), points, atol=1e-6)
