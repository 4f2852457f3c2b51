"""Verdicts are the same for every batch size and number of shards, are confirmed in full precision
and survive an interruption."""

from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from io import StringIO
from math import sqrt

import numpy as np
import pytest
import torch
from fake_device import fake_device
from torch import nn

from attacks import FGSM, PGD, Attack, AutoAttack
from base.precision import autocast as device_autocast
from data_loader import DATA_LOADERS
from evaluation import DoctorReport, Verdicts, robust_accuracy
from evaluation.attack_batch import attack_batch, search_precision
from evaluation.batches import Batches
from evaluation.checks import Check, judge_rate
from evaluation.fuse_conv_bn import fuse_conv_bn
from evaluation.report import file_stem, title
from evaluation.robust_accuracy import attack_loader
from evaluation.verdicts import wilson_interval
from models import build_model
from tiny_runs import read_arrays


@pytest.fixture(scope="module")
def digits(only_few_digits):
    torch.manual_seed(0)
    loader = DATA_LOADERS["DigitsDataLoader"](batch_size=50)
    model = build_model(
        {"type": "simpleCNN", "args": {"conv_layer_type": "prec_conv", "norm_layer_type": "no"}}
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    for _ in range(3):
        for images, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model.eval(), loader.test_loader().subset(torch.arange(0, 60, 3))


ATTACK = PGD(8 / 255, 4 / 255, 3, restarts=2, early_stop=5)


def verdicts_of(digits, batch_size, index=None):
    model, loader = digits
    part = loader.subset(torch.arange(20) if index is None else index)
    part.batch_size = batch_size
    return attack_loader(model, part, ATTACK, seed=3)


def equal(first, second):
    return all(np.array_equal(a, second.arrays()[name]) for name, a in first.arrays().items())


def test_batch_size_and_number_of_shards_do_not_change_a_verdict(digits):
    whole = verdicts_of(digits, 20)
    assert whole.accuracy("robust_top1") < whole.accuracy("clean_top1")
    assert whole.position.tolist() == list(range(0, 60, 3))
    for batch_size in (1, 16):
        assert equal(verdicts_of(digits, batch_size), whole)
    shards = [verdicts_of(digits, 7, torch.arange(rank, 20, 2)) for rank in range(2)]
    assert equal(Verdicts.joined(shards), whole)


def test_the_seed_decides_where_an_attack_ends(digits):
    model, loader = digits
    images, labels = next(iter(loader))
    run = partial(attack_batch, model, images, labels, ATTACK, positions=loader.positions)
    assert torch.equal(run(seed=3)[1], run(seed=3)[1])
    assert not torch.equal(run(seed=3)[1], run(seed=4)[1])


def test_verdicts_are_what_the_model_says(digits):
    model, loader = digits
    images, labels = next(iter(loader))
    verdicts, worst = attack_batch(
        model, images, labels, ATTACK, positions=loader.positions, seed=3
    )
    clean, final = model(images), model(worst)
    robust = (clean.argmax(1) == labels) & (final.argmax(1) == labels)
    assert torch.equal(verdicts.robust_top1, robust)
    assert torch.equal(verdicts.prediction, final.argmax(1))
    among_five = (final.topk(5).indices == labels[:, None]).any(1) & (
        clean.topk(5).indices == labels[:, None]
    ).any(1)
    assert torch.equal(verdicts.robust_top5, among_five)
    torch.testing.assert_close(verdicts.perturbation, (worst - images).flatten(1).abs().amax(1))


def test_attacks_of_several_steps_search_the_fused_copy_and_the_model_gives_the_verdicts(
    digits, monkeypatch
):
    model, loader = digits
    calls = []

    def spied(original, images):
        assert original is model
        copy = fuse_conv_bn(original, images)
        assert copy is not model
        # The hook of the model, which was copied, too
        copy._forward_hooks.clear()
        copy.register_forward_hook(lambda *call: calls.append("copy"))
        return copy

    monkeypatch.setattr(import_module("evaluation.robust_accuracy"), "fuse_conv_bn", spied)
    hook = model.register_forward_hook(lambda *call: calls.append("model"))
    verdicts = attack_loader(model, loader, PGD(4 / 255, 0.0, 3, early_stop=True), seed=0)
    searched = calls[-6:]
    calls.clear()
    attack_loader(model, loader, FGSM(4 / 255), seed=0)
    hook.remove()
    assert verdicts.robust_top1.any()
    assert searched == ["model", *["copy"] * 4, "model"], (
        "clean; three steps and the last point; the verdict"
    )
    assert calls == ["model", "model"]


def test_fgsm_never_searches_in_low_precision(digits):
    model, loader = digits
    low = {"autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16)}
    report = robust_accuracy(model, loader, FGSM(4 / 255), seed=0, **low)
    assert report.precision == "fp32"
    plain = attack_loader(model, loader, FGSM(4 / 255), seed=0)
    assert equal(attack_loader(model, loader, FGSM(4 / 255), seed=0, **low), plain)


def test_fgsm_costs_one_pass_and_its_verdict_one_more(digits):
    model, loader = digits
    images, labels = next(iter(loader))
    calls = []
    hook = model.register_forward_hook(lambda *call: calls.append(len(call[1][0])))
    verdicts, worst = attack_batch(
        model, images, labels, FGSM(4 / 255), positions=loader.positions, seed=0
    )
    hook.remove()
    assert len(calls) == 2
    assert torch.equal(verdicts.clean_prediction, model(images).argmax(1))
    assert torch.equal(verdicts.prediction, model(worst).argmax(1))
    right = verdicts.clean_top1
    assert torch.equal(worst[right], FGSM(4 / 255)(model, images, labels)[right])
    assert torch.equal(worst[~right], images[~right])


def test_misclassified_images_are_not_attacked(digits):
    model, loader = digits
    images, _ = next(iter(loader))
    wrong = (model(images).argmax(1) + 1) % 10
    attack = PGD(4 / 255, 1 / 255, 5, early_stop=True)
    verdicts, worst = attack_batch(model, images, wrong, attack, positions=loader.positions, seed=0)
    assert torch.equal(worst, images)
    assert not verdicts.robust_top1.any()


def test_a_success_in_low_precision_counts_only_if_full_precision_confirms_it(digits):
    model, loader = digits
    images, labels = next(iter(loader))

    class Coarse(nn.Module):
        """Wrong on every image in bf16, which autocast selects."""

        def forward(self, inputs):
            logits = model(inputs)
            return -logits if torch.is_autocast_enabled("cpu") else logits

    attack = PGD(4 / 255, 1 / 255, 5, early_stop=True)
    run = partial(
        attack_batch,
        images=images,
        labels=labels,
        attack=attack,
        positions=loader.positions,
        seed=0,
    )
    low = run(Coarse(), autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16))[0]
    assert torch.equal(low.robust_top1, run(model)[0].robust_top1), (
        "the images that it wrongly believed to be broken are attacked again"
    )


@contextmanager
def tf32():
    """As `base.precision.autocast` for `"tf32"`."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def test_a_search_in_tf32_is_followed_by_verdicts_in_float32(digits):
    model, loader = digits
    seen = []

    class Coarse(nn.Module):
        """Wrong on every image in TF32."""

        def forward(self, inputs):
            low = torch.backends.cuda.matmul.fp32_precision == "tf32"
            seen.append(low)
            logits = model(inputs)
            return -logits if low else logits

    attack = PGD(4 / 255, 1 / 255, 5, early_stop=True)
    plain = robust_accuracy(model, loader, attack)
    report = robust_accuracy(Coarse(), loader, attack, autocast=tf32)
    assert set(seen) == {True, False}
    assert torch.equal(report.verdicts.robust_top1, plain.verdicts.robust_top1)
    assert plain.robust_top1 > 0
    assert (plain.precision, report.precision) == ("fp32", "tf32, verdicts in fp32")


def test_float32_is_float32_in_a_process_that_convolves_in_tf32(digits):
    """As every process does on CUDA that has not asked torch for more."""
    model, loader = digits
    convolutions = torch.backends.cudnn.conv
    seen = set()

    class Watched(nn.Module):
        def forward(self, inputs):
            seen.add(convolutions.fp32_precision)
            return model(inputs)

    before = convolutions.fp32_precision
    convolutions.fp32_precision = "tf32"
    try:
        report = robust_accuracy(Watched(), loader, PGD(4 / 255, 1 / 255, 2), limit=8)
        after = convolutions.fp32_precision
    finally:
        convolutions.fp32_precision = before
    assert (report.precision, seen, after) == ("fp32", {"ieee"}, "tf32")


@pytest.mark.parametrize(
    ("autocast", "precision"),
    [
        (nullcontext, "fp32"),
        (lambda: torch.autocast("cpu", dtype=torch.bfloat16), "bf16"),
        (lambda: torch.autocast("cpu", dtype=torch.float16), "fp16"),
        (tf32, "tf32"),
        (lambda: torch.autocast("cpu", enabled=False), "fp32"),
        (partial(device_autocast, torch.device("cpu"), "fp32"), "fp32"),
        (partial(device_autocast, torch.device("cpu"), "bf16"), "bf16"),
        (partial(device_autocast, torch.device("cpu"), "tf32"), "tf32"),
        (lambda: torch.autocast("cpu", dtype=torch.float32), "fp32"),
        (lambda: closing(StringIO()), "low precision"),
    ],
)
@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_precisions_have_names(autocast, precision):
    assert search_precision(autocast, ATTACK) == precision
    assert search_precision(autocast, FGSM(0.1)) == "fp32"


@dataclass(frozen=True)
class ToTheBoundary(Attack):
    """Goes back from what PGD finds to where the network just begins to be wrong."""

    epsilon: float
    norm: str = "linf"

    def perturb(self, model, images, labels, generators):
        right, wrong = images, PGD(self.epsilon, self.epsilon, 5)(model, images, labels)
        for _ in range(30):
            between = (right + wrong) / 2
            broken = (model(between).argmax(1) != labels).reshape(-1, 1, 1, 1)
            right, wrong = between.where(~broken, right), between.where(broken, wrong)
        return wrong


@pytest.mark.parametrize("autocast", [nullcontext, partial(torch.autocast, "cpu", torch.bfloat16)])
def test_an_attack_that_just_breaks_an_image_is_confirmed(autocast):
    """Fused batch norms round differently, so it must not stop at the boundary of a fused copy."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10)
    ).eval()
    images = torch.rand(64, 3, 8, 8)
    with torch.no_grad():
        labels = model(images).argmax(1)
    report = robust_accuracy(model, [(images, labels)], ToTheBoundary(0.5), autocast=autocast)
    assert (report.clean_top1, report.robust_top1) == (1, 0)


