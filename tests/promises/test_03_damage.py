"""Promise 3: bit rot and truncation are noticed before anything is unpickled. A run resumes from
its newest good checkpoint and reports it; a damaged file that is named is refused; no run ever
starts over by itself.
"""

import random
import shutil

import pytest
import torch

import base.checkpoint.checkpoint as checkpoint_module
from base.checkpoint import load_checkpoint, save_checkpoint
from base.checkpoint.resume import _set_aside, load_to_resume
from base.errors import CheckpointError, ConfigError
from experiment.experiment import resume
from tiny_runs import difference, interrupt, run

CONTENTS = {"state_dict": {"weight": torch.arange(40.0)}, "epoch": 2, "config": {"name": "x"}}


def check_every_byte(folder, monkeypatch):
    """Change each byte of a checkpoint and cut it at many lengths; return the number of files."""
    path, draw = folder / "model.pth", random.Random(0)
    save_checkpoint(path, CONTENTS)
    data = path.read_bytes()
    load = torch.load
    with monkeypatch.context() as patched:
        unpickled = []
        patched.setattr(
            torch, "load", lambda *args, **options: unpickled.append(1) or load(*args, **options)
        )
        damaged = [
            data[:length]
            for length in (*range(2, len(data), 10), *range(len(data) - 120, len(data)))
        ]
        for place, byte in enumerate(data):
            damaged.append(
                data[:place] + bytes([byte ^ 1 << draw.randrange(8)]) + data[place + 1 :]
            )
        for number, changed in enumerate(damaged):
            path.write_bytes(changed)
            with pytest.raises(CheckpointError, match="is damaged"):
                load_checkpoint(path)
            assert not unpickled, f"{number} of {len(damaged)} was unpickled"
    return len(damaged)


def test_every_byte_counts(tmp_path, monkeypatch):
    assert check_every_byte(tmp_path, monkeypatch) > 2000


def test_the_check_can_fail(tmp_path, monkeypatch):
    # torch alone notices nothing
    monkeypatch.setattr(checkpoint_module, "verify_checksum", lambda file, path: True)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check_every_byte(tmp_path, monkeypatch)


def test_a_checksum_cannot_be_left_out_and_foreign_files_have_none(tmp_path):
    path = tmp_path / "model.pth"
    save_checkpoint(path, CONTENTS)
    torch.save(load_checkpoint(path), path)
    with pytest.raises(CheckpointError, match="is damaged: its checksum is missing"):
        load_checkpoint(path)
    # ConvNorm's own
    torch.save({"arch": "CNN", "epoch": 3, "state_dict": {}, "optimizer": {}}, path)
    assert load_checkpoint(path)["epoch"] == 3


def flip(path):
    """Change a byte within a tensor, which torch itself does not notice."""
    data = bytearray(path.read_bytes())
    largest = max(load_checkpoint(path)["state_dict"].values(), key=torch.numel)
    place = data.index(largest.numpy().tobytes()[:64])
    data[place + 3] ^= 1
    # In place, so that all links to the file see it
    path.write_bytes(data)


DAMAGES = {
    "a flipped bit in the middle of an epoch": (7, lambda folder: flip(folder / "model_last.pth")),
    "a flipped bit in a file with three names": (6, lambda folder: flip(folder / "model_last.pth")),
    "a truncated file": (7, lambda folder: (folder / "model_last.pth").write_bytes(b"PK")),
    "a deleted file": (7, lambda folder: (folder / "model_last.pth").unlink()),
    "last and newest": (
        7,
        lambda folder: [flip(folder / name) for name in ("model_last.pth", "model_epoch_2.pth")],
    ),
}


def check_resumes(folder, monkeypatch, config):
    """Resume damaged runs from an older checkpoint; they must end like an undamaged one."""
    run(folder / "whole", config)
    for name, (after, damage) in DAMAGES.items():
        broken = folder / name
        interrupt(monkeypatch, broken, config, after)
        damage(broken)
        resume(str(broken))
        assert "resuming from model_epoch_" in (broken / "info.log").read_text(), name
        for file in ("model_last.pth", "model_best.pth"):
            assert difference(folder / "whole" / file, broken / file) == [], name
        assert (folder / "whole" / "metrics.jsonl").read_bytes() == (
            broken / "metrics.jsonl"
        ).read_bytes(), name


def test_a_run_resumes_from_its_newest_good_checkpoint_and_reports_it(tmp_path, monkeypatch, small):
    check_resumes(
        tmp_path, monkeypatch, small(trainer={"monitor": "min val_loss", "early_stop": 3})
    )


