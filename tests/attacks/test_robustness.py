"""Verdicts: the same for every batch size and any number of parts, confirmed in full precision, kept when interrupted."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from attacks import PGD
from attacks.report import Report, measure, title
from attacks.robustness import Verdicts, attack_batch, attack_loader, interval
from data_loader import DATA_LOADERS
from models import build_model


@pytest.fixture(scope="module")
def digits():
    torch.manual_seed(0)
    loader = DATA_LOADERS["DigitsDataLoader"](batch_size=50)
    model = build_model({"type": "simpleCNN", "args": {"conv_layer_type": "prec_conv", "norm_layer_type": "no"}})
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    for images, labels in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.eval(), loader.test_loader().subset(torch.arange(0, 359, 18))


ATTACK = PGD(4 / 255, 2 / 255, 3, restarts=2, early_stop=5)


def verdicts_of(digits, batch_size, index=None):
    model, loader = digits
    part = loader.subset(torch.arange(20) if index is None else index)
    part.batch_size = batch_size
    return attack_loader(model, part, ATTACK, seed=3)


def equal(first, second):
    return all(np.array_equal(a, second.arrays()[name]) for name, a in first.arrays().items())


def test_batch_size_and_shares_of_the_work_change_no_verdict(digits):
    whole = verdicts_of(digits, 20)
    assert whole.accuracy("robust_top1") < whole.accuracy("clean_top1")
    assert whole.position.tolist() == list(range(0, 359, 18))
    for batch_size in (1, 16):
        assert equal(verdicts_of(digits, batch_size), whole)
    shares = [verdicts_of(digits, 7, torch.arange(rank, 20, 2)) for rank in range(2)]
    assert equal(Verdicts.joined(shares), whole)


def test_the_seed_alone_decides_where_an_attack_ends(digits):
    model, loader = digits
    images, labels = next(iter(loader))
    run = partial(attack_batch, model, images, labels, ATTACK, positions=loader.positions)
    assert torch.equal(run(seed=3)[1], run(seed=3)[1])
    assert not torch.equal(run(seed=3)[1], run(seed=4)[1])


def test_verdicts_are_what_the_model_says(digits):
    model, loader = digits
    images, labels = next(iter(loader))
    verdicts, worst = attack_batch(model, images, labels, ATTACK, positions=loader.positions, seed=3)
    clean, final = model(images), model(worst)
    robust = (clean.argmax(1) == labels) & (final.argmax(1) == labels)
    assert torch.equal(verdicts.robust_top1, robust)
    assert torch.equal(verdicts.prediction, final.argmax(1))
    among_five = (final.topk(5).indices == labels[:, None]).any(1) & (clean.topk(5).indices == labels[:, None]).any(1)
    assert torch.equal(verdicts.robust_top5, among_five)
    torch.testing.assert_close(verdicts.perturbation, (worst - images).flatten(1).abs().amax(1))


def test_images_that_are_wrong_to_begin_with_are_not_attacked(digits):
    model, loader = digits
    images, _ = next(iter(loader))
    wrong = (model(images).argmax(1) + 1) % 10
    attack = PGD(4 / 255, 1 / 255, 5, early_stop=True)
    verdicts, worst = attack_batch(model, images, wrong, attack, positions=loader.positions, seed=0)
    assert torch.equal(worst, images)
    assert not verdicts.robust_top1.any()


def test_a_success_in_low_precision_only_counts_if_full_precision_confirms_it(digits):
    model, loader = digits
    images, labels = next(iter(loader))

    class Coarse(nn.Module):
        """In bf16, which autocast asks for, it gets everything wrong."""

        def forward(self, inputs):
            logits = model(inputs)
            return -logits if torch.is_autocast_enabled("cpu") else logits

    attack = PGD(4 / 255, 1 / 255, 5, early_stop=True)
    run = partial(attack_batch, images=images, labels=labels, attack=attack, positions=loader.positions, seed=0)
    low = run(Coarse(), autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16))[0]
    assert torch.equal(low.robust_top1, run(model)[0].robust_top1), "what it believed in was attacked again"


def test_an_evaluation_that_was_interrupted_goes_on(digits, tmp_path, monkeypatch):
    model, loader = digits
    loader = loader.subset(torch.arange(20))
    loader.batch_size = 5
    whole = attack_loader(model, loader, ATTACK, seed=3)
    calls = 0
    climb = PGD.perturb

    def broken(self, *arguments):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return climb(self, *arguments)

    monkeypatch.setattr(PGD, "perturb", broken)
    with pytest.raises(KeyboardInterrupt):
        attack_loader(model, loader, ATTACK, seed=3, partial=tmp_path / "part.npz")
    assert equal(attack_loader(model, loader, ATTACK, seed=3, partial=tmp_path / "part.npz"), whole)
    assert calls == 5, "two batches before, two after"


def test_wilson_interval_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    for successes, n in ((0, 10), (3, 10), (204, 1000), (10, 10)):
        expected = stats.binomtest(successes, n).proportion_ci(method="wilson")
        assert interval(successes / n, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_report_holds_what_a_paper_needs(digits, tmp_path):
    model, loader = digits
    report = measure(model, loader, ATTACK, seed=3, checkpoint="best")
    keys = {
        "attack", "norm", "epsilon", "step_size", "steps", "restarts", "seed", "n", "clean_top1", "robust_top1", "robust_top5",
        "interval", "seconds", "images_per_second", "max_perturbation", "reliable", "warnings", "checkpoint", "versions",
    }  # fmt: skip
    assert keys <= report.values.keys()
    assert isinstance(report, Report)
    assert report.values["max_perturbation"] <= 4 / 255 + 1e-6
    assert title(report.values) == "PGD-3, linf 4/255, step 2/255, 2 starts"
    low, high = report.values["interval"]
    assert low < report.values["robust_top1"] < high
    report.save(tmp_path / "deep" / "report.json")
    saved = np.load(tmp_path / "deep" / "report.verdicts.npz")
    assert saved["robust_top1"].mean() == report.values["robust_top1"]

    class Saturated(nn.Module):
        def forward(self, images):
            return 1e6 * model(images)

    masked = measure(Saturated(), loader, ATTACK, seed=3, checkpoint="masked")
    assert masked.values["reliable"] is False
    assert "gradients are not zero" in masked.values["warnings"][0]