def test_labels_may_be_on_another_device_than_the_images(monkeypatch):
    with fake_device(monkeypatch):
        images = torch.rand(4, 3, 8, 8, device="cuda")
        labels = torch.tensor([0, 1, 2, 3])
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10)).to("cuda")
        assert PGD(0.1, 0.1, 2)(model, images, labels).device.type == "cuda"
        report = robust_accuracy(lambda x: model(x), [(images, labels)], PGD(0.1, 0.1, 2))
        assert report.n == 4


def test_a_success_that_full_precision_confirms_in_part_is_kept():
    """In bf16 the label has left the top five; in float32 it is still the second."""

    class Coarse(nn.Module):
        """Gray is class 0; of lighter images, that is second in float32 and last in bf16."""

        def forward(self, images):
            logits = torch.arange(10.0, 0.0, -1.0).repeat(len(images), 1)
            lighter = images.mean(dim=(1, 2, 3)) > 0.505
            logits[lighter, 0] = 0.0 if torch.is_autocast_enabled("cpu") else 8.5
            return logits

    class Once(Attack):
        """Finds an image in low precision only."""

        rank = 5

        def perturb(self, model, images, labels, generators):
            return images + 0.01 if torch.is_autocast_enabled("cpu") else images

    given = {
        "positions": torch.arange(4),
        "seed": 0,
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    }
    gray, labels = torch.full((4, 1, 2, 2), 0.5), torch.zeros(4, dtype=torch.int64)
    verdicts, _ = attack_batch(Coarse(), gray, labels, Once(0.1), **given)
    assert verdicts.clean_top1.all()
    assert not verdicts.robust_top1.any()
    assert verdicts.robust_top5.all()


