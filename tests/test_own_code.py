"""A user's own parts of every kind, outside the clone, are trained, resumed and measured.

Their code only runs if a config or a flag names it.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from base.checkpoint import load_checkpoint
from tiny_runs import ROOT, python, script

PARTS = """
from torch import nn, optim
from torch.optim import lr_scheduler

from attacks import PGD
from base.registry import (
    ACTIVATION_LAYERS,
    ATTACKS,
    CONV_LAYERS,
    DATA_LOADERS,
    LINEAR_LAYERS,
    LOSSES,
    METRICS,
    MODELS,
    NORM_LAYERS,
    TRAINERS,
)


from trainer.trainer import Trainer
import beside

print("runs", __name__)


class Scale(nn.Module):
    def __init__(self, channels: int, by: float = 1.0) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels)
        self.by = by

    def forward(self, x):
        return self.norm(x) * self.by


class MyNetwork(MODELS["simpleCNN"]):
    pass


class MyDigits(DATA_LOADERS["DigitsDataLoader"]):
    pass


class MyMethod(Trainer):
    pass


class MyAttack(PGD):
    pass


class MyOptimizer(optim.SGD):
    pass


class MySchedule(lr_scheduler.ExponentialLR):
    pass


def my_loss(logits, labels):
    return 2 * nn.functional.cross_entropy(logits, labels, reduction="none")


def my_metric_of_pairs(logits, labels):
    return (logits.argmax(dim=1) // 2 == labels // 2).sum()


NORM_LAYERS["my_norm"] = Scale
CONV_LAYERS["my_conv"] = nn.Conv2d
LINEAR_LAYERS["my_linear"] = nn.Linear
ACTIVATION_LAYERS["my_activation"] = lambda channels, inplace=True: nn.GELU()
MODELS["my_network"] = MyNetwork
DATA_LOADERS["MyDigits"] = MyDigits
LOSSES["my_loss"] = my_loss
METRICS["pairs"] = my_metric_of_pairs
TRAINERS["my_method"] = MyMethod
ATTACKS["my_attack"] = MyAttack
"""
CONFIG = {
    "imports": ["my_parts.py"],
    "arch": {
        "type": "my_network",
        "args": {
            "norm_layer_type": "my_norm",
            "conv_layer_type": "my_conv",
            "linear_layer_type": "my_linear",
            "activation_layer_type": "my_activation",
            "by": 0.5,
        },
    },
    "data_loader": {
        "type": "MyDigits",
        "args": {"batch_size": 32, "num_batches": 2, "validation_split": 0.1},
    },
    "optimizer": {"type": "my_parts.MyOptimizer", "args": {"lr": 0.05}},
    "lr_scheduler": {"type": "my_parts.MySchedule", "args": {"gamma": 0.9}},
    "train_loss": "my_loss",
    "metrics": ["top1", "pairs"],
    "trainer": {"epochs": 1, "verbosity": 0},
    "adversarial": {"method": "my_method", "validate_images": 10, "report_images": 10},
    "pgd_attack": {"type": "my_attack", "K": 2},
    "system": {"device": "cpu"},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A user's folder with its parts, a config and a run."""
    folder = tmp_path_factory.mktemp("user") / "work"
    (folder / "parts").mkdir(parents=True)
    (folder / "parts" / "my_parts.py").write_text(PARTS)
    (folder / "parts" / "beside.py").write_text("")
    (folder / "parts" / "my_config.json").write_text(json.dumps(CONFIG))
    done = script("train_robust.py", "-c", "parts/my_config.json", "--run_dir", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("runs my_parts") == 1
    return folder


def flag(folder):
    return ["--imports", folder / "parts" / "my_parts.py"]


def test_own_parts_of_every_kind_train_and_are_recorded(trained):
    config = json.loads((trained / "run" / "config.json").read_text())
    (code,) = config["imports"]
    assert code["file"] == str(trained / "parts" / "my_parts.py")
    assert re.fullmatch("[0-9a-f]{64}", code["sha256"])
    assert (
        load_checkpoint(trained / "run" / "model_last.pth")["config"]["imports"]
        == config["imports"]
    )
    (line,) = (trained / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["val_pairs"] >= json.loads(line)["val_top1"]
    assert json.loads((trained / "run" / "result.json").read_text())["test_pairs"] > 0


@pytest.mark.parametrize(
    "words",
    [
        ["train_robust.py", "-r", "run"],
        ["train_robust.py", "-r", "run/model_last.pth", "--print-config"],
        ["validate_pgd.py", "-s", "run"],
        ["fgsm.py", "-s", "run"],
        ["class_report.py", "-s", "run"],
        ["spectrum.py", "-s", "run/model_best.pth"],
    ],
    ids=lambda words: " ".join(words),
)
def test_a_checkpoint_that_asks_for_code_is_refused_and_shows_the_flag(trained, words):
    done = script(*words, cwd=trained)
    assert done.returncode == 3
    assert "runs my_parts" not in done.stdout
    (line,) = done.stderr.splitlines()
    assert re.match(r"error: run/model_(best|last).pth: needs a user's own code", line)
    assert f"add --imports {trained / 'parts' / 'my_parts.py'}" in line


def test_with_the_flag_it_is_evaluated_and_reported(trained):
    done = script("validate_pgd.py", "-s", "run", "--limit", 10, *flag(trained), cwd=trained)
    assert (done.returncode, done.stderr) == (0, "")
    assert "MyAttack" in done.stdout
    done = script("class_report.py", "-s", "run", "-c", "run/config.json", cwd=trained)
    assert (done.returncode, done.stderr) == (0, ""), "a run's config that -c names counts as given"
    done = script("plot_training_logs.py", "run", "--table", "table.md", cwd=trained)
    assert done.returncode == 0, done.stderr
    assert "runs my_parts" not in done.stdout, "reports need no code"


def test_it_is_resumed_with_code_that_has_moved_and_changed(trained):
    moved = trained / "moved"
    moved.mkdir()
    for name in ("my_parts.py", "beside.py"):
        (moved / name).write_text((trained / "parts" / name).read_text() + "# changed\n")
    words = ["-r", "run", "--set", "trainer.epochs=2", "--imports", "moved/my_parts.py"]
    done = script("train_robust.py", *words, cwd=trained)
    assert done.returncode == 0, done.stderr
    assert f"imports: {moved / 'my_parts.py'}: has changed since the run started" in done.stdout
    assert json.loads((trained / "run" / "config.json").read_text())["imports"][0]["file"] == str(
        moved / "my_parts.py"
    )


def test_two_processes_import_too(trained):
    quick = ["--set", "adversarial.report=false", "--set", "adversarial.validate_every=0"]
    words = ["-c", "parts/my_config.json", "--set", "n_gpu=2", *quick, "--run_dir", "two"]
    done = python(ROOT / "train_robust.py", *words, cwd=trained)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("runs my_parts") == 3, "the command, and each of its processes"
    assert json.loads((trained / "two" / "result.json").read_text())["test_pairs"] > 0


def test_a_folder_that_hides_a_room_is_one_line(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("")
    done = subprocess.run(
        [sys.executable, "-c", "import base"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    last = done.stderr.splitlines()[-1]
    assert last.endswith(
        f"{tmp_path}/models: hides this project's {Path(ROOT) / 'models'}:"
        " rename it, or start elsewhere"
    )
