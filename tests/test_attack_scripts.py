"""train_robust.py, validate_pgd.py and fgsm.py as a user runs them, from another folder."""

import csv
import json
import re
import resource
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from attacks import FGSM, PGD
from base.checkpoint import load_checkpoint, save_checkpoint
from base.errors import ConfigError
from evaluation import DoctorReport, RobustnessReport, Verdicts
from evaluation.checks import Check
from experiment import attack_command
from experiment.attack_command import _verdict_on_reliability, attack_network, attack_parser
from tests.base.distributed.two_processes import start_two
from tiny_runs import read_arrays, script

pytestmark = pytest.mark.usefixtures("only_few_digits")

ROOT = Path(__file__).parents[1]
SHORT = [
    "--set",
    "trainer.epochs=2",
    "--set",
    "data_loader.args.num_batches=6",
    "--set",
    "system.num_threads=1",
    "--set",
    "adversarial.steps=2",
    "--set",
    "pgd_attack.K=2",
    "--set",
    "adversarial.validate_images=40",
    "--set",
    "adversarial.report_images=40",
]


@pytest.fixture(scope="module")
def robust_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("robust") / "run"
    options = ["--set", "adversarial.method=fgsm", "--set", "trainer.ema_decay=0.5"]
    config = ROOT / "configs" / "quickstart.json"
    monitor = ["--set", "trainer.monitor=max val_robust_top1"]
    done = script(
        "train_robust.py",
        "-c",
        config,
        "--run_dir",
        folder,
        *options,
        *monitor,
        *SHORT,
        cwd=folder.parent,
    )
    assert done.returncode == 0, done.stderr
    return folder, done


def test_robust_training_ends_with_attacks_on_last_and_best_and_their_averages(robust_run):
    folder, done = robust_run
    result = json.loads((folder / "result.json").read_text())
    for kind in ("", "last_", "ema_", "last_ema_"):
        assert (
            result[f"{kind}test_robust_top1"]
            == json.loads(
                (
                    folder
                    / "eval"
                    / f"pgd_{'last' if 'last' in kind else 'best'}{'_ema' * ('ema' in kind)}.json"
                ).read_text()
            )["robust_top1"]
        )
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"val_robust_top1", "val_fgsm_top1", "val_ema_robust_top1"} <= log[0].keys()
    assert log[result["best_epoch"] - 1]["val_robust_top1"] == max(
        epoch["val_robust_top1"] for epoch in log
    )
    for name in ("best", "last", "best_ema", "last_ema"):
        assert json.loads((folder / "eval" / f"pgd_{name}.json").read_text())["n"] == 40
    assert "\nadversarial training: fgsm, linf 8/255, 1 step of 10/255\n" in done.stdout
    assert "PGD-2, linf 8/255, step 2/255, 1 start on 40 images" in done.stdout
    assert done.stderr == ""


def test_a_run_folder_needs_no_config_and_gets_the_report(robust_run):
    folder, _ = robust_run
    stale, other = (
        folder / "eval" / f".{name}.{'0f' * 8}.partial.npz"
        for name in ("fgsm_linf_8_ema_n30_seed0", "pgd")
    )
    # An attempt with another number of processes leaves such a file
    stale.touch()
    other.touch()
    done = script("fgsm.py", "-s", folder, "--limit", 30, "--ema", cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("FGSM, linf 8/255 on 30 images: clean ")
    report = json.loads((folder / "eval" / "fgsm_linf_8_ema_n30_seed0.json").read_text())
    assert report["n"] == 30
    assert list((folder / "eval").glob(".*")) == [other], (
        "only what belongs to this report is removed"
    )
    other.unlink()


def test_a_report_is_replaced_by_that_of_the_same_evaluation_only(robust_run, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.json", "model_best.pth"):
        shutil.copy(robust_run[0] / name, folder)

    def attack(*words):
        words = ["-s", folder, "--limit", 10, *words]
        attack_network(attack_parser("", ()).parse_args([*map(str, words)]), "pgd")
        (path,) = (folder / "eval").glob("pgd*.json")
        report = json.loads(path.read_text())
        assert (len(report["data_digest"]), len(report["weights_digest"])) == (16, 16)
        return path

    path = attack()
    before = path.read_bytes()
    assert attack() == path
    assert path.read_bytes() != before, "the seconds are others"

    def refused(message, *words):
        before = path.read_bytes()
        with pytest.raises(
            ConfigError, match=f"^{re.escape(f'{path}: holds the report {message}')}"
        ):
            attack(*words)
        assert path.read_bytes() == before

    refused(
        'with precision "fp32", not "bf16, verdicts in fp32"; write another file with --json FILE,'
        " or begin its name with --name NAME",
        "--set",
        "system.precision=bf16",
    )
    refused("with early_stop 5, not 1;", "--set", "pgd_attack.early_stop=1")
    contents = load_checkpoint(folder / "model_best.pth")
    next(iter(contents["state_dict"].values())).mul_(2)
    save_checkpoint(folder / "model_best.pth", contents)
    refused("of other weights;")
    attack("--name", "doubled")
    assert (folder / "eval" / f"doubled_{path.name}").exists()
    attack("--json", path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"data_digest": "0"}))
    refused("of other images;")