def test_batches_are_filled_up_and_hold_only_images_that_are_not_broken(digits):
    model, loader = digits
    images, _ = next(iter(loader))
    seen = []
    hook = model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    # 15 are misclassified, 5 are not
    wrong = (model(images).argmax(1) + torch.arange(len(images)).lt(15)) % 10
    seen.clear()
    attack_batch(
        model,
        images,
        wrong,
        PGD(4 / 255, 0.0, 3, early_stop=True),
        positions=loader.positions,
        seed=0,
    )
    hook.remove()
    assert seen == [24, 16, 16, 16, 16, 16], (
        "clean; three steps, the last point and the verdict on five images"
    )


def test_a_targeted_attack_and_an_empty_loader_are_errors(digits):
    model, loader = digits
    with pytest.raises(ValueError, match="verdicts need an untargeted attack"):
        attack_loader(model, loader, PGD(4 / 255, 2 / 255, 1, targeted=True), seed=0)
    with pytest.raises(ValueError, match="data: contains no images"):
        robust_accuracy(model, loader.subset(torch.arange(0)), ATTACK, seed=0)


def test_a_process_without_images_says_so(digits, monkeypatch):
    model, loader = digits
    monkeypatch.setattr("evaluation.batches.rank", lambda: 1)
    monkeypatch.setattr("evaluation.batches.world_size", lambda: 2)
    for data in (loader, list(loader)):
        with pytest.raises(ValueError, match="data: contains no images"):
            _ = Batches(data, model, limit=1, sharded=True).first


