"""A training method that a user writes: what it takes, and what happens where it does not fit."""

from typing import Annotated

import pytest
import torch
import torch.nn.functional as F
from pydantic import Field

import experiment
from base.base_trainer import BaseTrainer
from base.config import Config, validate
from base.config.tree import merge
from base.errors import ConfigError
from base.registry import TRAINERS
from tiny_runs import TINY, config_of, difference, interrupt
from trainer import AdversarialTrainer

pytestmark = pytest.mark.usefixtures("only_few_digits")


class MARTTrainer(AdversarialTrainer):
    """MART (Wang et al., ICLR 2020).

    Args:
        beta: Weight of the divergence of predictions for images that are hard.
    """

    def __init__(self, parts, *, beta: Annotated[float, Field(ge=0)] = 6.0, **others):
        super().__init__(parts, **others)
        self.beta = beta

    def train_batch(self, images, labels):
        attacked = self.attacked(images, labels)
        clean = self.forward(images).softmax(dim=1)
        logits = self.forward(attacked)
        truth = F.one_hot(labels, clean.shape[1]).bool()
        wrong = logits.softmax(dim=1).masked_fill(truth, 0).amax(dim=1)
        boosted = self.loss(logits, labels) - (1.0001 - wrong).log()
        divergence = F.kl_div(logits.log_softmax(dim=1), clean, reduction="none").sum(dim=1)
        losses = boosted + self.beta * divergence * (1 - clean[truth])
        self.update(losses)
        return self.result(losses, logits, labels)


MART = {
    "method": "mart",
    "beta": 5.0,
    "steps": 2,
    "step_size": "4/255",
    "validate_images": 10,
    "report_images": 10,
}


@pytest.fixture(autouse=True)
def _mart(monkeypatch):
    monkeypatch.setitem(TRAINERS, "mart", MARTTrainer)


def test_its_config_reaches_its_constructor_and_its_base_class(tmp_path):
    config = config_of(adversarial=MART)
    made = experiment.Experiment.from_config(config).build_trainer(tmp_path)
    assert (type(made), made.beta, made.attack.steps) == (MARTTrainer, 5.0, 2)
    assert made.attack.step_size == pytest.approx(4 / 255), (
        "configs count in 1/255, constructors in the pixel range"
    )
    assert made.config.robust_validation_period == 1, (
        "it attacks while it trains, so validation does"
    )
    assert validate(config.dump()).dump() == config.dump()


def test_it_trains_and_resumes_bit_for_bit_from_within_an_epoch(tmp_path, monkeypatch):
    config = config_of(adversarial=MART, trainer={"epochs": 2}, pgd_attack={"K": 1})
    whole = experiment.train(config, run_dir=tmp_path / "whole")
    interrupt(monkeypatch, tmp_path / "stopped", config, after=4)
    resumed = experiment.resume(tmp_path / "stopped")
    assert (
        difference(tmp_path / "whole" / "model_last.pth", tmp_path / "stopped" / "model_last.pth")
        == []
    )
    assert {"test_top1", "test_robust_top1", "val_robust_top1"} <= whole.keys()
    assert resumed["test_robust_top1"] == whole["test_robust_top1"]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"beta": -1}, r"adversarial\.beta: Input should be greater than or equal to 0, not -1$"),
        ({"beta": "much"}, r"adversarial\.beta: .*valid number.*, not \"much\"$"),
        (
            {"betta": 1},
            r"adversarial\.betta: unknown key; did you mean 'beta'\? \(known here: .*\)$",
        ),
        ({"step_size": 0.01}, r"adversarial\.step_size: 0\.01 is in 1/255 of the pixel range"),
        (
            {"method": "marts"},
            r"adversarial\.method: 'marts' is not one of: .*mart.*; did you mean 'mart'\?$",
        ),
    ],
)
def test_its_arguments_are_checked(section, message):
    with pytest.raises(ConfigError, match=message):
        config_of(adversarial={**MART, **section})