def test_verdicts_are_the_same_for_two_processes_and_other_batches(robust_run, tmp_path):
    folder, _ = robust_run
    words = ["-s", folder, "--limit", 40, "--seed", 5, "--restarts", 2, "--json"]
    first = script(
        "validate_pgd.py", *words, tmp_path / "one.json", "--batch_size", 16, cwd=tmp_path
    )
    assert first.returncode == 0, first.stderr
    processes = start_two(ROOT / "validate_pgd.py", *words, tmp_path / "two.json")
    output = "".join(process.communicate(timeout=300)[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert output.count("PGD-2") == 1, "only one process reports"
    paths = [folder / "eval" / "pgd_best.json", tmp_path / "one.json", tmp_path / "two.json"]
    assert len({json.loads(path.read_text())["data_digest"] for path in paths}) == 1
    verdicts = [read_arrays(tmp_path / f"{name}.verdicts.npz") for name in ("one", "two")]
    assert len(set(verdicts[1]["position"].tolist())) == 40, "every image exactly once"
    assert all(np.array_equal(verdicts[0][name], verdicts[1][name]) for name in verdicts[0])


def test_doctor_figure_and_l2(robust_run, tmp_path):
    folder, _ = robust_run
    words = [
        "-s",
        folder,
        "--limit",
        16,
        "--norm",
        "l2",
        "--steps",
        3,
        "--set",
        "system.num_threads=1",
    ]
    done = script(
        "validate_pgd.py",
        *words,
        "--doctor",
        "--figure",
        tmp_path / "a.png",
        "--json",
        tmp_path / "a.json",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["norm"] == "l2"
    assert report["epsilon"] == 0.5
    assert report["max_perturbation"] <= 0.5 * (1 + 1e-5)
    verdicts = {check["verdict"] for check in report["checks"]}
    assert "undecided" in verdicts, "16 images are too few to pass"
    assert report["reliable"] is (False if "failed" in verdicts else None)
    assert report["images_needed"] >= 73
    if "failed" not in verdicts:
        assert f"UNDECIDED: about {report['images_needed']} images would decide\n" in done.stdout
    assert report["checked_attack"] == "PGD-3, l2 0.5, step 0.4167, 1 start"
    assert report["curve_attack"].startswith("PGD-20, l2 0.5, step ")
    assert [epsilon for epsilon, _ in report["curve"]][:4] == [0, 0.125, 0.25, 0.5]
    assert not list(tmp_path.glob(".*")), "no partial files remain"
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert (tmp_path / "a_epsilon.png").stat().st_size > 1000


def test_an_original_checkpoint_with_its_original_config(tmp_path):
    source = ROOT / "tests" / "golden" / "original_checkpoint_prec_conv"
    config = {
        "name": "robust_training",
        "n_gpu": 1,
        "num_classes": 10,
        "arch": {
            "type": "simpleCNN",
            "args": {"num_classes": 10, "norm_layer_type": "no", "conv_layer_type": "prec_conv"},
        },
        "data_loader": {"type": "CIFAR10DataLoader", "args": {"data_dir": "**data dir**"}},
        "trainer": {"monitor": "max val_my_metric", "do_adv": True, "adv_clip_eps": 8},
        "pgd_attack": {"K": 2, "step": 2},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = ["-c", tmp_path / "config.json", "-s", source / "model_best.pth", "--limit", 20]
    digits = [
        "--set",
        "data_loader.type=DigitsDataLoader",
        "--set",
        "data_loader.args.data_dir=none",
    ]
    done = script("validate_pgd.py", *words, *digits, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "normalizing by those of CIFAR-10" in done.stdout
    assert "PGD-2, linf 8/255, step 2/255" in done.stdout


def test_the_doctor_examines_as_many_images_as_its_flag_says(robust_run, tmp_path):
    folder, _ = robust_run
    words = ["-s", folder, "--steps", 2, "--limit", 10, "--json", tmp_path / "a.json"]
    done = script("validate_pgd.py", *words, "--doctor", 3, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "a.json").read_text())
    assert "of 3 images, " in next(check["detail"] for check in report["checks"])
    none = script("validate_pgd.py", *words, "--doctor", 0, cwd=tmp_path)
    assert (none.returncode, none.stderr) == (2, "error: --doctor: expected at least 1, not 0\n")


PASSED = Check("passed", True, "")
EVERY_CHECK_PASSED = "every check passed (examined: PGD-7, linf 8/255, step 2/255, 1 start)"


def undecided(images_needed):
    return Check("undecided", False, "", "undecided", images_needed)


@pytest.mark.parametrize(
    ("check", "attack_warnings", "reliable", "line"),
    [
        (PASSED, (), True, EVERY_CHECK_PASSED),
        (PASSED, ("the attack warns",), None, EVERY_CHECK_PASSED),
        (Check("failed", False, ""), (), False, "NOT RELIABLE: see the warnings"),
        (
            undecided(300),
            (),
            None,
            "UNDECIDED: about 300 images would decide (--doctor 300)",
        ),
        (undecided(301), (), None, "UNDECIDED: about 301 images would decide"),
    ],
)
def test_the_doctors_last_line(check, attack_warnings, reliable, line):
    attack = PGD(8 / 255, 2 / 255, 7, early_stop=5)
    report = RobustnessReport(
        attack,
        seed=0,
        verdicts=Verdicts(*[torch.zeros(300)] * 8),
        robust_top5=None,
        seconds=1.0,
        images_per_second=300.0,
        precision="fp32",
        attack_warnings=attack_warnings,
        doctor=DoctorReport((check,), attack, (), attack, 200, 10),
    )
    assert report.reliable is reliable
    assert _verdict_on_reliability(report, report.doctor) == line


@pytest.mark.parametrize(("folder", "name"), [(None, "model_best.pth"), (Path(), "the run")])
def test_the_picture_of_epsilons_names_its_own_attack_and_the_run(
    tmp_path, monkeypatch, folder, name
):
    """A report on FGSM or PGD of few steps has a curve under another attack."""
    drawn = {}
    monkeypatch.setattr(
        attack_command, "draw_epsilon_curve", lambda *_, **given: drawn.update(given)
    )
    (tmp_path / "the run").mkdir()
    monkeypatch.chdir(tmp_path / "the run")
    search = PGD(8 / 255, 2 / 255, 20, early_stop=1)
    found = DoctorReport((PASSED,), FGSM(8 / 255), ((0.0, 0.9),), search, 200, 10)
    evaluation = SimpleNamespace(source="other/model_best.pth", run_folder=folder)
    attack_command._draw_curve(found, evaluation, tmp_path / "a.json")
    assert drawn["title"] == (
        f"{name}: PGD-20, linf 8/255, step 2/255, 1 start, scaled to each epsilon, on 200 images"
    )


@pytest.mark.parametrize(
    ("flags", "epsilon", "step_size"),
    [
        (["--epsilon", "4/255", "--step_size", "0.5/255"], 4 / 255, 0.5 / 255),
        (["--norm", "l2", "--epsilon", "64/255", "--step_size", "32/255"], 64 / 255, 32 / 255),
        (["--set", "adversarial.epsilon=2/255", "--step_size", "1 / 255"], 2 / 255, 1 / 255),
    ],
)
def test_sizes_may_be_fractions_of_the_pixel_range(robust_run, tmp_path, flags, epsilon, step_size):
    words = ["-s", robust_run[0], "--limit", 5, "--json", tmp_path / "a.json"]
    done = script("validate_pgd.py", *words, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "a.json").read_text())
    assert (report["epsilon"], report["step_size"]) == pytest.approx((epsilon, step_size))


@pytest.mark.parametrize(
    "command", [["validate_pgd.py"], ["validate_pgd.py", "--apgd", "--steps", 3], ["fgsm.py"]]
)
def test_a_model_with_a_nan_weight_gets_a_report_that_is_not_reliable(
    robust_run, tmp_path, command
):
    checkpoint = torch.load(robust_run[0] / "model_best.pth", weights_only=True)
    name, weight = next(reversed(checkpoint["state_dict"].items()))
    weight[...] = float("nan")
    save_checkpoint(tmp_path / "nan.pth", checkpoint)
    words = ["-s", tmp_path / "nan.pth", "--limit", 21, "--json", tmp_path / "a.json"]
    done = script(*command, *words, "--figure", tmp_path / "a.png", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), name
    text = (tmp_path / "a.json").read_text()
    assert "NaN" not in text
    report = json.loads(text)
    assert (report["n"], report["clean_top1"], report["robust_top1"]) == (21, 0, 0)
    assert report["reliable"] is False
    assert report["warnings"] == ["gradients and logits are finite: not finite for 21 of 21 images"]
    assert "warning: gradients and logits are finite: not finite for 21" in done.stdout
    verdicts = read_arrays(tmp_path / "a.verdicts.npz")
    assert (verdicts["prediction"] == -1).all()
    assert not verdicts["robust_top1"].any()


def test_images_that_do_not_fit_the_network_are_an_error_of_one_line(robust_run, tmp_path):
    for part in ("train", "test"):
        for digit in range(10):
            (tmp_path / "few" / part / str(digit)).mkdir(parents=True)
            Image.new("RGB", (9, 4)).save(tmp_path / "few" / part / str(digit) / "a.png")
    words = ["-s", robust_run[0], "--set", "data_loader.type=ImageFolderDataLoader"]
    words += ["--set", f"data_loader.args.data_dir={tmp_path / 'few'}"]
    for command in ("validate_pgd.py", "fgsm.py"):
        done = script(command, *words, "--json", tmp_path / "a.json", cwd=tmp_path)
        assert (done.returncode, len(done.stderr.splitlines())) == (4, 1)
        expected = "images of 9x4 pixels with 3 channels, which simpleCNN cannot take: "
        assert done.stderr.startswith(f"error: {tmp_path / 'few'}: {expected}")


def bad_inputs(folder, tmp_path):
    (tmp_path / "log.png").symlink_to(folder / "metrics.jsonl")
    checkpoint = torch.load(folder / "model_best.pth", weights_only=True)
    save_checkpoint(
        tmp_path / "other.pth", {**checkpoint, "state_dict": {"other.weight": torch.zeros(1)}}
    )
    torch.save({"state_dict": checkpoint["state_dict"]}, tmp_path / "bare.pth")
    for part in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / "empty" / part / name).mkdir(parents=True)
    empty = [
        "--set",
        "data_loader.type=ImageFolderDataLoader",
        "--set",
        f"data_loader.args.data_dir={tmp_path / 'empty'}",
    ]
    return {
        "pixel range epsilon": (
            ["-s", folder, "--epsilon", "0.031"],
            2,
            "adversarial.epsilon: 0.031 is in 1/255 of the pixel",
        ),
        "pixel range step": (
            ["-s", folder, "--step_size", "0.0078"],
            2,
            "pgd_attack.step: 0.0078 is in 1/255 of the pixel range",
        ),
        "no fraction": (["-s", folder, "--epsilon", "8/255px"], 2, '"8/255", not "8/255px"'),
        "1/255 under l2": (
            ["-s", folder, "--norm", "l2", "--epsilon", "128"],
            2,
            "write 0.502 for 128/255",
        ),
        "classes": (
            ["-s", folder, "--set", "arch.args.num_classes=7"],
            2,
            "arch.args.num_classes: 7, but DigitsDataLoader has 10",
        ),
        "layers": (
            ["-s", tmp_path / "other.pth"],
            3,
            "is of another architecture than this SimpleCNN",
        ),
        "architecture": (
            ["-s", folder, "--set", "arch.type=simpleCNN2"],
            3,
            "is of another architecture than this SimpleCNN2",
        ),
        "empty test set": (["-s", folder, *empty], 4, str(tmp_path / "empty")),
        "no config": (["-s", tmp_path / "bare.pth"], 2, "-c CONFIG: required"),
        "no checkpoint": (["-s", tmp_path / "none"], 3, "no such checkpoint"),
        "limit": (["-s", folder, "--limit", "0"], 2, "--limit: expected at least 1"),
        "figure format": (
            ["-s", folder, "--limit", "2", "--figure", tmp_path / "a.bmp"],
            2,
            "png, pdf",
        ),
        "json folder": (
            ["-s", folder, "--limit", "2", "--json", tmp_path],
            2,
            "cannot be written: a folder",
        ),
        "json over the checkpoint": (
            ["-s", folder, "--json", folder / "model_best.pth"],
            2,
            "which is being read",
        ),
        "json over the run's config": (
            ["-s", folder / "model_last.pth", "--json", folder / "config.json"],
            2,
            "being read",
        ),
        "figure over a log": (
            ["-s", folder, "--figure", tmp_path / "log.png"],
            2,
            "it is a file of the run in",
        ),
        "json and figure": (
            ["-s", folder, "--json", tmp_path / "a.png", "--figure", tmp_path / "a.png"],
            2,
            "--json is",
        ),
        "name": (
            ["-s", folder, "--name", "../x"],
            2,
            "--name ../x: expected the first part of a file's name",
        ),
        "devices": (
            ["-s", folder, "-d", "0,1"],
            2,
            "-d 0,1: asks for 2 CUDA devices, of which 0 exist",
        ),
        "json under a file": (
            ["-s", folder, "--json", tmp_path / "bare.pth" / "a.json"],
            2,
            "cannot be written",
        ),
        "nothing to examine": (
            ["-s", folder, "--epsilon", "0", "--doctor"],
            2,
            "--doctor: needs an epsilon above 0",
        ),
        "a setting it does not have": (
            ["-s", folder, "--autoattack", "--steps", "3"],
            2,
            "--steps: has no effect on the attack autoattack",
        ),
        "two attacks": (["-s", folder, "--apgd", "--autoattack"], 2, "not allowed with argument"),
        "three attacks": (
            ["-s", folder, "--apgd", "--attack", "pgd"],
            2,
            "not allowed with argument",
        ),
        "no attack": (
            ["-s", folder, "--attack", "apdg"],
            2,
            "'apdg' is not one of: fgsm, pgd, apgd, square, autoattack; did you mean 'apgd'?",
        ),
        "another attack's argument": (
            ["-s", folder, "--attack", "apgd", "--set", "pgd_attack.queries=3"],
            2,
            "pgd_attack.queries: only square takes it, not apgd",
        ),
        "an argument out of its range": (
            ["-s", folder, "--attack", "apgd", "--set", "pgd_attack.rho=3"],
            2,
            "pgd_attack: apgd: rho: expected a number in [0, 1], not 3",
        ),
        "table": (["-s", folder, "--csv", "a.txt"], 2, "expected one of: csv"),
        "images": (["-s", folder, "--save_images", "a.pt"], 2, "expected one of: npz"),
        "images over the checkpoint": (
            ["-s", folder, "--save_images", folder / "labels.npz"],
            2,
            "it is a file of the run in",
        ),
        "unknown flag": (["-s", folder, "--step", "3"], 2, "--step"),
    }


def test_bad_input_is_one_line_and_an_exit_code(robust_run, tmp_path):
    folder, _ = robust_run
    before = sorted(path.name for path in folder.rglob("*"))
    for name, (words, code, message) in bad_inputs(folder, tmp_path).items():
        done = script("validate_pgd.py", *words, cwd=tmp_path)
        assert (done.returncode, len(done.stderr.splitlines())) == (code, 1), (
            f"{name}: {done.stderr}"
        )
        assert message in done.stderr, name
        assert sorted(path.name for path in folder.rglob("*")) == before, name


def test_a_report_on_standard_output_is_the_only_output_there(robust_run, tmp_path):
    folder, _ = robust_run
    before = sorted(path.name for path in folder.rglob("*"))
    cases = {
        "-": ("fgsm.py", ["--limit", 10], "robust_top1"),
        "/dev/stdout": ("class_report.py", [], "confusion"),
    }
    for path, (name, words, word) in cases.items():
        done = script(name, "-s", folder, *words, "--json", path, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert word in json.loads(done.stdout)
        assert f"report {path}" in done.stderr
    assert sorted(path.name for path in folder.rglob("*")) == before
    assert list(tmp_path.iterdir()) == []


def test_a_link_gets_the_report_and_its_verdicts_beside_it(robust_run, tmp_path):
    folder, _ = robust_run
    (tmp_path / "reports").mkdir()
    (tmp_path / "latest.json").symlink_to("reports/first.json")
    done = script(
        "fgsm.py", "-s", folder, "--limit", 10, "--json", tmp_path / "latest.json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "latest.json").is_symlink()
    assert json.loads((tmp_path / "reports" / "first.json").read_text())["n"] == 10
    assert len(read_arrays(tmp_path / "latest.verdicts.npz")["label"]) == 10
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("room", [200, 900])
def test_a_full_disk_is_one_line_and_leaves_no_incomplete_file(robust_run, tmp_path, room):
    folder, _ = robust_run
    (tmp_path / "a.json").write_text("old")

    def full():
        # What is printed goes into a file in these tests
        sys.stdout = sys.stderr
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, 1000))

    done = script(
        "fgsm.py", "-s", folder, "--limit", 10, "--json", "a.json", cwd=tmp_path, before=full
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "cannot be written: File too large" in done.stderr
    assert (tmp_path / "a.json").read_text() == "old"
    assert not list(tmp_path.glob("*.verdicts.npz"))
    assert not list(tmp_path.glob("*.incomplete"))


def test_a_full_device_still_prints_the_numbers(robust_run, tmp_path):
    done = script(
        "fgsm.py", "-s", robust_run[0], "--limit", 10, "--json", "/dev/full", cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (
        2,
        "error: /dev/full: cannot be written: No space left on device\n",
    )
    assert done.stdout.splitlines()[-1].startswith("FGSM, linf 8/255 on 10 images: clean ")


def test_a_read_only_run_folder_asks_for_a_file(robust_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(robust_run[0], folder)
    shutil.rmtree(folder / "eval")
    # Not even root can write there
    (folder / "eval").symlink_to("/proc")
    words = ["-s", folder, "--limit", 10]
    done = script("fgsm.py", *words, cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert done.stderr.startswith(f"error: {folder / 'eval'}: cannot be written (")
    assert done.stderr.endswith("; name a file for the report with --json FILE\n")
    done = script("fgsm.py", *words, "--json", "a.json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((tmp_path / "a.json").read_text())["n"] == 10


def own_attack(folder):
    """A file that registers an attack of a user's own."""
    source = (ROOT / "tests" / "own_attacks.py").read_text()
    file = folder / "mine.py"
    file.write_text(
        f'{source}\n\nfrom base.registry import ATTACKS\n\nATTACKS["momentum"] = MomentumFGSM\n'
    )
    return file


def test_a_users_own_attack_with_its_arguments_images_and_table(robust_run, tmp_path):
    words = [
        "-s",
        robust_run[0],
        "--limit",
        12,
        "--json",
        "a.json",
        "--csv",
        "a.csv",
        "--save_images",
        "a.npz",
    ]
    own = [
        "--imports",
        own_attack(tmp_path),
        "--attack",
        "momentum",
        "--set",
        "pgd_attack.momentum=0.5",
        "--steps",
        3,
    ]
    done = script("validate_pgd.py", *words, *own, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].startswith(
        "MomentumFGSM-3, linf 8/255, momentum 0.5 on 12 images: clean "
    )
    report = json.loads((tmp_path / "a.json").read_text())
    assert (report["momentum"], report["steps"], report["step_size"]) == (0.5, 3, None)
    images, verdicts = read_arrays(tmp_path / "a.npz"), read_arrays(tmp_path / "a.verdicts.npz")
    assert images["images"].shape == (12, 3, 16, 16)
    assert np.array_equal(images["prediction"], verdicts["prediction"])
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["position"]) for row in rows] == verdicts["position"].tolist()
    assert {row["label_name"] for row in rows} <= {str(digit) for digit in range(10)}
    assert not list(tmp_path.glob(".*"))


def test_an_attack_that_returns_another_shape_is_one_line(robust_run, tmp_path):
    file = own_attack(tmp_path)
    file.write_text(file.read_text().replace("return points\n", "return points[:, :, 1:]\n"))
    words = ["-s", robust_run[0], "--imports", file, "--attack", "momentum", "--limit", 4]
    done = script("validate_pgd.py", *words, cwd=tmp_path)
    assert done.returncode == 2
    # Only images that are classified correctly are attacked
    line = (
        r"error: MomentumFGSM.perturb: must return images of the shape \((\d), 3, 16, 16\),"
        r" not \(\1, 3, 15, 16\)\n"
    )
    assert re.fullmatch(line, done.stderr)


def test_a_config_chooses_the_attack_and_its_own_defaults(robust_run, tmp_path):
    """Sizes of the checkpoint's PGD mean nothing to another attack."""
    words = ["-s", robust_run[0], "--limit", 4, "--json", tmp_path / "a.json"]
    choice = ["--set", "pgd_attack.type=square", "--set", "pgd_attack.queries=7"]
    done = script("validate_pgd.py", *words, *choice, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads((tmp_path / "a.json").read_text())
    assert (report["attack"], report["queries"], report["loss"]) == ("Square", 7, "margin")


def test_the_originals_long_flags(robust_run, tmp_path):
    words = ["--checkpoint_path", robust_run[0] / "model_best.pth", "--seed", 6, "--limit", 10]
    done = script("fgsm.py", *words, "--result_dir", "saved", "--name", "mine", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "mine_fgsm_linf_8_n10_seed6.json",
        "mine_fgsm_linf_8_n10_seed6.verdicts.npz",
    ]


def test_attacks_on_runs_become_columns(robust_run, tmp_path):
    """As the notebook of the original: PGD and FGSM on every seed of every method, then their means
    and spreads."""
    for seed in (4, 9):
        shutil.copytree(robust_run[0], tmp_path / "runs" / f"{seed}")
        config = json.loads((tmp_path / "runs" / f"{seed}" / "config.json").read_text())
        (tmp_path / "runs" / f"{seed}" / "config.json").write_text(
            json.dumps(config | {"seed": seed})
        )
        for name, steps in (("validate_pgd.py", ["--steps", 3]), ("fgsm.py", [])):
            done = script(
                name,
                "-s",
                tmp_path / "runs" / f"{seed}",
                "--seed",
                seed,
                *steps,
                "--limit",
                20,
                cwd=tmp_path,
            )
            assert done.returncode == 0, done.stderr
    words = ["--eval", "pgd-3", "fgsm", "--last-epoch", "val_top1", "top1", "--table", "a.csv"]
    done = script("plot_training_logs.py", "runs", *words, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    with (tmp_path / "a.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    reports = [
        json.loads(
            (
                tmp_path / "runs" / f"{seed}" / "eval" / f"fgsm_linf_8_n20_seed{seed}.json"
            ).read_text()
        )
        for seed in (4, 9)
    ]
    mean = sum(report["robust_top1"] for report in reports) / 2
    assert float(row["eval.fgsm_linf_8_n20.robust_top1_mean"]) == pytest.approx(mean)
    assert row["eval.pgd-3_linf_8_step_2_1_start_n20.robust_top1_n"] == "2"
    last = json.loads((tmp_path / "runs" / "4" / "metrics.jsonl").read_text().splitlines()[-1])
    assert float(row["last_epoch.top1_mean"]) == last["top1"]
    assert float(row["last_epoch.val_top1_mean"]) == last["val_top1"]


def test_each_training_command_names_the_other_for_its_configs(tmp_path):
    config = ROOT / "configs" / "quickstart.json"
    none = script("train_robust.py", "-c", config, cwd=tmp_path)
    assert (none.returncode, len(none.stderr.splitlines())) == (2, 1)
    assert "add --set adversarial.method=NAME, with one of none, fgsm" in none.stderr
    other = script("train.py", "-c", config, "--set", "adversarial.method=pgd", cwd=tmp_path)
    assert (other.returncode, len(other.stderr.splitlines())) == (2, 1)
    assert "adversarial.method: asks for adversarial training" in other.stderr
    assert "train_robust.py" in other.stderr
