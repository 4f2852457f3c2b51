"""Runs on a GPU that is not there (see `fake_device`): nothing mixes devices, and no training step
waits for the device or copies from memory that is not pinned. Then nine faults, each of which fails
one of these checks."""

from collections import Counter

import pytest
import torch

# The first backward pass would import it, in the middle of the modes
import torch._dynamo
from fake_device import fake_device

import base.base_trainer
from attacks import APGD, PGD, Square
from base import meters
from base.base_trainer import BaseTrainer
from base.errors import ConfigError
from base.nan_guard import NanGuard
from data_loader import augment
from evaluation.batches import Batches
from experiment import Experiment
from models import build_model
from models.layers.conv_norm import ConvNorm2d, kernel_energy
from tiny_runs import config_of, run, write_images

pytestmark = pytest.mark.usefixtures("only_few_digits")

CONV_NORM = {"conv_layer_type": "prec_conv", "norm_layer_type": "no"}
BATCH_NORM = {"conv_layer_type": "conv", "norm_layer_type": "bn"}
FEW = {"validate_images": 8, "report_images": 8}
AUGMENTATION = {"crop_padding": 1, "flip": True, "cutout": 2}
METHODS = {
    "standard": {"arch": {"args": CONV_NORM}, "augmentation": AUGMENTATION},
    "mixup and OCNN": {
        "arch": {"args": BATCH_NORM},
        "augmentation": {"mixup_alpha": 0.5},
        "trainer": {"OCNN": True, "ema_decay": 0.9},
    },
    "free": {"arch": {"args": BATCH_NORM}, "adversarial": {"method": "free", "noise": "carry"}},
    "fgsm": {"arch": {"args": BATCH_NORM}, "adversarial": {"method": "fgsm"}},
    "pgd": {"arch": {"args": CONV_NORM}, "adversarial": {"method": "pgd", "steps": 2}},
    "trades": {"arch": {"args": BATCH_NORM}, "adversarial": {"method": "trades", "steps": 2}},
}
KERNELS_PER_STEP = {"bn": 96, "prec_conv": 320}
"""The most operators of a training step of simpleCNN, forward, backward and optimizer."""


def config_on(kind, **sections):
    if "adversarial" in sections:
        sections["adversarial"] = {**FEW, **sections["adversarial"]}
    precision = "fp32" if kind == "mps" else "bf16"
    sections["trainer"] = {"epochs": 1, **sections.get("trainer", {})}
    return config_of(
        pgd_attack={"K": 2},
        system={"device": kind, "precision": precision, "channels_last": True},
        **sections,
    )


def subclasses(cls):
    return {cls}.union(*map(subclasses, cls.__subclasses__()))


def run_on(fake, monkeypatch, folder, config):
    """Run, and return what its `mixup` and `train_batch` waited for and copied."""
    seen = Counter()
    calls = Counter()

    def watch(cls, name):
        plain = getattr(cls, name)

        def watched(self, *batch):
            before = fake.waits + fake.copies
            result = plain(self, *batch)
            seen.update((fake.waits + fake.copies) - before)
            calls[name] += 1
            return result

        monkeypatch.setattr(cls, name, watched)

    watch(BaseTrainer, "mixup")
    for cls in subclasses(BaseTrainer):
        if "train_batch" in vars(cls):
            watch(cls, "train_batch")
    run(folder, config)
    assert calls["mixup"] == calls["train_batch"] == 3
    return seen


@pytest.mark.parametrize("kind", ["cuda", "mps"])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_stays_on_its_device_and_a_step_never_waits(method, kind, monkeypatch, tmp_path):
    with fake_device(monkeypatch, kind) as fake:
        seen = run_on(fake, monkeypatch, tmp_path / "run", config_on(kind, **METHODS[method]))
    # MPS has no pinned memory
    if kind == "cuda":
        assert not seen


