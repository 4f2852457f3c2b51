"""Promise 9: a loader worker that dies or hangs ends the run, in one line that names the worker and
its image."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from base.errors import DataError
from data_loader import workers
from data_loader.decoding import decode_image
from data_loader.images import FileImages
from tiny_runs import Fork, impatient_workers, write_images

ROOT = Path(__file__).parents[2]
PROC = pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="the workers of a process are read from /proc"
)


def refused(images):
    """Read the images, which must raise an error of one line, and return the line."""
    try:
        list(images.batches(torch.arange(len(images)).split(3)))
    except DataError as error:
        text = str(error)
    except Exception as error:
        raise AssertionError(f"not a DataError but {error!r}") from None
    else:
        raise AssertionError("read to the end")
    assert "\n" not in text
    return text


@contextmanager
def at_most(seconds):
    def too_long(*_):
        raise AssertionError(f"hangs for more than {seconds} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


HANG = 200
"""Seconds after which a test has failed: far more than it needs on a busy machine."""

# Replaced by a test that breaks it
give_up = impatient_workers


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(workers, "CHECK_INTERVAL", 0.1)


def check_dead_and_hanging_workers_are_named(folder, monkeypatch):
    write_images(folder, {"ant": 12})
    paths = tuple(str(path) for path in sorted(folder.rglob("*.png")))
    decode, cases = decode_image, 0

    def refused_at(position, action, num_workers, end):
        def decode_or_act(path, *arguments):
            if path == paths[position]:
                action()
            return decode(path, *arguments)

        monkeypatch.setattr(workers, "decode_image", decode_or_act)
        images = FileImages(paths, (3, 8, 8), False, num_workers)
        with monkeypatch.context() as patched, at_most(HANG):
            if end == "hangs":
                give_up(patched, position)
            text = refused(images)
        assert re.fullmatch(
            rf"data_loader\.args\.num_workers: worker [0-2] \(pid \d+\) {end} at"
            rf" '{paths[position]}': .*",
            text,
        )
        assert multiprocessing.active_children() == []

    for position, num_workers in ((0, 1), (5, 2), (11, 3)):
        refused_at(
            position, lambda: os.kill(os.getpid(), signal.SIGKILL), num_workers, "died of SIGKILL"
        )
        refused_at(position, lambda: os._exit(7), num_workers, "ended with exit code 7")
        refused_at(position, lambda: os.kill(os.getpid(), signal.SIGSTOP), num_workers, "hangs")
        cases += 3
    monkeypatch.setattr(workers, "decode_image", decode)
    Path(paths[7]).unlink()
    os.mkfifo(paths[7])  # opening it waits for a writer forever
    images = FileImages(paths, (3, 8, 8), False, num_workers=2)
    give_up(monkeypatch, 7)
    with at_most(HANG):
        assert f"hangs at '{paths[7]}': " in refused(images)
    assert multiprocessing.active_children() == []
    return cases + 1


def test_dead_and_hanging_workers_are_named_with_their_image(tmp_path, monkeypatch, impatient):
    assert check_dead_and_hanging_workers_are_named(tmp_path, monkeypatch) == 10


@pytest.mark.parametrize(
    "broken",
    [
        lambda patch: patch.setattr(workers._Worker, "describe", lambda *_: "some worker hangs"),
        lambda patch: patch.setattr(workers, "_receive", lambda worker, *_: worker.pipe.recv()),
        lambda patch: (
            patch.setitem(globals(), "give_up", lambda *_: None),
            patch.setitem(globals(), "at_most", briefly),
        ),
    ],
    ids=["image not named", "workers not watched", "no timeout"],
)
def test_the_check_can_fail_for_workers(tmp_path, monkeypatch, impatient, broken):
    broken(monkeypatch)
    with pytest.raises(AssertionError):
        check_dead_and_hanging_workers_are_named(tmp_path, monkeypatch)


LONG_ENOUGH = at_most


def briefly(_):
    return LONG_ENOUGH(2.5)


def check_a_run_ends_with_its_worker(folder, preparation):
    write_images(folder / "train", {"ant": 100, "bee": 100})
    write_images(folder / "test", {"ant": 2, "bee": 2})
    program = "\n".join(
        (
            "import runpy, data_loader.workers as workers",
            preparation,
            "runpy.run_path('train.py', run_name='__main__')",
        )
    )
    loader = {
        "type": "ImageFolderDataLoader",
        "args.data_dir": folder,
        "args.in_memory": "false",
        "args.num_workers": 2,
    }
    settings = {
        f"data_loader.{key}": value for key, value in {**loader, "args.batch_size": 1}.items()
    }
    settings |= {
        "arch.type": "simpleCNN",
        "trainer.epochs": 10_000,
        "trainer.verbosity": 0,
        "augmentation": "null",
    }
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    words += ["-c", "configs/quickstart.json", "--run_dir", str(folder / "run")]
    process = Fork(
        [sys.executable, "-c", program, *words],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        killed = []
        deadline = time.monotonic() + HANG
        while (
            not (folder / "run" / "model_last.pth").exists()
            and process.poll() is None
            and time.monotonic() < deadline
        ):
            time.sleep(0.02)
        while process.poll() is None and time.monotonic() < deadline:
            pids = children.read_text().split()[:1]
            time.sleep(0.1)  # one that is just being started would be named otherwise
            for pid in set(pids) & set(children.read_text().split()):
                os.kill(int(pid), signal.SIGKILL)
                killed.append(pid)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(3)
        _, errors = process.communicate(timeout=HANG)
        assert process.returncode == 4, errors
        assert errors.count("\n") == 1
        assert re.match(
            r"error: data_loader\.args\.num_workers: worker [01] \(pid \d+\) died of SIGKILL ",
            errors,
        )
        assert any(f"(pid {pid})" in errors for pid in killed)
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@PROC
def test_a_run_ends_with_exit_code_4_when_its_worker_is_killed(tmp_path):
    check_a_run_ends_with_its_worker(tmp_path, "")


@PROC
def test_the_check_can_fail_for_runs(tmp_path):
    broken = "workers._receive = lambda worker, *_: worker.pipe.recv()"
    with pytest.raises(AssertionError):
        check_a_run_ends_with_its_worker(tmp_path, broken)
