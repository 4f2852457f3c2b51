"""A user's own data sets, with any number of channels, from training to the figures."""

import json
import re
from typing import Any

import numpy as np
import pytest
import torch

import tiny_runs
from base.base_data_loader import BaseDataLoader
from base.checkpoint import load_checkpoint
from base.config import validate
from data_loader import DATA_LOADERS, LabeledImages, MemoryImages, TrainingDataLoader
from experiment.experiment import resume
from models import build_model
from tiny_runs import difference, read_arrays, script

CLASSES = ("left", "middle", "right")


def stripes(train, channels, size=28):
    """Gray images with a bright third, float32 in `[0, 1]`, and their labels."""
    count = 60 if train else 30
    labels = torch.arange(count) % 3
    pixels = (
        torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(int(train)))
        / 2
    )
    for pixel, label in zip(pixels, labels, strict=True):
        pixel[:, :, size * label // 3 : size * (label + 1) // 3] += 0.5
    return pixels, labels


class Given(BaseDataLoader):
    """The shortest loader: two methods and two attributes."""

    class_names = CLASSES

    def __init__(self, channels: int = 1, train: bool = True) -> None:
        self.channels = channels
        self.pixels, self.labels = stripes(train, channels)

    def images_at(self, positions):
        return self.pixels[positions]

    def test_loader(self):
        return Given(self.channels, train=False)


class Read(TrainingDataLoader):
    """Reads its data set, in bytes, and has an argument of its own."""

    def __init__(self, channels: int = 1, **options: Any) -> None:
        self.channels = channels
        super().__init__(**options)

    def read(self, train):
        pixels, labels = stripes(train, self.channels)
        return LabeledImages(MemoryImages((255 * pixels).round().byte()), labels, CLASSES)


@pytest.fixture(autouse=True)
def own_loaders(monkeypatch):
    for loader in (Given, Read):
        monkeypatch.setitem(DATA_LOADERS, loader.__name__, loader)


def config_of(loader="Given", channels=1, **sections):
    tree = {
        "name": "own",
        "seed": 1,
        "arch": {"type": "simpleCNN"},
        "data_loader": {
            "type": loader,
            "args": {"batch_size": 16, "validation_split": 0.2, "channels": channels},
        },
        "optimizer": {"type": "SGD", "args": {"lr": 0.05, "momentum": 0.9}},
        "trainer": {"epochs": 2, "verbosity": 0},
    }
    return validate(tiny_runs.merge(tree, sections))


NOISY = {
    "trainer": {"sym": True, "percent": 0.5, "subset_percent": 0.6},
    "augmentation": {"crop_padding": 2, "flip": False, "cutout": 6, "mixup_alpha": 0.3},
}
ROBUST = {
    "adversarial": {"method": "pgd", "steps": 1, "validate_images": 6, "report_images": 6},
    "pgd_attack": {"K": 1},
    "data_loader": {"args": {"num_batches": 2}},
}


@pytest.mark.parametrize(
    ("loader", "channels", "sections"),
    [("Given", 1, NOISY), ("Read", 1, NOISY), ("Given", 5, ROBUST)],
    ids=["given", "read", "robust"],
)
def test_own_data_trains_and_resumes_bit_for_bit(tmp_path, monkeypatch, loader, channels, sections):
    config = config_of(loader, channels, **sections)
    result = tiny_runs.run(tmp_path / "whole", config)
    assert (result["n_val"], result["n_test"]) == (12, 30)
    checkpoint = load_checkpoint(tmp_path / "whole" / "model_last.pth")
    assert (
        checkpoint["config"]["arch"]["args"]["in_channels"] == len(checkpoint["mean"]) == channels
    )
    if "adversarial" in sections:
        assert 0 <= result["test_robust_top1"] <= result["test_top1"]
    else:
        assert result["n_train"] == 36, (
            "the subset counts the whole training set, and 12 of 60 are held out"
        )
        labels = read_arrays(tmp_path / "whole" / "labels.npz")
        assert (
            result["noise_rate"]
            == np.mean(labels["train_label"] != labels["train_clean_label"])
            > 0.2
        )
    tiny_runs.interrupt(monkeypatch, tmp_path / "parts", config, after=2)
    resume(str(tmp_path / "parts"))
    assert (
        difference(tmp_path / "whole" / "model_last.pth", tmp_path / "parts" / "model_last.pth")
        == []
    )


def test_own_data_is_learned_attacked_drawn_and_measured(tmp_path):
    sections = {"trainer": {"epochs": 6}, "augmentation": {"crop_padding": 1, "flip": False}}
    assert tiny_runs.run(tmp_path / "run", config_of(**sections))["test_top1"] > 0.9
    flags = ("-s", tmp_path / "run" / "model_last.pth", "--limit", 9)
    done = script(
        "validate_pgd.py", *flags, "--figure", tmp_path / "pgd.png", "--steps", 2, cwd=tmp_path
    )
    assert (done.returncode, (tmp_path / "pgd.png").exists()) == (0, True), done.stderr
    for name in ("fgsm.py", "class_report.py", "spectrum.py"):
        measured = script(name, *flags[:2], cwd=tmp_path)
        assert measured.returncode == 0, measured.stderr


def test_foreign_weights_of_one_channel_are_examined(tmp_path):
    """Without mean and std, which are then those of the training images."""
    model = build_model({"type": "simpleCNN", "args": {"in_channels": 1, "num_classes": 3}})
    file = tmp_path / "weights.pth"
    torch.save({f"module.{key}": value for key, value in model.state_dict().items()}, file)
    (tmp_path / "config.json").write_text(json.dumps(config_of().dump()))
    words = ["-s", file, "-c", tmp_path / "config.json", "--json", tmp_path / "report.json"]
    done = script("class_report.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "normalizing by those of the training images" in done.stdout
    mean = json.loads((tmp_path / "report.json").read_text())["normalization"]["mean"]
    assert mean == pytest.approx([float(stripes(True, 1)[0].mean())], abs=1e-6)
    color = config_of(channels=3).dump()
    (tmp_path / "config.json").write_text(json.dumps(color))
    done = script("class_report.py", *words, cwd=tmp_path)
    assert done.returncode == 3
    assert re.fullmatch(
        r".*weights\.pth: does not fit SimpleCNN: size mismatch for features\.0\.weight.*\n",
        done.stderr,
    )
