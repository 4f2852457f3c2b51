"""spectrum.py and class_report.py as a user runs them, from another folder.

tests/test_attack_scripts.py tests the flags that they share with the attack commands.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from base.checkpoint import save_checkpoint
from tiny_runs import script

pytestmark = pytest.mark.usefixtures("only_few_digits")

ROOT = Path(__file__).parents[1]
ORIGINAL = ROOT / "tests" / "golden" / "original_checkpoint_prec_conv" / "model_best.pth"


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "run"
    short = [
        "--set",
        "trainer.epochs=2",
        "--set",
        "data_loader.args.num_batches=8",
        "--set",
        "system.num_threads=1",
    ]
    settings = [*short, "--set", "trainer.ema_decay=0.5", "--set", "system.precision=fp32"]
    done = script(
        "train.py",
        "-c",
        ROOT / "configs" / "quickstart.json",
        "--run_dir",
        folder,
        *settings,
        cwd=folder.parent,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_spectrum_of_a_run(digits_run, tmp_path):
    words = [
        "-s",
        digits_run,
        "--json",
        tmp_path / "new" / "a.json",
        "--figure",
        tmp_path / "a.png",
        "--tolerance",
        "1e-6",
    ]
    done = script("spectrum.py", *words, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads((tmp_path / "new" / "a.json").read_text())
    layers = {layer["name"]: layer for layer in report["layers"]}
    weight = torch.load(digits_run / "model_best.pth", weights_only=True)["state_dict"][
        "classifier.weight"
    ]
    exact = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    assert layers["classifier"]["norm"] == pytest.approx(exact[0], rel=1e-6)
    assert layers["classifier"]["mean_square"] == pytest.approx((exact**2).mean(), rel=1e-6)
    assert layers["features.0"]["type"] == "ConvNorm2d"
    assert layers["features.0.bpconv"]["batch_norm_scale"] > 0
    assert all(layer["converged"] for layer in report["layers"])
    norms = [layer["norm"] for layer in report["layers"]]
    assert report["log10_product_of_norms"] == pytest.approx(np.log10(norms).sum())
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:14]] == list(layers)
    assert lines[-1].startswith("13 layers: spectral norm ")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_classes_of_a_run(digits_run, tmp_path):
    done = script(
        "class_report.py",
        "-s",
        digits_run,
        "--json",
        tmp_path / "a.json",
        "--figure",
        tmp_path / "a.svg",
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads((tmp_path / "a.json").read_text())
    result = json.loads((digits_run / "result.json").read_text())
    assert report["top1"] == pytest.approx(result["test_top1"])
    confusion = np.array(report["confusion"])
    assert confusion.sum() == report["n"] == result["n_test"]
    assert confusion.trace() / report["n"] == pytest.approx(report["top1"])
    assert done.stdout.splitlines()[-1].startswith(
        f"10 classes, {report['n']} images: top-1 {report['top1']:.2%}"
    )
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")


def test_averaged_weights_have_other_scores(digits_run, tmp_path):
    for name, words in (("last", []), ("ema", ["--ema"])):
        done = script(
            "spectrum.py",
            "-s",
            digits_run,
            *words,
            "--json",
            tmp_path / f"{name}.json",
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
    last, ema = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("last", "ema"))
    assert (last["ema"], ema["ema"]) == (False, True)
    assert last["log10_product_of_norms"] != ema["log10_product_of_norms"]


@pytest.mark.parametrize("name", ["spectrum.py", "class_report.py"])
def test_an_original_checkpoint_with_its_config(name, tmp_path):
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
    digits = [
        "--set",
        "data_loader.type=DigitsDataLoader",
        "--set",
        "data_loader.args.data_dir=none",
    ]
    done = script(name, "-s", ORIGINAL, "-c", tmp_path / "config.json", *digits, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "normalizing by those of CIFAR-10" in done.stdout.splitlines()[0]
    assert done.stdout.splitlines()[-1].startswith(("13 layers: ", "10 classes, "))


def bad_inputs(folder, tmp_path):
    checkpoint = torch.load(folder / "model_best.pth", weights_only=True)
    broken = {
        key: value * float("nan") if key == "classifier.weight" else value
        for key, value in checkpoint["state_dict"].items()
    }
    save_checkpoint(tmp_path / "nan.pth", {**checkpoint, "state_dict": broken})
    save_checkpoint(tmp_path / "pets.pth", {**checkpoint, "class_names": ["cat", "dog"]})
    return {
        "spectrum.py": {
            "tolerance": (
                ["-s", folder, "--tolerance", "0"],
                2,
                "--tolerance: expected a number between 0 and 1, not 0.0",
            ),
            "not finite": (
                ["-s", tmp_path / "nan.pth"],
                5,
                "classifier: its weights or running statistics are infinite",
            ),
            "figure format": (
                ["-s", folder, "--figure", tmp_path / "a.bmp"],
                2,
                "is not a format of pictures",
            ),
        },
        "class_report.py": {
            "no config": (["-s", ORIGINAL], 2, "-c CONFIG: required"),
            "other classes": (
                ["-s", tmp_path / "pets.pth"],
                4,
                "the model was trained on cat, dog",
            ),
            "nothing": ([], 2, "-s/--checkpoint"),
        },
    }


def test_bad_input_is_one_line_and_an_exit_code(digits_run, tmp_path):
    before = sorted(path.name for path in digits_run.rglob("*"))
    for report, cases in bad_inputs(digits_run, tmp_path).items():
        for name, (words, code, message) in cases.items():
            done = script(report, *words, cwd=tmp_path)
            assert (done.returncode, len(done.stderr.splitlines())) == (code, 1), (
                f"{report}, {name}: {done.stderr}"
            )
            assert message in done.stderr, f"{report}, {name}"
    assert sorted(path.name for path in digits_run.rglob("*")) == before


def test_classes_of_a_model_that_answers_with_nan(digits_run, tmp_path):
    """A report is written in which every image is wrong, and it says why."""
    bad_inputs(digits_run, tmp_path)
    words = [
        "-s",
        tmp_path / "nan.pth",
        "--json",
        tmp_path / "a.json",
        "--figure",
        tmp_path / "a.png",
    ]
    done = script("class_report.py", *words, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    assert (report["top1"], report["without_answer"], report["reliable"]) == (0, report["n"], False)
    assert np.array(report["confusion"]).sum() == 0
    assert f"warning: {report['warnings'][0]}" in done.stdout
    assert "logits" in report["warnings"][0]
    assert (tmp_path / "a.png").exists()
