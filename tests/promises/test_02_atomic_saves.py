"""Promise 2: a save is atomic. `kill -9` at any moment leaves a loadable newest checkpoint;
incomplete files of dead processes are removed; other files are never touched.
"""

import itertools
import os
import random
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import base.atomic as atomic_module
import base.checkpoint.checkpoint as checkpoint_module
from base.atomic import sweep
from base.checkpoint import load_checkpoint, save_checkpoint
from base.checkpoint.writer import CheckpointWriter
from base.errors import CheckpointError
from tiny_runs import forked

BASE = str(Path(atomic_module.__file__).parent)
LINES, MOMENTS = 60, 60


def contents(number):
    return {"state_dict": {"weight": torch.full((50_000,), float(number))}, "epoch": number}


def killed_at_line(count, path):
    """Save in another process, which kills itself after `count` lines; return whether it did.

    Lines of this project's code and of torch's writer count, in the writing thread.
    """

    def trace(frame, event, argument):
        nonlocal count
        name = frame.f_code.co_filename
        if not (name.startswith(BASE) or name.endswith("torch/serialization.py")):
            return None
        count -= event == "line"
        if count < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    def save():
        threading.settrace(trace)
        writer = CheckpointWriter()
        writer.write(path, contents(2))
        writer.join()

    _, status = os.waitpid(forked(save), 0)
    return os.WIFSIGNALED(status)


def lines_of_a_save(path):
    low, high = 0, 1
    while killed_at_line(high, path):
        low, high = high, high * 2
    while high - low > 8:
        middle = (low + high) // 2
        low, high = (middle, high) if killed_at_line(middle, path) else (low, middle)
    return high


def whole(path):
    saved = load_checkpoint(path)
    return bool((saved["state_dict"]["weight"] == saved["epoch"]).all())


def check_every_line(folder):
    path = folder / "model_last.pth"
    save_checkpoint(path, contents(1))
    lines = lines_of_a_save(path)
    random_lines = random.Random(0).sample(range(lines), LINES - 20)
    # The last ones flush and rename
    for line in sorted([*random_lines, *range(lines - 20, lines)]):
        save_checkpoint(path, contents(1))
        killed_at_line(line, path)
        assert whole(path), f"line {line} of {lines}"


def check_every_moment(folder):
    """Kill another process while it saves without a pause, also within torch's and system code.

    The process reports the start of each save, so that it is not killed before the first.
    """
    path, draw = folder / "model_last.pth", random.Random(0)
    save_checkpoint(path, contents(0))
    newest = 0
    for _ in range(MOMENTS):
        started, report = os.pipe()

        def save_on(first=newest, report=report):
            writer = CheckpointWriter()
            for number in itertools.count(first + 1):
                # It returns when the one before is complete
                writer.write(path, contents(number))
                os.write(report, b".")

        process = forked(save_on)
        os.close(report)
        finished = draw.randrange(3)
        for _ in range(finished + 1):
            assert os.read(started, 1) == b"."
        # Some point within a save
        time.sleep(draw.uniform(0, 0.005))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(started)
        assert whole(path)
        assert load_checkpoint(path)["epoch"] >= newest + finished
        newest = load_checkpoint(path)["epoch"]


def test_kill_9_at_any_line_and_any_moment(tmp_path):
    for name, check in (("lines", check_every_line), ("moments", check_every_moment)):
        (tmp_path / name).mkdir()
        check(tmp_path / name)


def test_the_check_can_fail(tmp_path, monkeypatch):
    @contextmanager
    def in_place(path):
        with path.open("w+b") as file:
            yield file

    monkeypatch.setattr(checkpoint_module, "replacing", in_place)
    for number, check in enumerate((check_every_line, check_every_moment)):
        (tmp_path / str(number)).mkdir()
        with pytest.raises((AssertionError, CheckpointError)):
            check(tmp_path / str(number))


def check_sweep(folder):
    killed = killed_at_line(
        lines_of_a_save(folder / "model_last.pth") - 20, folder / "model_last.pth"
    )
    assert killed
    incomplete = [path for path in folder.iterdir() if path.name.endswith(".incomplete")]
    assert incomplete, "a killed save leaves its temporary file"
    sleeper = forked(signal.pause)
    kept = [
        "notes.txt",
        ".hidden",
        "model_last.pth.bak",
        ".swp.incomplete",
        "model_last.pth.1.incomplete",
        ".cache.12.tmp",
        f".model_best.pth.{sleeper}.incomplete",
        f".labels.npz.{os.getpid()}.incomplete",
    ]
    for name in kept:
        (folder / name).write_bytes(b"keep me")
    sweep(folder)
    os.kill(sleeper, signal.SIGKILL)
    os.waitpid(sleeper, 0)
    left = {path.name for path in folder.iterdir()}
    assert not [path for path in incomplete if path.exists()]
    assert set(kept) <= left
    sweep(folder)
    assert f".model_best.pth.{sleeper}.incomplete" not in {
        path.name for path in folder.iterdir()
    }, "its process is dead now"


def test_incomplete_files_of_dead_processes_are_removed_and_nothing_else(tmp_path):
    check_sweep(tmp_path)


@pytest.mark.parametrize("broken", [lambda process: True, lambda process: False])
def test_the_check_of_removal_can_fail(tmp_path, monkeypatch, broken):
    monkeypatch.setattr(atomic_module, "_is_alive", broken)
    with pytest.raises(AssertionError):
        check_sweep(tmp_path)
