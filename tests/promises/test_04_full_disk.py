"""Promise 4: a full disk, or a folder that is missing or read-only, is one line; the previous
checkpoint is intact; the problem is reported before training starts if it can be known.
"""

import json
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import base.checkpoint.checkpoint as checkpoint_module
import base.checkpoint.manager as manager_module
from base.base_trainer import BaseTrainer
from base.checkpoint import load_checkpoint, save_checkpoint
from base.errors import CheckpointError
from experiment.experiment import resume
from tiny_runs import TINY, difference, exit_code, forked, run

ROOT = Path(__file__).parents[2]


def limit_file_size(size):
    """Limit the files of this process; torch and the system report it like a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def check_fills_up(folder, monkeypatch, config):
    """Fill the disk in the second epoch, when each of the files is written in turn."""
    run(folder / "whole", config)
    finish = BaseTrainer._finish_epoch
    sizes = {"checkpoint": 60_000, "run log": 200, "first byte": 1}
    for name, size in sizes.items():

        def fill_up(self, log, size=size):
            if self.state.epochs_done == 1:
                limit_file_size(size)
            finish(self, log)

        with monkeypatch.context() as patched:
            patched.setattr(BaseTrainer, "_finish_epoch", fill_up)
            assert exit_code(forked(lambda name=name: run(folder / name, config))) == 3, name
        assert load_checkpoint(folder / name / "model_last.pth")["epoch"] == 1, name
        assert not list((folder / name).rglob("*.incomplete")), name
        resume(str(folder / name))
        assert (
            difference(folder / "whole" / "model_last.pth", folder / name / "model_last.pth") == []
        ), name
        assert (folder / "whole" / "metrics.jsonl").read_bytes() == (
            folder / name / "metrics.jsonl"
        ).read_bytes(), name


def test_a_disk_that_fills_up_costs_nothing(tmp_path, monkeypatch, small):
    check_fills_up(tmp_path, monkeypatch, small())


def test_a_checkpoint_that_cannot_be_written_says_why(tmp_path):
    def fill_up():
        limit_file_size(60_000)
        with pytest.raises(CheckpointError, match="model.pth: cannot be written: .*File too large"):
            save_checkpoint(tmp_path / "model.pth", {"state_dict": {"weight": torch.ones(10**5)}})

    assert exit_code(forked(fill_up)) == 0


def test_the_check_can_fail(tmp_path, monkeypatch, small):
    @contextmanager
    def in_place(path):
        with path.open("w+b") as file:
            yield file

    monkeypatch.setattr(checkpoint_module, "replacing", in_place)
    with pytest.raises((AssertionError, CheckpointError)):
        check_fills_up(tmp_path, monkeypatch, small())


def train(folder, *before):
    (folder / "config.json").write_text(
        json.dumps({**TINY, "trainer": {"epochs": 1}, "system": {"num_threads": 1}})
    )
    words = [
        sys.executable,
        str(ROOT / "train.py"),
        "-c",
        str(folder / "config.json"),
        "--run_dir",
        str(folder / "disk" / "run"),
    ]
    return subprocess.run([*before, *words], capture_output=True, text=True, timeout=120)


def test_a_file_system_without_room_is_reported_before_training(tmp_path):
    """The first checkpoint does not fit on a real file system of 64 kB."""
    (tmp_path / "disk").mkdir()
    mount = f'mount -t tmpfs -o size=64k none "{tmp_path}/disk" && exec "$@"'
    new = ["unshare", "-rm", "sh", "-c"]
    if (
        not shutil.which("unshare")
        or subprocess.run([*new, mount, "sh", "true"], capture_output=True).returncode != 0
    ):
        pytest.skip("no file system can be mounted here")
    done = train(tmp_path, *new, mount, "sh")
    assert done.returncode == 3, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "model_last.pth: cannot be written: No space left on device" in done.stderr
    assert "epoch 1" not in done.stdout


def test_room_for_one_checkpoint_only_is_reported_before_training(tmp_path, monkeypatch, small):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        manager_module.shutil, "disk_usage", lambda folder: usage._replace(free=1000)
    )
    message = r"its disk is full: a checkpoint takes 0\.\d MB beside the last one, 0.0 MB are free"
    with pytest.raises(CheckpointError, match=message):
        run(tmp_path / "run", small())
    assert load_checkpoint(tmp_path / "run" / "model_last.pth")["progress"]["images_seen"] == 0


def test_a_folder_that_is_gone_is_one_line(tmp_path, monkeypatch, small):
    finish = BaseTrainer._finish_epoch

    def without_folder(self, log):
        shutil.rmtree(self.folder)
        finish(self, log)

    monkeypatch.setattr(BaseTrainer, "_finish_epoch", without_folder)
    with pytest.raises(
        CheckpointError, match="model_last.pth: cannot be written: .*No such file or directory"
    ):
        run(tmp_path / "run", small())
