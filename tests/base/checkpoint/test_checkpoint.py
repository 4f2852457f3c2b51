"""Checkpoint files are complete or absent, read without running code, or refused in one line."""

import os
import pickle
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

import base.checkpoint.checkpoint as checkpoint_module
import base.checkpoint.find as find_module
from base.checkpoint import find_checkpoint, load_checkpoint, load_weights, save_checkpoint
from base.checkpoint.checkpoint import SCHEMA_VERSION, plain
from base.checkpoint.manager import keep_newest, publish_copy
from base.checkpoint.resume import load_to_resume
from base.errors import CheckpointError

CONTENTS = {"state_dict": {"weight": torch.arange(3.0)}, "epoch": 2}


def test_round_trip_carries_the_schema_version(tmp_path):
    path = tmp_path / "model_last.pth"
    save_checkpoint(path, CONTENTS)
    loaded = load_checkpoint(path)
    assert loaded["schema_version"] == SCHEMA_VERSION
    assert loaded["epoch"] == 2
    assert torch.equal(loaded["state_dict"]["weight"], torch.arange(3.0))
    assert list(tmp_path.iterdir()) == [path], "no temporary file is left"


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed\nat 1")],
)
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, error):
    path = tmp_path / "model_last.pth"
    save_checkpoint(path, CONTENTS)
    before = path.read_bytes()

    def fail(contents, file):
        file.write(b"half of a checkpoint")
        raise error

    monkeypatch.setattr(checkpoint_module.torch, "save", fail)
    with pytest.raises(CheckpointError, match="model_last.pth: cannot be written: ") as caught:
        save_checkpoint(path, {"state_dict": {}, "epoch": 3})
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_second_name_survives_the_replacement_of_the_first(tmp_path):
    last, best = tmp_path / "model_last.pth", tmp_path / "model_best.pth"
    save_checkpoint(last, CONTENTS)
    publish_copy(last, best)
    save_checkpoint(last, {**CONTENTS, "epoch": 3})
    assert (load_checkpoint(best)["epoch"], load_checkpoint(last)["epoch"]) == (2, 3)


def test_only_the_newest_numbered_checkpoints_are_kept(tmp_path):
    names = [f"model_epoch_{epoch}.pth" for epoch in (1, 2, 9, 10, 40)] + [
        "model_best.pth",
        "model_epoch_3.pth.old",
        "notes",
    ]
    for name in names:
        (tmp_path / name).touch()
    keep_newest(tmp_path, 2, epoch=10)
    assert {path.name for path in tmp_path.iterdir()} == set(names) - {
        "model_epoch_1.pth",
        "model_epoch_2.pth",
    }


def test_a_run_folder_stands_for_its_best_or_its_last_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="holds neither model_best.pth nor model_last.pth"):
        find_checkpoint(tmp_path)
    save_checkpoint(tmp_path / "model_last.pth", CONTENTS)
    assert find_checkpoint(tmp_path).name == "model_last.pth"
    save_checkpoint(tmp_path / "model_best.pth", CONTENTS)
    assert find_checkpoint(tmp_path).name == "model_best.pth"
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        find_checkpoint(tmp_path / "absent.pth")


def test_a_folder_above_one_run_stands_for_it(tmp_path):
    run = tmp_path / "saved" / "name" / "run"
    run.mkdir(parents=True)
    save_checkpoint(run / "model_last.pth", CONTENTS)
    (tmp_path / "saved" / "latest").symlink_to(run)
    assert find_checkpoint(tmp_path / "saved") == run / "model_last.pth"
    assert load_to_resume(tmp_path / "saved")[0] == run / "model_last.pth"
    assert not find_checkpoint(run).is_symlink()


def test_a_folder_above_several_runs_names_the_newest_last(tmp_path):
    for age, name in enumerate("fbedac"):
        (tmp_path / name).mkdir()
        save_checkpoint(tmp_path / name / "model_best.pth", CONTENTS)
        os.utime(tmp_path / name / "model_best.pth", (age, age))
    newest = ", ".join(str(tmp_path / name) for name in "bedac")
    for find in (find_checkpoint, load_to_resume):
        with pytest.raises(CheckpointError) as caught:
            find(tmp_path)
        assert (
            str(caught.value)
            == f"{tmp_path}: holds 6 runs: name one, such as (newest last) {newest}"
        )


