"""The attack of a config: any entry of the table, with the arguments that it has."""

from dataclasses import dataclass, replace
from typing import Literal

import pytest
from own_attacks import MomentumFGSM

from attacks import APGD, ATTACKS, FGSM, PGD, Attack, AutoAttack, Square
from base.config import validate
from base.config.adversarial import PGDAttackConfig, Size
from base.config.tree import merge
from base.errors import ConfigError
from experiment.build_attacks import build_attack, fgsm, keys_of_other_attack
from tiny_runs import config_of


@dataclass(frozen=True)
class Windowed(MomentumFGSM):
    """An attack with a size of its own."""

    window: Size = 0.5


@pytest.fixture
def own(monkeypatch):
    monkeypatch.setitem(ATTACKS, "momentum", MomentumFGSM)
    monkeypatch.setitem(ATTACKS, "windowed", Windowed)


def attack_of(norm="linf", rank=5, **section):
    return build_attack(config_of(adversarial={"norm": norm}, pgd_attack=section), 10, rank)


PLAIN = PGD(8 / 255, 2 / 255, 10, early_stop=5, seed=3)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({}, PLAIN),
        ({"K": 20, "step": 1}, replace(PLAIN, steps=20, step_size=1 / 255)),
        ({"restarts": 2, "loss": "dlr"}, replace(PLAIN, restarts=2, loss="dlr")),
        (
            {"random_start": False, "early_stop": 0},
            replace(PLAIN, random_start=False, early_stop=0),
        ),
        ({"norm": "l2", "K": 5}, PGD(0.5, 0.25, 5, "l2", early_stop=5, seed=3)),
        ({"type": "fgsm", "loss": "margin"}, FGSM(8 / 255, early_stop=5, loss="margin")),
        ({"type": "apgd", "rho": 0.5}, APGD(8 / 255, 100, rho=0.5, seed=3)),
        ({"type": "apgd", "K": 7}, APGD(8 / 255, 7, seed=3)),
        ({"type": "square", "queries": 50}, Square(8 / 255, 50, loss="margin", seed=3)),
        ({"type": "square", "loss": "ce"}, Square(8 / 255, loss="ce", seed=3)),
        ({"type": "autoattack", "norm": "l2"}, AutoAttack(0.5, "l2", seed=3)),
        ({"type": "momentum"}, MomentumFGSM(8 / 255)),
        (
            {"type": "momentum", "momentum": 0.9, "step": 2},
            MomentumFGSM(8 / 255, step_size=2 / 255, momentum=0.9),
        ),
        ({"type": "windowed", "window": 4}, Windowed(8 / 255, window=4 / 255)),
        ({"type": "windowed", "window": "16/255"}, Windowed(8 / 255, window=16 / 255)),
    ],
)
def test_an_attack_gets_the_arguments_that_it_has(own, section, expected):
    assert attack_of(**section) == expected


@pytest.mark.parametrize("name", ATTACKS)
def test_a_config_builds_every_attack_and_is_stable(name):
    config = config_of(pgd_attack={"type": name})
    assert type(build_attack(config, 10)) is ATTACKS[name]
    assert validate(config.dump()) == config


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"type": "pdg"}, "^.*pgd_attack.type: 'pdg' is not one of: .*; did you mean 'pgd'\\?$"),
        ({"queries": 3}, "pgd_attack.queries: only square takes it, not pgd$"),
        ({"querys": 3}, "pgd_attack.querys: .*queries"),
        ({"type": "square", "queries": "many"}, "pgd_attack.queries: "),
        ({"targeted": True}, "pgd_attack.targeted"),
        (
            {"restarts": 2, "random_start": False},
            "^pgd_attack: pgd: restarts 2: without random_start, all",
        ),
    ],
)
def test_an_argument_that_an_attack_lacks_is_one_line(section, message):
    with pytest.raises(ConfigError, match=message) as raised:
        attack_of(**section)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("section", "classes", "message"),
    [
        (
            {"loss": "dlr"},
            2,
            "^pgd_attack.loss: dlr needs at least 3 classes, this data set has 2$",
        ),
        (
            {"type": "autoattack"},
            3,
            "^pgd_attack.type: autoattack needs at least 4 classes, this data set has 3$",
        ),
    ],
)
def test_too_few_classes_are_one_line(section, classes, message):
    with pytest.raises(ConfigError, match=message):
        build_attack(config_of(pgd_attack=section), classes)


def test_an_entry_that_builds_something_else_is_one_line(monkeypatch):
    monkeypatch.setitem(ATTACKS, "none", lambda epsilon: None)
    with pytest.raises(
        ConfigError,
        match="^pgd_attack.type: none: expected a subclass of attacks.Attack, not NoneType$",
    ):
        attack_of(type="none")


def test_an_attack_of_another_norm_is_one_line(monkeypatch):
    monkeypatch.setitem(ATTACKS, "linf_only", lambda epsilon: FGSM(epsilon))
    with pytest.raises(
        ConfigError,
        match="^pgd_attack.type: linf_only: attacks within linf 0.5, not l2 0.5: declare the",
    ):
        attack_of(norm="l2", type="linf_only")


def test_another_attack_keeps_chosen_values_and_drops_defaults():
    written = config_of(pgd_attack={"K": 20, "random_start": False}).dump()["pgd_attack"]
    assert (
        written.keys()
        > keys_of_other_attack(written, "square").keys()
        == {"K", "restarts", "loss", "random_start"}
    )
    chosen = {"type": "square", "loss": "dlr", "queries": 7, "restarts": 3}
    left = merge({"pgd_attack": chosen}, {"pgd_attack": keys_of_other_attack(chosen, "apgd")})
    assert {key: value for key, value in left["pgd_attack"].items() if value is not None} == {
        "type": "square", "loss": "dlr", "restarts": 3,
    }  # fmt: skip
    assert keys_of_other_attack(chosen, "square") == {}


@dataclass(frozen=True)
class OnOwnLoss(MomentumFGSM):
    """An attack with a loss of its own, among others."""

    loss: Literal["first", "last"] = "last"

    def losses(self, logits, labels):
        return logits[:, 0 if self.loss == "first" else -1]


@dataclass(frozen=True)
class OnOneLoss(OnOwnLoss):
    loss: str = "last"


def test_a_users_attack_may_have_its_own_losses(monkeypatch):
    monkeypatch.setitem(ATTACKS, "own_losses", OnOwnLoss)
    monkeypatch.setitem(ATTACKS, "one_loss", OnOneLoss)
    assert attack_of(type="own_losses").loss == attack_of(type="one_loss").loss == "last"
    assert attack_of(type="own_losses", loss="first").loss == "first"
    assert fgsm(config_of(pgd_attack={"type": "own_losses"})).loss == "ce"
    with pytest.raises(
        ConfigError,
        match=r"pgd_attack.loss: 'fist' is not one of: first, last; did you mean 'first'\?",
    ):
        attack_of(type="own_losses", loss="fist")


def test_keys_of_the_section_are_the_entries_arguments():
    known = PGDAttackConfig.known_fields().keys()
    fixed = {"type", "K", "step", "restarts", "loss", "early_stop"}
    assert known == fixed | {"queries", "rho", "p_init", "random_start"}
    assert issubclass(ATTACKS["pgd"], Attack)
