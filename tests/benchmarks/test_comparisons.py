"""What the comparisons compute besides their timings, against numbers computed by hand."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from base.config import load_config
from base.errors import ConfigError
from base.precision import choose_precision
from benchmarks import attack_libraries, growth, machine, memory, studies_hours, two_at_once
from benchmarks.attackers import attackers, direct_flops
from benchmarks.machine import PRODUCT, PRODUCT_FLOPS
from benchmarks.processes import python
from benchmarks.rows import BenchmarkRow, Settings
from benchmarks.steps import build_trainer, precisions, step_config, step_of
from benchmarks.timing import Paired, Spread
from models.layers.conv_norm.fourier_plan import FOURIER_BATCH
from tiny_runs import Fork

ROOT = Path(__file__).parents[2]
SMOKE = Settings(torch.device("cpu"), 1, smoke=True)
FULL = Settings(torch.device("cpu"), 1)
needs_torchattacks = pytest.mark.skipif(
    find_spec("torchattacks") is None, reason="pip install -e '.[benchmarks]'"
)


def run(*words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )


def test_growth_has_a_line_for_every_size():
    tables = growth.measure(SMOKE)
    assert [[line[0] for line in table.lines] for table in tables] == [
        ["1", "4"],
        ["32", "48"],
        ["1", "2"],
        ["0", "1"],
    ]
    for table in tables:
        assert all(len(line) == len(table.heads) == 6 for line in table.lines)


def test_hours_of_a_study_are_runs_times_steps_times_seconds(monkeypatch):
    asked = []

    def two_seconds(settings, config, batch, side):
        asked.append((config.arch.type, config.adversarial_method, batch, side))
        return 2.0

    monkeypatch.setattr(studies_hours, "_measure_step", two_seconds)
    (table,) = studies_hours.measure(FULL)
    lines = {line[0]: line[1:] for line in table.lines}
    # 45,000 images in minibatches of 128 are 352 steps: 120 epochs are 42,240 steps of two seconds
    assert lines["cifar10.json"] == ("1", "resnet18", "42,240", "2", "23.5")
    assert lines["ablations/conv_norm.json"][:3] == ("20", "resnet18", f"{20 * 42240:,}")
    assert lines["ablations/conv_norm.json"][4] == f"{20 * 42240 * 2 / 3600:.0f}"
    # 1,437 digits, a tenth of them held out, in minibatches of 64: 21 steps in each of 18 epochs
    assert lines["quickstart.json"] == ("1", "simpleCNN", "378", "2", "0.21")
    assert ("wide_resnet", "pgd", 128, 16) in asked, "image files are resized"
    assert len(asked) < sum(int(line[0]) for line in lines.values()) / 5, (
        "steps that cost the same are measured once"
    )


def test_a_step_too_large_to_measure_is_a_line_through_two_smaller_ones(monkeypatch):
    def measured(fixed, each, batch=128):
        def seconds_of(step, *_, **__):
            asked.append(step)
            return Spread.of([fixed + each * step])

        asked = []
        monkeypatch.setattr(studies_hours, "build_trainer", lambda _: None)
        monkeypatch.setattr(studies_hours, "random_images", lambda _, images, side: images)
        monkeypatch.setattr(studies_hours, "step_of", lambda _, images: images)
        monkeypatch.setattr(studies_hours, "seconds_of", seconds_of)
        return studies_hours._measure_step(FULL, config, batch, 32), asked

    config = load_config(ROOT / "configs" / "cifar10.json")
    for fixed, each, largest in ((0.0, 0.001, 128), (0.01, 0.05, 9), (9.0, 0.1, 2)):
        seconds, asked = measured(fixed, each)
        assert seconds == pytest.approx(fixed + 128 * each)
        assert max(asked) == largest
    seconds, asked = measured(0.01, 1.0, batch=3)
    assert (seconds, max(asked)) == (pytest.approx(3.01), 2)
    config = load_config(ROOT / "configs" / "cifar10_conv_norm.json")
    assert sorted(set(measured(9.0, 1.0)[1])) == [FOURIER_BATCH, 2 * FOURIER_BATCH], (
        "computed in the way of a whole minibatch"
    )


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (("seed", "3"), True),
        (("trainer.epochs", "7"), True),
        (("adversarial.epsilon", "4"), True),
        (("arch.type", "resnet34"), False),
        (("adversarial.steps", "3"), False),
        (("trainer.ema_decay", "null"), False),
        (("system.precision", "fp32"), False),
        (("augmentation.mixup_alpha", "1"), False),
    ],
)
def test_steps_that_cost_the_same_are_recognized(change, same):
    configs = [
        load_config(ROOT / "configs" / "cifar10_pgd.json", overrides)
        for overrides in ([], [change])
    ]
    first, second = map(studies_hours._costs, configs)
    assert (first == second) == same


@pytest.mark.skipif(not memory.CLEAR_REFS.exists(), reason="needs Linux")
def test_the_peak_of_memory_counts_freed_memory_until_it_is_reset():
    script = """
