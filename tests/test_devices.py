# ruff: noqa: E501
"""Whole runs on a GPU that is not there (see `fake_device`): nothing mixes devices, and no training step waits for the device."""

import pytest
import torch
import torch._dynamo  # imports itself in the first backward pass otherwise, in the middle of the modes
from fake_device import fake_device

from attacks import APGD, PGD, Square
from base.base_trainer import BaseTrainer
from experiment import Experiment
from models import build_model
from tiny_runs import config_of, run

METHODS = {
    "standard": {},
    "mixup, OCNN": {
        "augmentation": {"mixup_alpha": 0.5, "cutout": 4},
        "trainer": {"OCNN": True, "epochs": 1, "ema_decay": 0.9},
    },
    "free": {
        "adversarial": {
            "method": "free",
            "noise": "carry",
            "validate_images": 20,
            "report_images": 20,
        }
    },
    "fgsm": {"adversarial": {"method": "fgsm", "validate_images": 20, "report_images": 20}},
    "pgd": {
        "adversarial": {"method": "pgd", "steps": 2, "validate_images": 20, "report_images": 20}
    },
    "trades": {
        "adversarial": {"method": "trades", "steps": 2, "validate_images": 20, "report_images": 20}
    },
}
QUICK = {"trainer": {"epochs": 1, "ema_decay": 0.9}, "pgd_attack": {"K": 2}}


@pytest.mark.parametrize("kind", ["cuda", "mps"])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_stays_on_its_device_and_a_step_never_waits(method, kind, monkeypatch, tmp_path):
    seen = []
    with fake_device(monkeypatch, kind) as fake:
        for cls in {cls for cls in _subclasses(BaseTrainer) if "train_batch" in vars(cls)}:

            def train_batch(self, *batch, plain=cls.train_batch):
                before = fake.waits + fake.copies
                result = plain(self, *batch)
                seen.append((fake.waits + fake.copies) - before)
                return result

            monkeypatch.setattr(cls, "train_batch", train_batch)
        system = {
            "system": {
                "device": kind,
                "precision": "fp32" if kind == "mps" else "bf16",
                "channels_last": True,
            }
        }
        run(tmp_path / "run", config_of(**{**QUICK, **METHODS[method], **system}))
    assert seen
    if kind == "cuda":
        assert not sum(seen, start=type(seen[0])()), sum(seen, start=type(seen[0])())


@pytest.mark.parametrize("conv", ["conv", "prec_conv", "sn_conv", "oni_conv", "own_conv"])
def test_layers_do_not_wait(conv, monkeypatch):
    with fake_device(monkeypatch) as fake:
        model = build_model({"type": "simpleCNN", "args": {"conv_layer_type": conv}}).to("cuda")
        images = torch.rand(4, 3, 32, 32, device="cuda")
        model(images)  # tables are made once
        fake.forget()
        model(images).sum().backward()
    assert sum(fake.waits.values()) == (6 if conv == "own_conv" else 0), (
        fake.waits
    )  # eigh, once in a layer


@pytest.mark.parametrize(
    ("attack", "most"),
    [
        (PGD(8 / 255, 2 / 255, 4), 0),
        (PGD(8 / 255, 2 / 255, 4, restarts=3), 0),
        (PGD(1 / 255, 0.25 / 255, 4, early_stop=True), 1),
        (APGD(1 / 255, 8), 1),
        (Square(1 / 255, 8), 1),
    ],
)
def test_an_attack_waits_only_so_often_in_a_step(attack, most, monkeypatch):
    with fake_device(monkeypatch) as fake:
        model = build_model({"type": "simpleCNN", "args": {}}).to("cuda").eval()
        images = torch.rand(8, 3, 32, 32, device="cuda")
        labels = model(images).argmax(dim=1)
        fake.forget()
        attack(model, images, labels)
    # One more at the beginning of a restart, and two for the checks of images and labels
    steps = getattr(attack, "steps", 8)
    assert sum(fake.waits.values()) <= most * (steps + 1) + 2, fake.waits
    assert not fake.copies, fake.copies


def test_batches_come_without_waiting(monkeypatch):
    augmentation = {"crop_padding": 3, "flip": True, "cutout": 4}
    with fake_device(monkeypatch) as fake:
        loader = Experiment.from_config(
            config_of(augmentation=augmentation, system={"device": "cuda"})
        ).train_loader
        batches = iter(loader)
        next(batches)  # with which an epoch's order comes
        fake.forget()
        images, labels = next(batches)
        assert images.device.type == labels.device.type == "cuda"
    assert not fake.waits + fake.copies, fake.waits + fake.copies


def _subclasses(cls):
    return {cls}.union(*map(_subclasses, cls.__subclasses__()))
