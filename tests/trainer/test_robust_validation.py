"""Robust validation attacks always in the same way and leaves no trace in training; and the warning
of catastrophic overfitting in fast FGSM training."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from attacks import FGSM, PGD
from data_loader import DATA_LOADERS
from trainer.robust_validation import RobustValidation, has_collapsed, overfitting_warnings


@pytest.fixture(scope="module")
def images():
    return DATA_LOADERS["DigitsDataLoader"](batch_size=16).test_loader().subset(torch.arange(40))


class Linear(nn.Module):
    """A classifier by class means.

    Where it is `masked`, it shows catastrophic overfitting: its gradient points the wrong way at
    the images themselves and is true elsewhere. FGSM without a random start then raises the right
    logit, and PGD finds the way after its first step."""

    def __init__(self, loader, masked):
        super().__init__()
        pixels = torch.cat([batch for batch, _ in loader])
        means = torch.stack(
            [pixels[loader.labels == label].mean(dim=0) for label in range(10)]
        ).flatten(1)
        self.linear = nn.Linear(means.shape[1], 10)
        self.linear.weight.data, self.linear.bias.data = means / 8, -means.square().sum(dim=1) / 16
        self.register_buffer("pixels", pixels)
        self.masked = masked

    def forward(self, batch):
        logits = self.linear(batch.flatten(1))
        if not self.masked:
            return logits
        at_image = (
            torch.cdist(batch.flatten(1), self.pixels.flatten(1)).amin(dim=1, keepdim=True) < 1e-4
        )
        return torch.where(at_image, 2 * logits.detach() - logits, logits)


def validation(loader, **settings):
    given = {
        "attack": PGD(0.1, 0.05, 5, random_start=False),
        "fgsm": None,
        "period": 3,
        "epochs": 7,
        "seed": 0,
    }
    return RobustValidation(loader, **{**given, **settings}, autocast=nullcontext)


def test_it_attacks_every_few_epochs_and_in_the_last_and_always_alike(images):
    model = Linear(images, masked=False).train()
    check = validation(images)
    values = [check(model, epoch) for epoch in range(1, 8)]
    assert [bool(value) for value in values] == [False, False, True, False, False, True, True]
    assert values[2] == values[5] == values[6]
    assert 0 < values[2]["robust_top1"] < 1
    assert values[2].keys() == {"robust_top1"}


def test_it_leaves_no_trace(images):
    model = nn.Sequential(nn.BatchNorm2d(3), Linear(images, masked=False)).train()
    state, draw = (
        {name: value.clone() for name, value in model.state_dict().items()},
        torch.get_rng_state(),
    )
    validation(images)(model, 3)
    assert model.training
    assert model[0].training
    assert torch.equal(draw, torch.get_rng_state())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert all(
        parameter.grad is None and parameter.requires_grad for parameter in model.parameters()
    )


@pytest.mark.parametrize(("masked", "epsilon"), [(False, 0.13), (True, 0.25)])
def test_the_alarm_of_catastrophic_overfitting(images, masked, epsilon):
    """A network that hides its gradient, after an epoch in which it resisted."""
    attacks = {"attack": PGD(epsilon, epsilon / 2, 5, random_start=False), "fgsm": FGSM(epsilon)}
    values = validation(images, **attacks)(Linear(images, masked), 3)
    assert values["fgsm_top1"] > 0.5
    assert (values["robust_top1"] < 0.1) == masked
    log = {f"val_{name}": value for name, value in values.items()} | {"epoch": 3}
    before = [{"epoch": 1, "val_robust_top1": 0.3}, {"epoch": 2, "val_robust_top1": 0.5}]
    warnings = overfitting_warnings(log, before, 10)
    assert len(warnings) == masked
    if masked:
        assert warnings[0].startswith(
            f"catastrophic overfitting: {100 * values['fgsm_top1']:.1f} % of the validation images"
        )
        assert "as 50.0 % did in epoch 2" in warnings[0]
    assert overfitting_warnings(log, [], 10) == [], "in a first epoch nothing has fallen"
    assert (
        overfitting_warnings(log, [{"epoch": 1}, {"epoch": 2, "val_robust_top1": None}], 10) == []
    )


def test_averaged_weights_are_compared_with_their_own_past():
    now = {
        "val_fgsm_top1": 0.8,
        "val_robust_top1": 0.7,
        "val_ema_fgsm_top1": 0.8,
        "val_ema_robust_top1": 0.1,
    }
    assert overfitting_warnings(now, [{"epoch": 1, "val_robust_top1": 0.7}], 10) == []
    warnings = overfitting_warnings(
        now, [{"epoch": 1, "val_robust_top1": 0.7, "val_ema_robust_top1": 0.6}], 10
    )
    assert len(warnings) == 1
    assert "10.0 % resist PGD, as 60.0 % did in epoch 1" in warnings[0]


@pytest.mark.parametrize(
    ("fgsm", "pgd", "before", "classes", "expected"),
    [
        (0.8, 0.2, 0.5, 10, True),
        (0.8, 0.3, 0.5, 10, False),
        (0.7, 0.3, 0.3, 10, False),
        (0.3, 0.2, 0.5, 10, False),
        (0.19, 0, 0.5, 10, False),
        (0.21, 0, 0.5, 10, True),
        (0.5, 0, 0.15, 10, False),
        (0.5, 0, 0.15, 100, True),
        (0.8, 0, 0.7, 2, True),
        (0.7, 0, 0.7, 2, False),
        (0.9, 0.2, 0.55, 2, False),
    ],
    ids=[
        "collapsed",
        "healthy",
        "learning",
        "FGSM, too",
        "near chance",
        "above chance",
        "never robust",
        "of many classes",
        "two classes",
        "two classes near chance",
        "two classes, never robust",
    ],
)
def test_what_counts_as_a_collapse(fgsm, pgd, before, classes, expected):
    assert has_collapsed(fgsm, pgd, before, classes) is expected


def test_starts_depend_on_the_seed_and_not_on_the_epoch(images):
    starts = []

    class Recorder(PGD):
        def start(self, images, generators):
            starts.append(super().start(images, generators))
            return starts[-1]

    for seed, epoch in ((1, 3), (1, 6), (2, 3)):
        validation(images.subset(torch.arange(16)), attack=Recorder(0.1, 0.1, 1), seed=seed)(
            Linear(images, masked=False), epoch
        )
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_a_collapse_is_measured_from_the_best_epoch_before():
    now = {"val_fgsm_top1": 0.8, "val_robust_top1": 0.2}
    before = [{"epoch": 1, "val_robust_top1": 0.6}, {"epoch": 2, "val_robust_top1": 0.3}]
    (warning,) = overfitting_warnings(now, before, 10)
    assert "20.0 % resist PGD, as 60.0 % did in epoch 1" in warning