@pytest.mark.parametrize(
    ("conv", "waits"),
    [("conv", 0), ("prec_conv", 0), ("sn_conv", 0), ("oni_conv", 0), ("own_conv", 6)],
)
def test_layers_wait_for_nothing_but_own_for_its_eigenvalues(conv, waits, monkeypatch):
    with fake_device(monkeypatch) as fake:
        model = build_model({"type": "simpleCNN", "args": {"conv_layer_type": conv}}).to("cuda")
        images = torch.rand(4, 3, 32, 32, device="cuda")
        # Tables of constants are made once
        model(images)
        fake.forget()
        model(images).sum().backward()
    assert sum(fake.waits.values()) == waits, fake.waits


@pytest.mark.parametrize(
    ("attack", "waits_per_step"),
    [
        (PGD(8 / 255, 2 / 255, 4), 0),
        (PGD(8 / 255, 2 / 255, 4, restarts=3), 0),
        (PGD(1 / 255, 0.25 / 255, 4, early_stop=True), 1),
        (APGD(1 / 255, 8), 1),
        (Square(1 / 255, 8), 1),
    ],
)
def test_an_attack_waits_only_so_often_in_a_step(attack, waits_per_step, monkeypatch):
    with fake_device(monkeypatch) as fake:
        model = build_model({"type": "simpleCNN", "args": {}}).to("cuda").eval()
        images = torch.rand(8, 3, 32, 32, device="cuda")
        labels = model(images).argmax(dim=1)
        fake.forget()
        attack(model, images, labels)
    # One more at the beginning of a restart, and two for the checks of images and labels
    steps = getattr(attack, "steps", 8)
    assert sum(fake.waits.values()) <= waits_per_step * (steps + 1) + 2, fake.waits
    assert not fake.copies, fake.copies


def next_batch(fake, processes=1, **sections):
    """Load the last of `processes`' share of an epoch's second batch, and return what that waited
    for and copied."""
    config = config_of(augmentation=AUGMENTATION, system={"device": "cuda"}, **sections)
    loader = Experiment.from_config(config).train_loader
    batches = iter(loader.shard(processes - 1, processes))
    # The epoch's order comes with the first
    next(batches)
    fake.forget()
    images, labels = next(batches)
    assert images.device.type == labels.device.type == "cuda"
    return fake.waits + fake.copies


@pytest.mark.parametrize("processes", [1, 2])
def test_batches_come_without_waiting(processes, monkeypatch):
    with fake_device(monkeypatch) as fake:
        assert not next_batch(fake, processes)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_image_files_come_without_waiting(workers, monkeypatch, tmp_path):
    write_images(tmp_path / "train", {"a": 12, "b": 12})
    write_images(tmp_path / "test", {"a": 2, "b": 2})
    args = {"data_dir": str(tmp_path), "in_memory": False, "num_workers": workers}
    with fake_device(monkeypatch) as fake:
        assert not next_batch(
            fake, data_loader={"type": "ImageFolderDataLoader", "args": {**args, "batch_size": 4}}
        )


def test_an_evaluation_copies_from_pinned_memory(monkeypatch):
    batches = [(torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64)) for _ in range(2)]
    with fake_device(monkeypatch) as fake:
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2)).to("cuda")
        fake.forget()
        found = list(Batches(batches, model))
    assert [batch.images.shape for batch in found] == [(4, 3, 8, 8)] * 2
    assert not fake.copies, fake.copies


@pytest.mark.parametrize(("layers", "most"), KERNELS_PER_STEP.items())
def test_a_training_step_has_few_kernels(layers, most, monkeypatch, tmp_path):
    args = CONV_NORM if layers == "prec_conv" else BATCH_NORM
    with fake_device(monkeypatch) as fake:
        config = config_of(arch={"args": args}, system={"device": "cuda", "precision": "fp32"})
        trainer = Experiment.from_config(config).build_trainer(tmp_path)
        images, labels = next(iter(trainer.train_loader))
        trainer.train_batch(images, labels)
        fake.forget()
        trainer.train_batch(images, labels)
    assert 0.8 * most < sum(fake.kernels.values()) <= most, fake.kernels


