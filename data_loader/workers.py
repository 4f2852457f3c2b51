"""Worker processes that decode image files ahead of time, and the error if one dies or hangs.

`images.FileImages.batches` calls this module if `num_workers` is above 0. Worker w decodes the
batches w, w + workers, w + 2 workers and so on into memory that it shares with the main process. A
pipe carries the number of a batch to its worker, and None or an exception back.

`torch.utils.data.DataLoader` is not used here. Its SIGCHLD handler raises wherever the main process
is when a worker dies, which may be in the middle of an update. It also has no public way to ask
which process died, and of what. `multiprocessing.connection.wait` does both jobs.
"""

import atexit
import signal
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import Pipe, Process
from multiprocessing.connection import Connection, wait

import torch
from torch import Tensor

from base.errors import DataError
from base.stopping import STOPPING
from base.text import first_line
from data_loader.decoding import decode_image

WORKER_TIMEOUT = 600.0
"""Seconds after which the run ends if no batch arrived and no worker started or finished an
image."""

CHECK_INTERVAL = 1.0
"""Seconds between two checks for hanging workers while the main process waits for a batch."""

END_TIMEOUT = 5.0
"""Seconds to wait for a killed worker to end. One that is blocked by a dead disk ends only when the
disk answers."""

AHEAD = 2
"""Batches that each worker decodes ahead."""

KEY = "data_loader.args.num_workers"
IDLE = -1


def decode_in_processes(
    paths: Sequence[str],
    shape: tuple[int, int, int],
    resize: bool,
    batches: list[list[int]],
    num_workers: int,
) -> Iterator[Tensor]:
    """Yield one uint8 `(B, C, H, W)` for each list of positions in `paths`, in order.

    A yielded tensor may be overwritten once the next one is requested. The workers are killed when
    the iterator ends or is dropped, and at the latest when Python exits.

    Raises:
        DataError: a file cannot be decoded or has another size, or a worker died or hangs; the
            message names the worker and its file.
    """
    decoder = _Decoder(paths, resize, batches, *_shared_memory(num_workers, batches, shape))
    workers: list[_Worker] = []
    end = partial(_kill, workers)
    # A traceback may keep this frame alive until Python exits. multiprocessing would then wait for
    # the workers forever, because they ignore its SIGTERM.
    atexit.register(end)
    try:
        _start(decoder, workers, num_workers)
        for number in range(min(AHEAD * num_workers, len(batches))):
            workers[number % num_workers].request(number)
        for number, batch in enumerate(batches):
            worker = workers[number % num_workers]
            error = _receive(worker, workers, decoder)
            if error is not None:
                raise error
            if number + AHEAD * num_workers < len(batches):
                worker.request(number + AHEAD * num_workers)
            yield decoder.slot(number)[: len(batch)]
    finally:
        end()
        atexit.unregister(end)


@dataclass(frozen=True)
class _Decoder:
    """Decodes batch b into slot b modulo the number of slots.

    Attributes:
        slots: uint8 `(slots, largest B, C, H, W)`, in shared memory.
        current: int64 `(workers,)`, in shared memory: the position of the image that each worker is
            decoding, or `IDLE`.
    """

    paths: Sequence[str]
    resize: bool
    batches: list[list[int]]
    slots: Tensor
    current: Tensor

    def slot(self, number: int) -> Tensor:
        return self.slots[number % len(self.slots)]

    def decode(self, number: int, worker: int) -> None:
        slot = self.slot(number)
        shape = tuple(slot.shape[1:])
        for place, position in enumerate(self.batches[number]):
            self.current[worker] = position
            slot[place] = decode_image(self.paths[position], shape, self.resize)


class _Worker:
    """One process, and the main process's end of its pipe."""

    def __init__(self, number: int, decoder: _Decoder) -> None:
        self.number = number
        self.pipe, pipe_of_worker = Pipe()
        arguments = (decoder, number, pipe_of_worker, self.pipe)
        self.process = Process(target=_work, args=arguments, daemon=True)
        self.process.start()
        # The worker's end must be open in the worker alone: its death then closes the pipe.
        pipe_of_worker.close()

    def request(self, number: int) -> None:
        """Ask for a batch."""
        # A dead worker is reported by `_receive`, when its batch is due.
        with suppress(OSError):
            self.pipe.send(number)

    def describe(self, what: str, decoder: _Decoder) -> str:
        """Say what happened to this worker, and at which image."""
        position = int(decoder.current[self.number])
        place = "between two batches"
        if position != IDLE:
            place = f"at {decoder.paths[position]!r}"
        return f"worker {self.number} (pid {self.process.pid}) {what} {place}"

    def cause_of_death(self) -> str:
        # The pipe closes shortly before the system knows the exit code.
        self.process.join(END_TIMEOUT)
        code = self.process.exitcode or 0
        if code < 0:
            return f"died of {signal.Signals(-code).name}"
        return f"ended with exit code {code}"