def test_a_folder_that_cannot_be_read_hides_no_run_beside_it(tmp_path, monkeypatch):
    for name in ("lost+found", "run"):
        (tmp_path / name).mkdir()
    save_checkpoint(tmp_path / "run" / "model_last.pth", CONTENTS)
    has_checkpoint = find_module.has_checkpoint

    def denied(folder):
        if folder.name == "lost+found":
            raise PermissionError(13, "Permission denied")
        return has_checkpoint(folder)

    monkeypatch.setattr(find_module, "has_checkpoint", denied)
    assert find_checkpoint(tmp_path) == tmp_path / "run" / "model_last.pth"
    with pytest.raises(CheckpointError, match="lost.found: cannot be read: .*Permission denied"):
        find_checkpoint(tmp_path / "lost+found")


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("form", ["zip", "pickle"])
def test_reading_runs_no_code(tmp_path, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pth"
    contents = {"state_dict": {}, "epoch": Malicious()}
    if form == "zip":
        torch.save(contents, path)
    else:
        path.write_bytes(pickle.dumps(contents, protocol=2))
    with pytest.raises(CheckpointError, match="is not a readable checkpoint"):
        load_checkpoint(path)
    assert not (tmp_path / "ran").exists()
    if form == "zip":
        torch.load(path, weights_only=False)
        assert (tmp_path / "ran").exists(), "the file would have run code"


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "is not a readable checkpoint"),
        (b"not a checkpoint", "is not a readable checkpoint"),
        ([1, 2], "is not a checkpoint: it holds no 'state_dict'"),
        ({"epoch": 1}, "is not a checkpoint: it holds no 'state_dict'"),
        (
            {**CONTENTS, "schema_version": 99},
            "has schema version 99; this code reads versions up to",
        ),
    ],
)
def test_a_file_that_is_not_a_checkpoint_is_refused(tmp_path, contents, message):
    path = tmp_path / "x.pth"
    if isinstance(contents, bytes):
        path.write_bytes(contents)
    else:
        torch.save(contents, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_truncated_file_is_refused(tmp_path):
    path = tmp_path / "x.pth"
    save_checkpoint(path, {"state_dict": {"weight": torch.rand(1000)}})
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(CheckpointError, match="is damaged: its end is missing or has changed"):
        load_checkpoint(path)


def test_weights_of_another_architecture_name_both_sides():
    model = nn.Linear(2, 3)
    both_sides = (
        r"f.pth: is of another architecture than this Linear:"
        r" it lacks 1 .*\(bias, .* 1 keys.*\(gain,"
    )
    with pytest.raises(CheckpointError, match=both_sides):
        load_weights(model, {"weight": torch.zeros(3, 2), "gain": torch.zeros(1)}, "f.pth")
    with pytest.raises(
        CheckpointError,
        match=r"f.pth: does not fit Linear: size mismatch for weight.*\[4, 2\].*\[3, 2\]",
    ):
        load_weights(model, {"weight": torch.zeros(4, 2), "bias": torch.zeros(3)}, "f.pth")


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."]
)
def test_wrappers_prefixes_are_dropped(prefix):
    model = nn.Linear(2, 3)
    load_weights(
        model,
        {f"{prefix}weight": torch.full((3, 2), 7.0), f"{prefix}bias": torch.zeros(3)},
        "f.pth",
    )
    assert (model.weight == 7).all()


def test_only_plain_values_are_saved():
    mappings = {"c": Counter({3: 1}), "o": OrderedDict(a=(1, [2.0]))}
    value = plain({**mappings, "n": np.float64(0.5), "t": nn.Parameter(torch.ones(1))})
    assert value["c"] == {3: 1}
    assert type(value["c"]) is dict
    assert type(value["o"]) is dict
    assert value["o"]["a"] == (1, [2.0])
    assert type(value["n"]) is float
    assert not value["t"].requires_grad
    with pytest.raises(TypeError, match="not object"):
        plain({"x": object()})