import torch
from benchmarks import memory
memory._reset_peak()
before = memory._resident("VmRSS")
block = torch.ones(64 * 2**20, dtype=torch.uint8)
del block
print(memory._resident("VmHWM") - before)
memory._reset_peak()
print(memory._resident("VmHWM") - memory._resident("VmRSS"))
"""
    peak, above = map(int, python(["-c", script], 1).split())
    assert peak >= 60 * 2**20
    assert above < 8 * 2**20


def test_tensors_at_the_peak_are_those_before_a_step_and_what_it_allocates():
    trainer = build_trainer(step_config(SMOKE))
    parameters = list(trainer.model.parameters())
    alive = sum(tensor.nbytes for tensor in (*parameters, *trainer.model.buffers()))
    before = memory._tensors_at_peak(trainer, lambda: torch.ones(2**20) + torch.ones(2**20))
    assert before == alive + 3 * 4 * 2**20
    # From this step on the optimizer has momentum.
    step_of(trainer)()
    after = memory._tensors_at_peak(trainer, lambda: torch.ones(2**20) + torch.ones(2**20))
    assert after == before + sum(parameter.nbytes for parameter in parameters)


def test_without_linux_resident_memory_is_not_measured(monkeypatch):
    monkeypatch.setattr(
        memory,
        "_in_new_process",
        lambda _, name, precision: {"tensors": 3.0 if name == "ConvNorm" else 2.0},
    )
    tensors, resident = memory.measure(SMOKE)[:2]
    assert tensors.result.median == 1.5
    assert resident.skipped == "the peak of resident memory is known on Linux only"


def test_the_error_of_a_failed_process_is_one_line():
    with pytest.raises(
        ConfigError,
        match=r"^-c import sys; sys.exit\('no\\nreason'\): ended with exit code 1: reason$",
    ):
        python(["-c", "import sys; sys.exit('no\\nreason')"], 1)
    with pytest.raises(ConfigError, match="ended with exit code 3: it printed no reason$"):
        python(["-c", "raise SystemExit(3)"], 1)


def test_memory_is_measured_in_a_new_process():
    found = memory._in_new_process(SMOKE, "ConvNorm", "fp32")
    assert found["tensors"] > 2**17


def test_a_start_reports_which_of_the_named_packages_were_imported(tmp_path):
    words = ["json,comet_ml", "-c", "configs/quickstart.json", "--run_dir", str(tmp_path / "run")]
    done = run("-m", "benchmarks.first_step", *words)
    assert json.loads(done.stdout.splitlines()[-1])["imported"] == ["json"]
    assert not (tmp_path / "run" / "result.json").exists(), "it ends after the first step"


def test_a_step_is_the_config_s_own_trainer_on_the_images_given():
    trainer = build_trainer(step_config(SMOKE, [("adversarial.steps", "2")], "cifar10_pgd.json"))
    seen = []
    trainer.train_batch = lambda images, labels: seen.append((images.shape, labels.tolist()))
    step_of(trainer, torch.zeros(3, 3, 48, 48))()
    assert type(trainer).__name__ == "AdversarialTrainer"
    assert seen == [((3, 3, 48, 48), [0, 0, 0])]


def test_precisions_are_fp32_and_what_auto_picks(monkeypatch):
    monkeypatch.setattr("benchmarks.steps.choose_precision", lambda *_: "bf16")
    assert list(precisions(FULL)) == ["fp32", "bf16"]
    monkeypatch.setattr("benchmarks.steps.choose_precision", lambda *_: "fp32")
    assert list(precisions(FULL)) == ["fp32"]


def test_a_missing_library_gives_a_row_with_the_reason_and_no_numbers(monkeypatch):
    monkeypatch.setattr(
        attack_libraries, "find_spec", lambda name: None if name == "torchattacks" else object()
    )
    (row,) = attack_libraries.measure(SMOKE)
    assert row.skipped == "torchattacks not installed: pip install -e '.[benchmarks]'"
    assert row.met is None


@needs_torchattacks
def test_attacks_are_compared_with_both_libraries(tmp_path):
    done = run(
        "-m",
        "benchmarks",
        "--smoke",
        "--device",
        "cpu",
        "--only",
        "attack_libraries",
        "--json",
        str(tmp_path / "a.json"),
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "a.json").read_text())["results"]["attack_libraries"]
    native = choose_precision("auto", torch.device("cpu")) == "bf16"
    for attack in ("PGD-10, l-inf", "PGD-10, l2", "FGSM, l-inf", "FGSM, l2"):
        for network in ("simpleCNN", "ResNet-18"):
            own = [
                row
                for row in rows
                if row["setting"].startswith(f"{attack}, {network} on digits, 16 images")
            ]
            rows = [row for row in rows if row not in own]
            bf16 = {"attack_loader, bf16"} if attack.startswith("PGD") else set()
            nchw = {"direct call, NCHW"} if network == "simpleCNN" else set()
            assert {row["ours"] for row in own} == {"attack_loader", "direct call", *nchw, *bf16}
            unmeasured = [row for row in own if row["result"] is None]
            if not native:
                assert {row["ours"] for row in unmeasured} == bf16
                assert all("bf16 natively" in row["skipped"] for row in unmeasured)
            shares = {"% of the rate"} if bf16 and network == "ResNet-18" else set()
            measures = {row["measure"] for row in own if row["result"] is not None}
            assert measures == {"x as fast", "points above", *shares}
    assert rows == []


def test_flops_of_a_direct_call_are_those_of_its_passes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 9 * 7, 6))
    batches = [(torch.rand(4, 1, 11, 9), torch.zeros(4, dtype=torch.int64))]

    class Loader(list):
        n_samples = 7

    evaluation = SimpleNamespace(model=model.eval(), loader=Loader(batches))
    forward = 2 * (5 * 9 * 7 * 9 + 5 * 9 * 7 * 6)
    # Three steps forward and back to the pixels, and the verdict; seven images
    assert direct_flops(evaluation, 3, "linf", 8, 2) == 7 * (2 * 3 + 1) * forward
    assert direct_flops(evaluation, 0, "l2", 1.0, 1.0) == 7 * (2 + 1) * forward


def test_the_share_of_the_peak_is_the_rate_over_that_of_the_faster_product_of_each_round():
    seconds = {
        "direct call": [2.0, 2.0, 4.0],
        "matrix product": [0.5, 1.0, 1.0],
        "1x1 convolution": [1.0, 0.5, 2.0],
    }
    products = ["matrix product", "1x1 convolution"]
    row = attack_libraries._share_row("PGD", Paired(seconds), 3 * PRODUCT_FLOPS, products)
    assert (row.result.low, row.result.median, row.result.high) == pytest.approx((75, 75, 75))
    assert row.ours_value.median == pytest.approx(1.5 * PRODUCT_FLOPS / 1e9)
    assert row.other_value.median == pytest.approx(2 * PRODUCT_FLOPS / 1e9)
    assert (str(row.goal), row.met) == (">= 85", False)
    faster = attack_libraries._share_row("PGD", Paired(seconds), 4 * PRODUCT_FLOPS, products)
    assert (faster.result.median, faster.met) == (pytest.approx(100), True)


@pytest.mark.parametrize("name", ["matrix product", "1x1 convolution"])
def test_the_flops_of_the_large_product_are_counted_by_torch_too(monkeypatch, name):
    monkeypatch.setattr(machine, "PRODUCT", 8)
    side = machine.matrix_products(torch.device("cpu"))[name]
    with FlopCounterMode(display=False) as counter:
        side()
    assert counter.get_total_flops() == PRODUCT_FLOPS * 8**3 // PRODUCT**3


def test_robust_accuracy_is_compared_with_the_lowest_of_the_libraries():
    def side(*accuracies):
        return attack_libraries.Attacker(lambda seed: 0.0, list(accuracies))

    sides = {
        "attack_loader": side(0.4, 0.4, 0.4),
        "direct call": side(0.5, 0.5, 0.5),
        "attack_loader, bf16": side(0.46, 0.46, 0.46),
        "torchattacks": side(0.45, 0.44, 0.46, 0.46, 0.46),
        "foolbox": side(0.55, 0.5, 0.5),
    }
    rows = attack_libraries._accuracy_rows("PGD", sides, "torchattacks")
    assert all(isinstance(row, BenchmarkRow) and row.other == "torchattacks" for row in rows)
    assert [round(row.result.median, 6) for row in rows] == [-5.0, 5.0, 1.0]
    assert [row.met for row in rows] == [True, False, False]


@needs_torchattacks
def test_every_pass_of_our_sides_has_its_own_random_starts(tmp_path):
    evaluation = attack_libraries._evaluation(
        attack_libraries._robust_run(SMOKE, attack_libraries.SMALL, tmp_path), SMOKE, None
    )
    # Starts anywhere in the range of pixels, with small steps.
    sides = attackers(evaluation, 2, "linf", 255, 1)
    for name in ("attack_loader", "direct call"):
        seen = []
        evaluation.model.register_forward_pre_hook(
            lambda _, inputs, seen=seen: seen.append(inputs[0].detach().clone())
        )
        sides[name]()
        first, seen[:] = list(seen), []
        sides[name]()
        assert any(not torch.equal(a, b) for a, b in zip(first, seen, strict=False))


def test_two_processes_train_at_the_same_time_and_each_counts_its_own_images(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", Fork)
    (row,) = two_at_once.measure(SMOKE)
    assert row.result.n == 1
    assert row.result.median == pytest.approx(row.ours_value.median / row.other_value.median)
    assert row.other_value.median > 0
    assert row.goal.value == 0.45


def test_the_slower_of_two_processes_is_what_a_row_shows(monkeypatch):
    started = []

    class Scripted:
        def __init__(self, *_):
            started.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    def rates(processes, _):
        return [100.0] if len(processes) == 1 else [60.0, 40.0]

    monkeypatch.setattr(two_at_once, "Training", Scripted)
    monkeypatch.setattr(two_at_once, "_rates", rates)
    first, _ = two_at_once.measure(FULL)
    assert len(started) == 4
    assert (first.result.median, first.result.n, first.met) == (0.4, 3, False)


def test_a_process_that_cannot_train_is_an_error(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", Fork)
    with two_at_once.Training(SMOKE, "no network", 4) as process:
        process.begin(0.0)
        with pytest.raises(ConfigError, match="two_at_once: a process ended with exit code 1"):
            process.rate()
