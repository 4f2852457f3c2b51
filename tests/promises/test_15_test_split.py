"""Promise 15: the test split never influences training, selection or schedule, and no test image is
looked at before training ends."""

import json
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

from base.checkpoint import load_checkpoint
from base.config import validate
from base.config.tree import merge
from data_loader import ImageFolderDataLoader, data_loaders, training_data_loader
from data_loader.images import MemoryImages, pixel_statistics
from data_loader.training_data_loader import TrainingDataLoader
from experiment import experiment

CLASSES = ("ant", "bee", "cow")
RUN = {
    "name": "blind",
    "seed": 3,
    "arch": {"type": "simpleCNN", "args": {"conv_layer_type": "conv", "norm_layer_type": "bn"}},
    "data_loader": {
        "type": "ImageFolderDataLoader",
        "args": {"batch_size": 8, "validation_split": 0.25},
    },
    "optimizer": {"type": "SGD", "args": {"lr": 0.05, "momentum": 0.9}},
    "trainer": {"epochs": 6, "verbosity": 0},
}
STANDARD = {
    "lr_scheduler": {"type": "ReduceLROnPlateau", "args": {"patience": 0, "factor": 0.3}},
    "trainer": {
        "sym": True,
        "percent": 0.3,
        "early_stop": 3,
        "ema_decay": 0.9,
        "monitor": "max val_top1",
        "save_period": 1,
    },
    "augmentation": {"crop_padding": 1, "flip": True},
}
FGSM = {
    "lr_scheduler": {
        "type": "ReduceLROnPlateau",
        "args": {"patience": 0, "factor": 0.3, "mode": "max"},
        "monitor": "val_robust_top1",
    },
    "optimizer": {"args": {"lr": 0.01}},
    "trainer": {"epochs": 4, "ema_decay": 0.9, "monitor": "max val_robust_top1"},
    "adversarial": {
        "method": "fgsm",
        "validate_every": 1,
        "validate_images": 9,
        "report_images": 9,
    },
    "pgd_attack": {"K": 2},
}


def write_part(folder, per_class, seed):
    """Write classes of noisy images that differ in color."""
    shutil.rmtree(folder, ignore_errors=True)
    for number, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for image in range(per_class):
            noise = np.random.default_rng([seed, number, image]).integers(0, 200, (8, 8, 3))
            noise[..., number] += 40
            Image.fromarray(noise.astype(np.uint8)).save(folder / name / f"{image:03}.png")


@contextmanager
def looking_on(test_images):
    """Count the test images that the loaders yield, `[during training, afterwards]`."""
    handed_out, phase = [0, 0], 0
    batches, final_test = MemoryImages.batches, experiment.run_final_test

    def watched(images, positions):
        for pixels in batches(images, positions):
            handed_out[phase] += sum(image.numpy().tobytes() in test_images for image in pixels)
            yield pixels

    def begun(*arguments):
        nonlocal phase
        phase = 1
        return final_test(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryImages, "batches", watched)
        patch.setattr(experiment, "run_final_test", begun)
        yield handed_out


def files_of(run):
    return {path.name: path for path in run.glob("model_*.pth")}


def difference(first, second, where=""):
    """Return the names of values that differ between two checkpoints, wall-clock time aside."""
    if isinstance(first, dict):
        if first.keys() != second.keys():
            return [where]
        keys = [key for key in first if key != "train_seconds"]
        return [
            name for key in keys for name in difference(first[key], second[key], f"{where}.{key}")
        ]
    if isinstance(first, (list, tuple)):
        if len(first) != len(second):
            return [where]
        return [
            name
            for i, pair in enumerate(zip(first, second, strict=True))
            for name in difference(*pair, f"{where}.{i}")
        ]
    same = torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second
    return [] if same else [where]


