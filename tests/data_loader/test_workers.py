"""Decoding processes: order, deaths of all kinds, and how the main process reports them."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from base.errors import DataError
from data_loader import workers
from data_loader.images import FileImages
from tiny_runs import impatient_workers

ROOT = Path(__file__).parents[2]
N = 24
BAD = 13
"""The position of the image at which a worker fails."""


@pytest.fixture(scope="module")
def pixels():
    return torch.randint(
        0, 256, (N, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


@pytest.fixture(scope="module")
def paths(pixels, tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number, image in enumerate(pixels):
        Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0))).save(folder / f"{number}.png")
    return tuple(str(folder / f"{number}.png") for number in range(N))


@pytest.fixture
def images(paths, monkeypatch):
    monkeypatch.setattr(workers, "CHECK_INTERVAL", 0.1)
    return FileImages(paths, (3, 6, 6), False, num_workers=2)


@pytest.fixture
def at_bad(paths, monkeypatch):
    """Make the workers do something when they reach the bad image."""

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
    def die():
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)  # the tests may have inherited SIG_IGN
        os.kill(os.getpid(), number)

    return die


def wait_until_idle(patience, log, decoded):
    """Wait until the workers have decoded all requested images."""
    current = patience.decoders[-1].current
    while len(log.read_bytes()) < decoded or set(current.tolist()) != {workers.IDLE}:
        time.sleep(0.01)


@pytest.fixture
def log(tmp_path, monkeypatch):
    """A file that gets a byte for every image that the workers have decoded."""
    file, decode = tmp_path / "decoded", workers.decode_image
    file.touch()

    def decode_and_log(*arguments):
        image = decode(*arguments)
        with file.open("ab") as opened:
            opened.write(b".")
        return image

    monkeypatch.setattr(workers, "decode_image", decode_and_log)
    return file


@pytest.mark.parametrize(
    ("action", "end"),
    [
        (die_of(signal.SIGKILL), "died of SIGKILL"),
        (die_of(signal.SIGUSR1), "died of SIGUSR1"),
        (lambda: os._exit(3), "ended with exit code 3"),
    ],
    ids=["SIGKILL", "SIGUSR1", "exit"],
)
def test_a_dead_worker_is_named_with_its_image(images, at_bad, action, end):
    at_bad(action)
    message = message_of(images)
    assert re.fullmatch(
        rf"data_loader\.args\.num_workers: worker [01] \(pid \d+\) {end} at"
        rf" '{images.paths[BAD]}': memory or shared memory may have run out \(try fewer\),"
        r" or the file crashes the decoder",
        message,
    )


def loop_forever():
    while True:
        pass


SLEEP = partial(time.sleep, 1000)


@pytest.mark.parametrize(
    "action", [loop_forever, SLEEP, die_of(signal.SIGSTOP)], ids=["loop", "sleep", "stop"]
)
def test_a_hanging_worker_is_named_with_its_image_and_killed(images, at_bad, action, monkeypatch):
    impatient_workers(monkeypatch, BAD)
    at_bad(action)
    message = message_of(images)
    hangs = (
        rf"data_loader\.args\.num_workers: worker [01] \(pid \d+\) hangs at '{images.paths[BAD]}'"
    )
    assert re.fullmatch(rf"{hangs}: nothing was decoded in 0\.5 s; does the disk answer\?", message)


@pytest.mark.parametrize(("checks_per_image", "hangs"), [(5, False), (8, True)])
def test_slow_is_not_hanging(monkeypatch, checks_per_image, hangs):
    """A batch takes longer than WORKER_TIMEOUT, but a worker hangs only if it is at one image for
    that long."""
    monkeypatch.setattr(workers, "CHECK_INTERVAL", 0.25)
    monkeypatch.setattr(workers, "WORKER_TIMEOUT", 1.25)
    decoder = workers._Decoder(
        ["image"] * 7, False, [list(range(7))], torch.zeros(1), torch.tensor([workers.IDLE])
    )
    process = SimpleNamespace(sentinel=0, pid=1)
    worker = SimpleNamespace(number=0, pipe=None, process=process)
    worker.describe = partial(workers._Worker.describe, worker)
    checks = iter([position for position in range(7) for _ in range(checks_per_image)])

    def wait(*_):
        position = next(checks, None)
        if position is None:
            worker.pipe = SimpleNamespace(recv=lambda: None)
            return [worker.pipe]
        decoder.current[0] = position
        return []

    monkeypatch.setattr(workers, "wait", wait)
    error = workers._receive(worker, [worker], decoder)
    assert (error is not None and "hangs at 'image'" in str(error)) == hangs


def test_idle_workers_that_are_suspended_are_named_together(images, log, monkeypatch):
    patience = impatient_workers(monkeypatch, None)
    batches = images.batches(torch.arange(N).split(1))
    next(batches)
    wait_until_idle(patience, log, 1 + 2 * workers.AHEAD)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGSTOP)
    idle = r"worker {} \(pid \d+\) hangs between two batches"
    with pytest.raises(
        DataError, match=f"{idle.format(0)} or {idle.format(1)}: nothing was decoded"
    ):
        list(batches)


def test_a_death_is_reported_when_the_next_batch_is_requested(images, log, monkeypatch):
    """It must not raise in the middle of an update."""
    patience = impatient_workers(monkeypatch, BAD)
    before = signal.getsignal(signal.SIGCHLD)
    batches = images.batches(torch.arange(N).split(1))
    next(batches)
    assert signal.getsignal(signal.SIGCHLD) == before
    wait_until_idle(patience, log, 1 + 2 * workers.AHEAD)
    victim = min(worker.pid for worker in multiprocessing.active_children())
    os.kill(victim, signal.SIGKILL)
    # Here the main process would do its update
    os.waitid(os.P_PID, victim, os.WEXITED | os.WNOWAIT)
    with pytest.raises(
        DataError, match=rf"worker 0 \(pid {victim}\) died of SIGKILL between two batches"
    ):
        list(batches)


def test_a_programming_error_keeps_its_traceback(images, at_bad):
    def fail():
        raise RuntimeError("a mistake in the program")

    at_bad(fail)
    with pytest.raises(RuntimeError, match="a mistake in the program"):
        list(images.batches(torch.arange(N).split(3)))


def test_leaving_early_ends_the_workers(images, at_bad):
    at_bad(loop_forever)
    batches = images.batches(torch.arange(N).split(3))
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    del batches


def test_an_interrupt_while_workers_start_ends_them(images, monkeypatch):
    start = workers._Worker.__init__

    def start_and_interrupt(*arguments):
        start(*arguments)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(workers._Worker, "__init__", start_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(images.batches(torch.arange(N).split(3)))


def test_processes_that_cannot_be_started_are_one_line(images, monkeypatch):
    def refuse(_):
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(workers.Process, "start", refuse)
    assert message_of(images) == (
        "data_loader.args.num_workers: 2 processes cannot be started"
        " ([Errno 11] Resource temporarily unavailable): try fewer"
    )


def test_a_program_that_crashes_ends_although_its_workers_ignore_sigterm(paths):
    program = f"""if True:
        import torch
        from data_loader.images import FileImages
        images = FileImages({paths!r}, (3, 6, 6), False, num_workers=2)
        batches = images.batches(torch.arange({N}).split(1))
        next(batches)
        raise RuntimeError("a mistake in the program")
    """
    environment = {**os.environ, "PYTHONPATH": "."}
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 1
    assert done.stderr.endswith("RuntimeError: a mistake in the program\n")


def test_no_shared_memory_is_one_line(monkeypatch):
    def refuse(self):
        raise RuntimeError(
            "unable to resize file </torch_1_2> to the right size: No space left on device (28)"
        )

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    message = (
        r"num_workers: cannot get 0.0 MB of shared memory for 2 processes"
        r" \(unable to resize .*\): try fewer"
    )
    with pytest.raises(DataError, match=message):
        list(workers.decode_in_processes(["a.png"], (3, 8, 8), False, [[0]], 2))