def test_a_model_that_leaves_torch_is_not_reliable(digits):
    model, loader = digits

    class Outside(nn.Module):
        def forward(self, images):
            return torch.from_numpy(model(images).detach().numpy())

    report = robust_accuracy(Outside(), loader, ATTACK, seed=3)
    assert report.reliable is False
    assert any("gradients are not zero" in warning for warning in report.warnings)


def test_with_few_classes_every_label_is_among_the_top_five(digits):
    model, loader = digits

    class Four(nn.Module):
        def forward(self, images):
            return model(images)[:, :4]

    part = loader.subset(torch.nonzero(loader.labels < 4).squeeze(1))
    part.num_classes = 4
    report = robust_accuracy(Four(), part, PGD(4 / 255, 2 / 255, 3, early_stop=True), seed=3)
    assert report.robust_top5 == 1


def test_different_attacks_have_different_files():
    attack = PGD(8 / 255, 2 / 255, 20, early_stop=5)
    assert file_stem(attack) == "pgd-20_linf_8_step_2_1_start"
    assert file_stem(replace(attack, early_stop=0)).endswith("_1_start_no_early_stop")
    assert file_stem(replace(attack, loss="dlr")) == "pgd-20_linf_8_step_2_1_start_dlr_loss"
    assert file_stem(replace(attack, random_start=False)).endswith("_1_start_random_start_false")
    assert file_stem(FGSM(8 / 255)) == "fgsm_linf_8"
    assert file_stem(AutoAttack(8 / 255)) == "autoattack_linf_8"
    assert title(AutoAttack(8 / 255)).startswith("standard AutoAttack (pyautoattack ")


def test_an_interrupted_evaluation_continues(digits, tmp_path, monkeypatch):
    model, loader = digits
    loader = loader.subset(torch.arange(18))
    loader.batch_size = 5
    whole = attack_loader(model, loader, ATTACK, seed=3)
    calls = 0
    unbroken = PGD.perturb

    def broken(self, *arguments):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return unbroken(self, *arguments)

    monkeypatch.setattr(PGD, "perturb", broken)
    with pytest.raises(KeyboardInterrupt):
        attack_loader(model, loader, ATTACK, seed=3, partial=tmp_path / "part.npz")
    again = partial(attack_loader, model, loader, ATTACK, seed=3, partial=tmp_path / "part.npz")
    assert equal(again(), whole)
    assert calls == 5, "two batches before, two after"
    assert equal(again(), whole), "all verdicts were on the disk when the process was killed"
    assert calls == 5


@pytest.mark.parametrize(("count", "n"), [(0, 10), (3, 10), (204, 1000), (10, 10)])
def test_the_interval_of_a_share_is_wilsons(count, n):
    share, z = count / n, 1.959964
    center = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    expected = (max(0, center - half), min(1, center + half))
    assert wilson_interval(count, n) == pytest.approx(expected, abs=1e-6)