def test_an_argument_of_another_method_is_a_warning():
    def warnings(**section):
        return validate(merge(TINY, {"adversarial": section})).warnings

    assert warnings(method="mart", noise="carry") == (
        'without effect in this run: adversarial.noise "carry" (only with adversarial.method free)',
    )
    assert warnings(method="pgd", beta=7) == (
        "without effect in this run: adversarial.beta 7.0"
        " (only with adversarial.method trades or mart)",
    )
    assert warnings(method="mart", noise="reset", clean_passes=1) == (), (
        "as resolved configs say it"
    )


class NoParts(BaseTrainer):
    def __init__(self, *, config, model):
        pass

    train_batch = None


class Needy(MARTTrainer):
    def __init__(self, parts, weights: torch.Tensor):
        super().__init__(parts)


class Unfinished(BaseTrainer):
    """Without `train_batch`."""


class Picky(MARTTrainer):
    def __init__(self, parts, **others):
        super().__init__(parts, **others)
        raise ValueError("beta 5.0: only even numbers")


class OfMeans(MARTTrainer):
    def update(self, losses):
        super().update(losses.mean())


class OfCleanAndAttacked(MARTTrainer):
    def update(self, losses):
        super().update(torch.cat([losses, losses]))


class ResultOfMeans(MARTTrainer):
    def result(self, losses, logits, labels):
        return super().result(losses.mean(), logits, labels)


class Silent(MARTTrainer):
    def train_batch(self, images, labels):
        super().train_batch(images, labels)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (NoParts, r"adversarial\.method: 'odd' cannot be called as \(parts"),
        (Needy, r"adversarial\.method: 'odd' cannot be called as \(parts, .*'weights'"),
        (Unfinished, r"adversarial\.method: 'odd': Unfinished lacks train_batch$"),
        (
            lambda parts: None,
            r"adversarial\.method: 'odd' is not a subclass of base\.base_trainer\.BaseTrainer$",
        ),
        (Picky, r"adversarial: Picky: beta 5\.0: only even numbers$"),
        (
            OfMeans,
            r"OfMeans\.train_batch: update takes one loss per sample, of shape \(8,\), not \(\)$",
        ),
        (
            OfCleanAndAttacked,
            r"OfCleanAndAttacked\.train_batch: update takes .*, of shape \(8,\), not \(16,\)$",
        ),
        (
            ResultOfMeans,
            r"ResultOfMeans\.train_batch: result takes .*, of shape \(8,\), not \(\)$",
        ),
        (
            Silent,
            r"Silent\.train_batch: returns a NoneType, not a BatchResult, such as self\.result\(",
        ),
    ],
)
def test_a_class_that_does_not_fit_is_one_line(tmp_path, monkeypatch, entry, message):
    monkeypatch.setitem(TRAINERS, "odd", entry)
    with pytest.raises(ConfigError, match=message) as caught:
        experiment.train(
            config_of(adversarial={"method": "odd", "validate_every": 0}), run_dir=tmp_path
        )
    assert len(str(caught.value).splitlines()) == 1


def test_mixup_is_refused_for_methods_that_do_not_take_probabilities(tmp_path, monkeypatch):
    class Plain(BaseTrainer):
        def train_batch(self, images, labels):
            raise NotImplementedError

    monkeypatch.setitem(TRAINERS, "plain", Plain)
    config = config_of(adversarial={"method": "plain"}, augmentation={"mixup_alpha": 1.0})
    with pytest.raises(
        ConfigError,
        match=r"^augmentation\.mixup_alpha: Plain takes labels, not mixup's class probabilities$",
    ):
        experiment.train(config, run_dir=tmp_path)


@pytest.mark.parametrize("method", TRAINERS)
def test_the_class_of_a_method_says_which_script_trains_it(method):
    config: Config = config_of(adversarial={"method": method})
    assert (
        config.attacks_while_training
        == TRAINERS[method].attacks_while_training
        == (method != "none")
    )
    assert config.robust_validation_period == (method != "none")