def test_a_damaged_last_checkpoint_is_kept_aside(tmp_path, monkeypatch, small):
    folder, last = tmp_path / "run", tmp_path / "run" / "model_last.pth"
    interrupt(monkeypatch, folder, small(), 7)
    remains = []
    for name in ("model_last.pth.damaged", "model_last.pth.damaged-2"):
        flip(last)
        remains.append((folder / name, last.read_bytes()))
        resume(str(folder))
        assert f"(kept as {name}): resuming from model_epoch_" in (folder / "info.log").read_text()
        load_checkpoint(last)
    assert all(file.read_bytes() == data for file, data in remains)
    last.unlink()
    resume(str(folder))
    assert len(list(folder.glob("*.damaged*"))) == 2, "a missing file is not set aside"


def test_the_check_of_resuming_can_fail(tmp_path, monkeypatch, small):
    monkeypatch.setattr(checkpoint_module, "verify_checksum", lambda file, path: True)
    with pytest.raises(AssertionError):
        check_resumes(tmp_path, monkeypatch, small())


def test_a_run_resumes_without_its_best_model_and_reports_it(tmp_path, monkeypatch, small):
    config, folder = small(trainer={"monitor": "max val_loss"}), tmp_path / "run"
    interrupt(monkeypatch, folder, config, 7)
    contents = load_checkpoint(folder / "model_last.pth")
    # The best epoch by far
    contents["progress"] |= {"best_epoch": 1, "best_value": 99.0}
    save_checkpoint(folder / "model_last.pth", contents)
    flip(folder / "model_best.pth")
    (folder / "model_epoch_1.pth").unlink()
    assert resume(str(folder))["best_since_epoch"] == 3
    assert (
        "it is lost, and the best model is chosen among the epochs from 3 on"
        in (folder / "info.log").read_text()
    )
    assert load_checkpoint(folder / "model_best.pth")["epoch"] == 3
    (folder / "model_best.pth").unlink()
    (folder / "model_epoch_3.pth").unlink()
    assert resume(str(folder))["best_since_epoch"] == 3, (
        "its last epoch is its best, and the final test is run again"
    )


def test_a_named_damaged_file_is_refused_and_no_run_starts_over(tmp_path, monkeypatch, small):
    folder = tmp_path / "run"
    interrupt(monkeypatch, folder, small(), 7)
    flip(folder / "model_last.pth")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(CheckpointError, match="model_last.pth: is damaged"):
        resume(str(folder / "model_last.pth"))
    with pytest.raises(ConfigError, match="already holds a run"):
        run(folder, small())
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    for name in ("model_best.pth", "model_epoch_1.pth", "model_epoch_2.pth"):
        (folder / name).write_bytes(b"")
    with pytest.raises(
        CheckpointError,
        match=r"model_last.pth: is damaged.*nothing better lies beside it \(2 numbered",
    ):
        resume(str(folder))
    for name in ("model_last.pth", "model_best.pth", "model_epoch_1.pth"):
        (folder / name).unlink()
    # One damaged file remains, which a new run must not overwrite
    with pytest.raises(ConfigError, match="already holds a run"):
        run(folder, small())


def test_the_newest_good_checkpoint_is_taken(tmp_path):
    for name, epoch in (
        ("model_epoch_2.pth", 2),
        ("model_epoch_10.pth", 10),
        ("model_best.pth", 11),
    ):
        save_checkpoint(tmp_path / name, {**CONTENTS, "epoch": epoch, "batch": 0})
    taken = []
    for _ in range(3):
        file, contents, problem = load_to_resume(tmp_path)
        assert problem == f"{tmp_path / 'model_last.pth'}: no such checkpoint"
        taken.append(contents["epoch"])
        file.unlink()
    assert taken == [11, 10, 2]
    shutil.copy(__file__, tmp_path / "model_last.pth")
    with pytest.raises(CheckpointError, match="model_last.pth: is not a readable checkpoint"):
        load_to_resume(tmp_path)


def test_no_damaged_checkpoint_replaces_another(tmp_path):
    last, names = tmp_path / "model_last.pth", []
    for number in range(4):
        last.write_bytes(bytes([number]))
        names.append(_set_aside(last))
    ends = ("", "-2", "-3", "-4")
    assert names == [f"model_last.pth.damaged{end}" for end in ends]
    assert [(tmp_path / name).read_bytes() for name in names] == [bytes([n]) for n in range(4)]
