"""Decoding processes: order, ends of all kinds, and what the main process makes of them."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from base.errors import DataError
from data_loader import workers
from data_loader.images import FileImages

ROOT = Path(__file__).parents[2]
N = 24
BAD = 13
"""The position of the image at which things happen."""


@pytest.fixture(scope="module")
def pixels():
    return torch.randint(0, 256, (N, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def paths(pixels, tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number, image in enumerate(pixels):
        Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0))).save(folder / f"{number}.png")
    return tuple(str(folder / f"{number}.png") for number in range(N))


@pytest.fixture
def images(paths, monkeypatch):
    monkeypatch.setattr(workers, "CHECK_INTERVAL", 0.1)
    monkeypatch.setattr(workers, "WORKER_TIMEOUT", 0.5)
    return FileImages(paths, (3, 6, 6), False, num_workers=2)


@pytest.fixture
def at_bad(paths, monkeypatch):
    """Have the workers do something when they come to the bad image."""

    def arrange(action):
        decode = workers.decode_image

        def decode_or_act(path, *arguments):
            if path == paths[BAD]:
                action()
            return decode(path, *arguments)

        monkeypatch.setattr(workers, "decode_image", decode_or_act)

    return arrange


@pytest.fixture(autouse=True)
def no_process_is_left():
    yield
    assert multiprocessing.active_children() == []


def message_of(images, size=3):
    with pytest.raises(DataError) as caught:
        list(images.batches(torch.arange(N).split(size)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("num_workers", [0, 1, 3, 40])
@pytest.mark.parametrize("size", [1, 5, N])
def test_batches_are_in_order_and_stay_as_they_are(images, pixels, num_workers, size):
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    streamed = FileImages(images.paths, images.shape, False, num_workers)
    batches = list(streamed.batches(order.split(size)))
    assert [len(batch) for batch in batches] == [len(part) for part in order.split(size)]
    assert torch.equal(torch.cat(batches), pixels[order])
    assert list(streamed.batches([])) == []


def die_of(number):
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("action", "end"),
    [
        (die_of(signal.SIGKILL), "died of SIGKILL"),
        (die_of(signal.SIGHUP), "died of SIGHUP"),
        (lambda: os._exit(3), "ended with exit code 3"),
    ],
    ids=["SIGKILL", "SIGHUP", "exit"],
)
def test_a_dead_worker_is_named_with_its_image(images, at_bad, action, end):
    at_bad(action)
    message = message_of(images)
    assert re.fullmatch(
        rf"data_loader\.args\.num_workers: worker [01] \(pid \d+\) {end} at '{images.paths[BAD]}': memory or shared memory may "
        r"have run out \(try fewer\), or the file crashes the decoder",
        message,
    )


def loop_for_ever():
    while True:
        pass


SLEEP = partial(time.sleep, 1000)


@pytest.mark.parametrize("action", [loop_for_ever, SLEEP, die_of(signal.SIGSTOP)], ids=["loop", "sleep", "stop"])
def test_a_hanging_worker_is_named_with_its_image_and_killed(images, at_bad, action):
    at_bad(action)
    begin = time.monotonic()
    message = message_of(images)
    assert time.monotonic() - begin < 5
    told = rf"data_loader\.args\.num_workers: worker [01] \(pid \d+\) hangs at '{images.paths[BAD]}'"
    assert re.fullmatch(rf"{told}: nothing was decoded in 0\.5 s; does the disk answer\?", message)


def test_slow_is_not_hanging(images, at_bad, monkeypatch):
    """One batch takes longer than the timeout, no image does."""
    decode = workers.decode_image
    monkeypatch.setattr(workers, "decode_image", lambda *arguments: time.sleep(0.1) or decode(*arguments))
    assert len(list(images.batches(torch.arange(N).split(N // 2)))) == 2


def test_idle_workers_that_are_suspended_are_named_together(images):
    batches = images.batches(torch.arange(N).split(1))
    next(batches)
    time.sleep(1)  # they have decoded what was asked for
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGSTOP)
    idle = r"worker {} \(pid \d+\) hangs between two batches"
    with pytest.raises(DataError, match=f"{idle.format(0)} or {idle.format(1)}: nothing was decoded"):
        list(batches)


def test_a_death_waits_until_a_batch_is_asked_for(images):
    """It must not raise in the middle of an update."""
    before = signal.getsignal(signal.SIGCHLD)
    batches = images.batches(torch.arange(N).split(1))
    next(batches)
    assert signal.getsignal(signal.SIGCHLD) == before
    time.sleep(1)
    victim = min(worker.pid for worker in multiprocessing.active_children())
    os.kill(victim, signal.SIGKILL)
    time.sleep(0.3)  # here the main process would do its update
    with pytest.raises(DataError, match=rf"worker 0 \(pid {victim}\) died of SIGKILL between two batches"):
        list(batches)


def test_an_error_of_ours_keeps_its_traceback(images, at_bad):
    def fail():
        raise RuntimeError("a mistake in the program")

    at_bad(fail)
    with pytest.raises(RuntimeError, match="a mistake in the program"):
        list(images.batches(torch.arange(N).split(3)))


def test_leaving_early_ends_the_workers(images, at_bad):
    at_bad(loop_for_ever)
    batches = images.batches(torch.arange(N).split(3))
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    del batches


def test_processes_that_cannot_be_started(images, monkeypatch):
    def refuse(_):
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(workers.DataLoader, "__iter__", refuse)
    assert message_of(images) == (
        "data_loader.args.num_workers: 2 processes cannot be started ([Errno 11] Resource temporarily unavailable): try fewer"
    )


def test_a_program_that_crashes_ends_although_its_workers_ignore_sigterm(paths):
    program = f"""if True:
        import torch
        from data_loader.images import FileImages
        batches = FileImages({paths!r}, (3, 6, 6), False, num_workers=2).batches(torch.arange({N}).split(1))
        next(batches)
        raise RuntimeError("a mistake in the program")
    """
    environment = {**os.environ, "PYTHONPATH": "."}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 1
    assert done.stderr.endswith("RuntimeError: a mistake in the program\n")


def test_no_shared_memory_is_one_line(monkeypatch):
    def refuse(self):
        raise RuntimeError("unable to resize file </torch_1_2> to the right size: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    message = r"num_workers: there are no 0.0 MB of shared memory for 2 processes \(unable to resize .*\): try fewer"
    with pytest.raises(DataError, match=message):
        list(workers.decode_in_processes(["a.png"], (3, 8, 8), False, [[0]], 2))