# Each fault is one that torch would show on a card only


def left_on_the_cpu(monkeypatch, name):
    """Leave the random numbers of a function of `augment` where they are drawn."""
    plain = getattr(augment, name)

    def faulty(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(augment, "to_device", lambda tensor, device: tensor)
            return plain(*arguments)

    monkeypatch.setattr(augment, name, faulty)


def pageable_copies(monkeypatch):
    monkeypatch.setattr(augment, "to_device", lambda tensor, device: tensor.to(device))


def guard_read_after_every_step(monkeypatch):
    check = NanGuard.check

    def faulty(self, *args):
        check(self, *args)
        self.check_pending()

    monkeypatch.setattr(NanGuard, "check", faulty)


def rampdown_that_reads_its_counter(monkeypatch):
    rampdown = ConvNorm2d._rampdown
    monkeypatch.setattr(ConvNorm2d, "_rampdown", lambda self: float(rampdown(self)))


def energy_tables_on_the_cpu(monkeypatch):
    make = kernel_energy._make_tables
    monkeypatch.setattr(
        kernel_energy, "_cached_tables", lambda *arguments: make(*arguments[:-1], "cpu")
    )


def float64_tables(monkeypatch):
    make = kernel_energy._make_tables
    monkeypatch.setattr(
        kernel_energy,
        "_cached_tables",
        lambda kernel, size, dilation, dtype, device: make(
            kernel, size, dilation, torch.float64, device
        ),
    )


def float64_sums(monkeypatch):
    monkeypatch.setattr(meters, "_sum_dtype", lambda device: torch.float64)


def mixup_weight_read_from_the_device(monkeypatch):
    lerp = torch.lerp

    def faulty(start, end, weight):
        return lerp(start, end, float(torch.full((), weight, device=start.device)))

    monkeypatch.setattr(base.base_trainer.torch, "lerp", faulty)


TWO_DEVICES = "tensors on two devices"


def test_crop_places_left_on_the_cpu_are_found(monkeypatch):
    with fake_device(monkeypatch) as fake:
        left_on_the_cpu(monkeypatch, "random_crop")
        assert "positions on the CPU" in str(next_batch(fake))


def test_a_flip_mask_left_on_the_cpu_is_found(monkeypatch):
    with fake_device(monkeypatch) as fake:
        left_on_the_cpu(monkeypatch, "random_flip")
        with pytest.raises(RuntimeError, match=TWO_DEVICES):
            next_batch(fake)


def test_pageable_copies_are_found(monkeypatch):
    with fake_device(monkeypatch) as fake:
        pageable_copies(monkeypatch)
        assert "from ordinary memory" in str(next_batch(fake))


@pytest.mark.parametrize(
    ("fault", "method"),
    [
        (guard_read_after_every_step, "standard"),
        (rampdown_that_reads_its_counter, "standard"),
        (mixup_weight_read_from_the_device, "mixup and OCNN"),
    ],
)
def test_a_wait_in_a_step_is_found(fault, method, monkeypatch, tmp_path):
    with fake_device(monkeypatch) as fake:
        fault(monkeypatch)
        seen = run_on(fake, monkeypatch, tmp_path / "run", config_on("cuda", **METHODS[method]))
    assert "_local_scalar_dense" in str(seen)


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (energy_tables_on_the_cpu, "cuda", TWO_DEVICES),
        (float64_tables, "mps", "MPS has no float64"),
        (float64_sums, "mps", "MPS has no float64"),
    ],
)
def test_a_tensor_of_the_wrong_kind_is_found(fault, kind, message, monkeypatch, tmp_path):
    with fake_device(monkeypatch, kind):
        fault(monkeypatch)
        # Before training a network is tried, and what goes wrong there is a ConfigError
        with pytest.raises((ConfigError, TypeError), match=message):
            run(tmp_path / "run", config_on(kind, **METHODS["standard"]))