def _work(decoder: _Decoder, worker: int, pipe: Connection, pipe_of_main: Connection) -> None:
    """Decode the batches that the main process requests, until it closes the pipe or ends."""
    # Ctrl-C, a scheduler's SIGTERM and a closed terminal's SIGHUP reach every process of the group.
    # The main process then finishes its batch and saves, for which it needs the workers.
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    # A forked process holds a copy of the other end, which would keep the pipe open.
    pipe_of_main.close()
    # OpenMP's threads do not survive a fork; torch would wait for them.
    torch.set_num_threads(1)
    with suppress(EOFError, OSError):
        while True:
            number = pipe.recv()
            error: Exception | None = None
            try:
                decoder.decode(number, worker)
            except DataError as problem:
                error = problem
            except Exception:
                # An exception loses its traceback in a pipe, so the traceback is the message.
                error = RuntimeError(f"in worker {worker}:\n{traceback.format_exc()}")
            decoder.current[worker] = IDLE
            pipe.send(error)


def _shared_memory(
    num_workers: int, batches: list[list[int]], shape: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Return `slots` and `current` of a `_Decoder`."""
    # One slot more than batches are decoded ahead: the yielded batch must not be overwritten
    n_slots = min(AHEAD * num_workers + 1, len(batches))
    slots = torch.empty((n_slots, max(map(len, batches)), *shape), dtype=torch.uint8)
    try:
        return slots.share_memory_(), torch.full((num_workers,), IDLE).share_memory_()
    except (OSError, RuntimeError) as error:
        size = f"{slots.numel() / 1e6:.1f} MB of shared memory for {num_workers} processes"
        raise DataError(
            f"{KEY}: cannot get {size} ({first_line(error).rstrip('. ')}):"
            " try fewer, or a smaller batch_size"
        ) from None


def _start(decoder: _Decoder, workers: list[_Worker], num_workers: int) -> None:
    """Start processes one by one, and append each to `workers`.

    The list belongs to the caller, who has to kill them if a signal interrupts this function.
    """
    try:
        with _signals_blocked():
            for number in range(num_workers):
                workers.append(_Worker(number, decoder))
    except OSError as error:
        raise DataError(
            f"{KEY}: {num_workers} processes cannot be started"
            f" ({first_line(error).rstrip('. ')}): try fewer"
        ) from None


def _receive(worker: _Worker, workers: list[_Worker], decoder: _Decoder) -> Exception | None:
    """Wait for the next batch of `worker`.

    Returns:
        None once the batch is decoded, otherwise the reason why it is not.
    """
    quiet = 0.0
    before = decoder.current.clone()
    sentinels = [one.process.sentinel for one in workers]
    while True:
        ready = wait([worker.pipe, *sentinels], CHECK_INTERVAL)
        if worker.pipe in ready:
            with suppress(EOFError, OSError):
                return worker.pipe.recv()
        if ready:
            dead = [one for one in workers if one.process.sentinel in ready or one.pipe in ready]
            causes = [one.describe(one.cause_of_death(), decoder) for one in dead]
            return DataError(
                f"{KEY}: {' and '.join(causes)}: memory or shared memory may have run out"
                " (try fewer), or the file crashes the decoder"
            )
        if not torch.equal(before, decoder.current):
            quiet = 0.0
            before = decoder.current.clone()
            continue
        # Intervals are counted instead of reading a clock, which would go on while all processes
        # are suspended.
        quiet += CHECK_INTERVAL
        if quiet > WORKER_TIMEOUT:
            busy = [one for one in workers if before[one.number] != IDLE]
            hanging = [one.describe("hangs", decoder) for one in busy or workers]
            return DataError(
                f"{KEY}: {' or '.join(hanging)}: nothing was decoded in {WORKER_TIMEOUT:g} s;"
                " does the disk answer?"
            )


def _kill(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.process.kill()
        worker.pipe.close()
    for worker in workers:
        worker.process.join(END_TIMEOUT)


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block the signals that stop a run. A process inherits this, so that none of them can end it
    before it ignores them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