def check_training_is_blind_to_the_test_split(folder, sections, looking=True):
    """Run twice on one folder, whose test images are replaced in between: other pixels, another
    number."""
    data = folder / "data"
    write_part(data / "train", 16, seed=0)
    tree = merge(merge(RUN, sections), {"data_loader": {"args": {"data_dir": str(data)}}})
    results, runs = [], [folder / "first", folder / "second"]
    for number, run in enumerate(runs):
        write_part(data / "test", (5, 9)[number], seed=10 + number)
        test_images = {
            np.asarray(Image.open(path)).transpose(2, 0, 1).tobytes()
            for path in (data / "test").rglob("*.png")
        }
        with looking_on(test_images) as handed_out:
            results.append(experiment.Experiment.from_config(validate(tree)).run(str(run)))
        assert not looking or handed_out[0] == 0, "test images were looked at before training ended"
        assert handed_out[1] >= len(test_images), "and after it, they were not"
    first, second = runs
    metrics = (first / "metrics.jsonl").read_bytes()
    assert metrics == (second / "metrics.jsonl").read_bytes(), (
        "other values in training or validation"
    )
    assert files_of(first).keys() == files_of(second).keys() >= {"model_last.pth", "model_best.pth"}
    for name, path in files_of(first).items():
        # The digest of the test set is saved, but only a resume reads it.
        told = difference(load_checkpoint(path), load_checkpoint(second / name))
        assert told == [".image_fingerprints.test images"], name
    named = {"labels.npz": np.load, "config.json": lambda path: json.loads(path.read_text())}
    for name, read in named.items():
        ours, theirs = (read(run / name) for run in runs)
        assert all(np.array_equal(ours[key], theirs[key]) for key in ours), name
    ours, theirs = results
    told_of_the_test_set = {key for key in ours if "test" in key}
    for key in ours.keys() - told_of_the_test_set - {"train_seconds", "images_per_second"}:
        assert ours[key] == theirs[key], key
    assert (ours["n_test"], theirs["n_test"]) == (15, 27)
    losses = [key for key in told_of_the_test_set if key.endswith("test_loss")]
    assert len(losses) == 4
    assert all(ours[key] != theirs[key] for key in losses)
    rates = [json.loads(line)["lr"] for line in metrics.decode().splitlines()]
    assert len(set(rates)) > 1, (
        "the schedule has never reacted to validation, so this shows nothing"
    )
    return len(files_of(first))


@pytest.mark.parametrize(
    ("sections", "checkpoints"), [(STANDARD, 2), (FGSM, 2)], ids=["standard", "fgsm"]
)
def test_training_is_blind_to_the_test_split(tmp_path, sections, checkpoints):
    assert check_training_is_blind_to_the_test_split(tmp_path, sections) >= checkpoints


def validate_on_test(patch):
    patch.setattr(TrainingDataLoader, "split_validation", lambda loader: loader.test_loader())


def statistics_of_test(patch):
    of_test = property(lambda loader: pixel_statistics(loader.read(train=False).images))
    patch.setattr(TrainingDataLoader, "_statistics", of_test)


def a_look_at_test(patch):
    """A look at the test images counts even if it changes nothing."""
    statistics = TrainingDataLoader._statistics.func

    def look_first(loader):
        test = loader.read(train=False).images
        next(test.in_memory(torch.device("cpu")).batches([torch.arange(1)]))
        return statistics(loader)

    patch.setattr(TrainingDataLoader, "_statistics", property(look_first))


@pytest.mark.parametrize("sections", [STANDARD, FGSM], ids=["standard", "fgsm"])
@pytest.mark.parametrize("broken", [validate_on_test, statistics_of_test])
def test_the_check_can_fail_by_influence(tmp_path, monkeypatch, broken, sections):
    broken(monkeypatch)
    with pytest.raises(AssertionError, match="other values in training or validation"):
        check_training_is_blind_to_the_test_split(tmp_path, sections, looking=False)


@pytest.mark.parametrize("broken", [validate_on_test, a_look_at_test])
def test_the_check_can_fail_by_a_look(tmp_path, monkeypatch, broken):
    broken(monkeypatch)
    with pytest.raises(AssertionError, match="test images were looked at before training ended"):
        check_training_is_blind_to_the_test_split(tmp_path, STANDARD)


def check_statistics_are_blind_to_the_size_of_the_test_split(folder, monkeypatch):
    """Mean and standard deviation come from all images if these are in memory, otherwise from a
    sample. The number of test images must not decide which."""
    monkeypatch.setattr(training_data_loader, "STATISTICS_SAMPLE", 10)
    write_part(folder / "train", 16, seed=0)
    cases = 0
    for limit in (30, 47, 48, 49, 60, 200):
        monkeypatch.setattr(data_loaders, "MEMORY_LIMIT", limit * 3 * 8 * 8)
        seen = set()
        for per_class in (1, 4, 30):
            write_part(folder / "test", per_class, seed=1)
            loader = ImageFolderDataLoader(folder, 8, validation_split=0.25, seed=3)
            seen.add(
                (
                    loader.mean,
                    loader.std,
                    loader.fingerprint(),
                    isinstance(loader.images, MemoryImages),
                )
            )
            cases += 1
        assert len(seen) == 1
    return cases


def test_statistics_are_blind_to_the_size_of_the_test_split(tmp_path, monkeypatch):
    assert check_statistics_are_blind_to_the_size_of_the_test_split(tmp_path, monkeypatch) == 18


def test_the_check_can_fail_for_statistics(tmp_path, monkeypatch):
    def all_together(loader, n_images):
        return (n_images + len(loader._test_part.images)) * 3 * 8 * 8 <= data_loaders.MEMORY_LIMIT

    monkeypatch.setattr(ImageFolderDataLoader, "_fits_in_memory", all_together)
    with pytest.raises(AssertionError):
        check_statistics_are_blind_to_the_size_of_the_test_split(tmp_path, monkeypatch)
