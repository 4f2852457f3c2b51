"""Promise 8: a checkpoint of another architecture, other classes, optimizer, scheduler, data,
schema version or device, or with a wrapper's prefix, is handled or refused, naming both sides.
"""

import shutil

import pytest
import torch

import base.checkpoint.resume as resume_module
from base.checkpoint import load_checkpoint, save_checkpoint
from base.checkpoint.checkpoint import SCHEMA_VERSION
from base.errors import CheckpointError, ConfigError
from experiment.experiment import resume
from tiny_runs import difference, interrupt, run

RESNET = {
    "arch": {
        "type": "preact_resnet18",
        "args": {"conv_layer_type": "conv", "norm_layer_type": "bn"},
    }
}


def change(key, value):
    def changed(contents):
        *path, last = key.split(".")
        for name in path:
            contents = contents[name]
        contents[last] = value

    return changed


def rename(contents):
    weights = contents["state_dict"]
    weights["other.weight"] = weights.pop(next(iter(weights)))


def enlarge(contents):
    name = next(iter(contents["state_dict"]))
    contents["state_dict"][name] = torch.zeros(7, *contents["state_dict"][name].shape)


def cut(contents):
    entry = next(iter(contents["optimizer"]["state"].values()))
    entry["momentum_buffer"] = entry["momentum_buffer"][:1]


def without(key):
    def removed(contents):
        *path, last = key.split(".")
        for name in path:
            contents = contents[name]
        del contents[last]

    return removed


REFUSED = {
    "architecture": (
        [],
        [("arch.type", "vgg11")],
        r"arch.type is 'simpleCNN' there and 'vgg11' in this config",
    ),
    "layers": (
        [],
        [("arch.args.norm_layer_type", "in")],
        r"arch.args.norm_layer_type is 'gn' there and 'in' in this config",
    ),
    "optimizer": ([], [("optimizer.type", "RMSprop")], r"'SGD'; 'RMSprop' would make it"),
    "optimizer's state": (
        [change("optimizer_type", "Adam")],
        [],
        r"trained with optimizer_type Adam, this config has SGD",
    ),
    "schedule": (
        [change("scheduler_type", "StepLR")],
        [],
        r"trained with scheduler_type StepLR, this config has none",
    ),
    "newer schema": (
        [change("schema_version", 99)],
        [],
        rf"version 99; this code reads versions up to {SCHEMA_VERSION}",
    ),
    "names of weights": (
        [rename],
        [],
        r"it lacks 1 of the model's keys .* it has 1 keys .* \(other.weight",
    ),
    "shape of weights": (
        [enlarge],
        [],
        r"does not fit SimpleCNN: size mismatch for .*torch.Size\(\[7, .*torch.Size",
    ),
    "labels": (
        [change("fingerprint", "other")],
        [],
        r"was trained on other images or labels than data_loader.args.data_dir",
    ),
    "pixels": (
        [change("mean", [0.1, 0.2, 0.3])],
        [],
        r"was trained on other images or labels than data_loader.args.data_dir",
    ),
    "training images": (
        [change("image_fingerprints.training images", "other")],
        [],
        r"now holds: training images",
    ),
    "test images": (
        [change("image_fingerprints.test images", "other")],
        [],
        r"now holds: test images",
    ),
    "renamed class": (
        [change("class_names", ["a", "b\n", "c"])],
        [],
        r"now holds: class 1 is 'b\\n' there, 'b' here",
    ),
    "one class less": (
        [change("class_names", ["a", "b"])],
        [],
        r"now holds: class 2 is None there, 'c' here",
    ),
    "channels": (
        [change("mean", [0.5]), change("std", [0.5])],
        [],
        r"now holds: mean or std of the pixels",
    ),
    "shape of momentum": (
        [cut],
        [],
        r"optimizer.state.*momentum_buffer: is of shape \(1,.* but \(.* was expected",
    ),
    "number of epochs": (
        [change("epoch", 2)],
        [],
        r"epoch 2 and batch 1, but 'progress' is 1 epochs and 1 batches",
    ),
    "averaged weights": (
        [without("ema_state_dict")],
        [],
        r"'ema_state_dict' is missing, but trainer.ema_decay needs",
    ),
    "average's updates": ([without("ema_updates")], [], r"'ema_updates' is missing"),
    "generator": (
        [change("rng.cpu", torch.zeros(5056, dtype=torch.uint8))],
        [],
        r"rng: is not a valid state of a torch generator",
    ),
    "config": (
        [change("config.trainer.epochs", "many")],
        [],
        r"trainer.epochs: .* the checkpoint's own config cannot be used",
    ),
    "config's form": (
        [change("config.name", torch.zeros(1))],
        [],
        r"'config' is of type dict: a value of type Tensor",
    ),
    "kind of value": (
        [change("progress", [1])],
        [],
        r"is not a checkpoint: 'progress' is of type list",
    ),
    "no training state": (
        [lambda contents: contents.pop("progress")],
        [],
        r"holds no training state",
    ),
    "classes": ([], [("num_classes", "7")], r"num_classes|classes"),
    "seed": (
        [],
        [("seed", "9")],
        r"^--set seed=9: seed: the run was started with 3; 9 would make it another experiment",
    ),
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, small):
    """A folder with an interrupted run and the same run without an interruption."""
    folder = tmp_path_factory.mktemp("mismatches")
    run(folder / "whole", small())
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, folder / "stopped", small(), 4)
    return folder