def test_the_report_has_the_numbers_that_a_paper_needs(digits, tmp_path):
    model, loader = digits
    report = robust_accuracy(model, loader, ATTACK, seed=3)
    keys = {
        "attack", "norm", "epsilon", "step_size", "steps", "restarts", "seed", "n",
        "clean_top1", "robust_top1", "robust_top5", "interval", "seconds", "images_per_second",
        "max_perturbation", "precision", "reliable", "images_needed", "warnings", "checkpoint",
        "versions",
    }  # fmt: skip
    assert keys <= report.as_dict().keys()
    assert 4 / 255 < report.max_perturbation <= 8 / 255 + 1e-6
    assert report.title == "PGD-3, linf 8/255, step 4/255, 2 starts"
    low, high = report.interval
    assert low < report.robust_top1 < high
    report.save(str(tmp_path / "deep" / "report.json"))
    saved = read_arrays(tmp_path / "deep" / "report.verdicts.npz")
    assert saved["robust_top1"].mean() == report.robust_top1


def test_a_model_whose_softmax_saturates_is_not_reliable(digits):
    model, loader = digits

    class Saturated(nn.Module):
        def forward(self, images):
            return 1e6 * model(images)

    # So large an epsilon that the margin breaks nearly every image. At a small one the number of
    # images that zero gradients hide is near the limit, and depends on the CPU's rounding.
    report = robust_accuracy(Saturated(), loader, PGD(0.3, 0.1, 3, random_start=False), seed=3)
    assert report.reliable is False
    assert "gradients are not zero" in report.warnings[0]


GOOD, BAD = Check("good", True, ""), Check("bad", False, "")
OPEN = [judge_rate("open", found, 20, 0.05, "") for found in (0, 2)]


@pytest.mark.parametrize(
    ("checks", "reliable", "needed"),
    [
        ([GOOD, GOOD], True, None),
        ([GOOD, BAD], False, None),
        ([GOOD, OPEN[0]], None, OPEN[0].images_needed),
        ([*OPEN, GOOD], None, max(check.images_needed for check in OPEN)),
        ([BAD, OPEN[0]], False, OPEN[0].images_needed),
    ],
)
def test_a_report_is_reliable_if_every_check_passed(digits, checks, reliable, needed):
    model, loader = digits
    report = robust_accuracy(model, loader, ATTACK)
    examined = report.with_doctor(DoctorReport(tuple(checks), ATTACK, (), ATTACK, 20, 10))
    assert examined.reliable is reliable
    assert examined.images_needed == needed
    assert examined.warnings == ("bad: ",) * (BAD in checks)
    verdicts = [check["verdict"] for check in examined.as_dict()["checks"]]
    assert verdicts == [check.verdict for check in checks]
    assert report.reliable is None, "the doctor was not run"
    other = DoctorReport((GOOD,), FGSM(4 / 255), (), ATTACK, 20, 10)
    assert report.with_doctor(other).reliable is None, "another attack was examined"
    warned = replace(report, attack_warnings=("the attack doubts itself",))
    assert warned.with_doctor(DoctorReport((GOOD,), ATTACK, (), ATTACK, 20, 10)).reliable is None
    failed = replace(report, quick_checks=(BAD,))
    assert failed.with_doctor(DoctorReport((GOOD,), ATTACK, (), ATTACK, 20, 10)).reliable is False


def test_an_undecided_check_of_one_batch_is_not_a_warning(digits):
    model, loader = digits
    report = robust_accuracy(model, loader, ATTACK, seed=3)
    assert report.reliable is None
    assert report.images_needed == 73
    assert report.warnings == ()


def test_the_speed_after_an_interruption_counts_the_rest_only(digits, tmp_path):
    model, loader = digits
    loader = loader.subset(torch.arange(18))
    loader.batch_size = 5
    part = tmp_path / "part.npz"
    attack_loader(model, loader.subset(torch.arange(10)), ATTACK, seed=3, partial=part)
    report = robust_accuracy(model, loader, ATTACK, seed=3, partial=part)
    assert report.n == 18
    assert report.images_per_second * report.seconds == pytest.approx(8)