def check_refused(folder, copy, changes, overrides, message):
    shutil.copytree(folder / "stopped", copy)
    file = copy / "model_last.pth"
    contents = load_checkpoint(file)
    for apply in changes:
        apply(contents)
    version = contents["schema_version"]
    save_checkpoint(file, contents)
    if version != SCHEMA_VERSION:
        torch.save(contents, file)
    before = {path.name: path.read_bytes() for path in copy.iterdir() if path.is_file()}
    with pytest.raises((CheckpointError, ConfigError), match=message) as refused:
        resume(str(file), overrides=overrides)
    assert "\n" not in str(refused.value)
    after = {path.name: path.read_bytes() for path in copy.iterdir() if path.is_file()}
    assert before == after, "a refused resume has written something"


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_belong_to_a_run_is_refused_and_both_sides_are_named(stopped, tmp_path, what):
    check_refused(stopped, tmp_path / "copy", *REFUSED[what])


def test_the_check_can_fail(stopped, tmp_path, monkeypatch):
    monkeypatch.setattr(resume_module, "check_same_experiment", lambda *args: None)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check_refused(stopped, tmp_path / "copy", *REFUSED["seed"])


def prefixed(contents):
    contents["state_dict"] = {
        f"module._orig_mod.{key}": value for key, value in contents["state_dict"].items()
    }


def check_handled(folder, copy, apply, tag=None):
    """Resume with a changed checkpoint; the run must end like an uninterrupted one."""
    shutil.copytree(folder / "stopped", copy)
    contents = load_checkpoint(copy / "model_last.pth")
    apply(contents)
    with pytest.MonkeyPatch.context() as patch:
        if tag:
            # As if the tensors had been on that device
            patch.setattr(torch.serialization, "location_tag", lambda storage: tag)
        save_checkpoint(copy / "model_last.pth", contents)
    resume(str(copy / "model_last.pth"))
    assert difference(folder / "whole" / "model_last.pth", copy / "model_last.pth") == []


def without_names(contents):
    """Number the optimizer's state and drop image fingerprints, as the first of version 2 did."""
    optimizer = contents["optimizer"]
    names = [name for group in optimizer["param_groups"] for name in group["params"]]
    optimizer["state"] = {number: optimizer["state"][name] for number, name in enumerate(names)}
    for group in optimizer["param_groups"]:
        group["params"] = [names.index(name) for name in group["params"]]
    del contents["image_fingerprints"]


HANDLED = {
    "state by number": (without_names, None),
    "prefixes of wrappers": (prefixed, None),
    "a CUDA device that is not here": (lambda contents: None, "cuda:7"),
    "an older schema": (change("schema_version", 1), None),
    "nothing": (lambda contents: None, None),
}


@pytest.mark.parametrize("what", HANDLED)
def test_what_only_looks_different_is_handled(stopped, tmp_path, what):
    check_handled(stopped, tmp_path / "copy", *HANDLED[what])


def test_the_check_of_devices_can_fail(stopped, tmp_path, monkeypatch):
    load = torch.load
    monkeypatch.setattr(
        torch, "load", lambda *args, **options: load(*args, **{**options, "map_location": None})
    )
    with pytest.raises(CheckpointError, match="is not a readable checkpoint"):
        check_handled(stopped, tmp_path / "copy", *HANDLED["a CUDA device that is not here"])
