"""Processes that decode image files ahead of training, and what becomes of one that dies or hangs.

They write into memory that they share with the main process. Only the word that a batch is finished
goes through a pipe, so the main process never waits for a worker in a way that it cannot leave."""

import atexit
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from base.errors import DataError
from base.text import first_line
from data_loader.decoding import decode_image

WORKER_TIMEOUT = 600.0
"""Seconds without a batch in which no worker began or ended an image either, after which the run
ends: one of them hangs."""

CHECK_INTERVAL = 1.0
"""Seconds between two looks at the workers while a batch is waited for."""

END_TIMEOUT = 5.0
"""Seconds that a killed worker may take to end; one that waits for a dead disk ends only when that
answers."""

AHEAD = 2
"""Batches that every worker decodes ahead."""

KEY = "data_loader.args.num_workers"
NOWHERE = -1


def decode_in_processes(
    paths: Sequence[str],
    shape: tuple[int, int, int],
    resize: bool,
    batches: list[list[int]],
    num_workers: int,
) -> Iterator[Tensor]:
    """One uint8 `(B, C, H, W)` for each list of positions in `paths`, in order; overwritten when
    the next one is asked for.

    No process outlives the iterator, nor keeps the main one from ending.

    Raises:
        DataError: a file cannot be decoded or has another size, or a worker died or hangs, which is
            named with its file.
    """
    decoder = _Decoder(paths, resize, batches, *_shared(num_workers, batches, shape))
    workers: list[BaseProcess] = []
    end = partial(_kill, workers)
    # Where a traceback keeps this frame, multiprocessing would wait for the workers for ever: they
    # ignore its SIGTERM.
    atexit.register(end)
    iterator = None
    try:
        iterator = _start(decoder, num_workers)
        # DataLoader has no public name for them; those that are dead by now are among them
        workers += iterator._workers
        for number, batch in enumerate(batches):
            problem = _wait(iterator, decoder, workers)
            if problem is not None:
                raise DataError(problem)
            yield decoder.slot(number)[: len(batch)]
    finally:
        iterator = None  # asks the workers to end
        end()
        atexit.unregister(end)


class _Decoder(Dataset):
    """Item b decodes the b-th batch into its slot. It is None, or says what is wrong: DataLoader
    would wrap an error in a traceback.

    There is one slot more than batches are asked for ahead, so that the one that was handed out
    last is not overwritten. `notes` int64 `(workers,)` has the position of the image that each
    worker is at."""

    def __init__(
        self,
        paths: Sequence[str],
        resize: bool,
        batches: list[list[int]],
        slots: Tensor,
        notes: Tensor,
    ) -> None:
        self.paths, self.resize = paths, resize
        self.batches, self.slots, self.notes = batches, slots, notes

    def __len__(self) -> int:
        return len(self.batches)

    def slot(self, number: int) -> Tensor:
        return self.slots[number % len(self.slots)]

    def __getitem__(self, number: int) -> str | None:
        slot, worker = self.slot(number), get_worker_info().id
        try:
            for place, position in enumerate(self.batches[number]):
                self.notes[worker] = position
                slot[place] = decode_image(self.paths[position], tuple(slot.shape[1:]), self.resize)
        except DataError as error:
            return str(error)
        finally:
            self.notes[worker] = NOWHERE
        return None


def _shared(
    num_workers: int, batches: list[list[int]], shape: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Slots and notes of a `_Decoder`, in memory that processes share."""
    slots = torch.empty(
        (min(AHEAD * num_workers + 1, len(batches)), max(map(len, batches)), *shape),
        dtype=torch.uint8,
    )
    try:
        return slots.share_memory_(), torch.full((num_workers,), NOWHERE).share_memory_()
    except (OSError, RuntimeError) as error:
        size = f"{slots.numel() / 1e6:.1f} MB of shared memory for {num_workers} processes"
        raise DataError(
            f"{KEY}: there are no {size} ({first_line(error).rstrip('. ')}): try fewer, or a smaller batch_size"
        ) from None


def _start(decoder: _Decoder, num_workers: int) -> Any:
    """Start the workers; iterates over what they have to say about each batch."""
    with warnings.catch_warnings():
        # more workers than cores is allowed
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader = DataLoader(
            decoder,
            batch_size=None,  # an item is already a batch
            num_workers=num_workers,
            prefetch_factor=AHEAD,
            collate_fn=_unchanged,
            worker_init_fn=_leave_signals_to_the_main_process,
            timeout=CHECK_INTERVAL,
            # otherwise starting the workers would draw from the global one
            generator=torch.Generator(),
        )
        try:
            with _signals_held_back(), _deaths_noticed_by_looking():
                return iter(loader)
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"{KEY}: {num_workers} processes cannot be started ({first_line(error).rstrip('. ')}): try fewer"
            ) from None


def _wait(
    iterator: Iterator[str | None], decoder: _Decoder, workers: list[BaseProcess]
) -> str | None:
    """What there is to say against the next batch; None once it has been decoded."""
    quiet, notes = 0.0, decoder.notes.clone()
    while True:
        try:
            return next(iterator)
        except RuntimeError as error:
            dead = [number for number, worker in enumerate(workers) if not worker.is_alive()]
            if not (dead or "timed out" in str(error)):
                raise
        if dead:
            told = " and ".join(
                _told(number, workers[number], _end_of(workers[number]), decoder) for number in dead
            )
            return f"{KEY}: {told}: memory or shared memory may have run out (try fewer), or the file crashes the decoder"
        if not torch.equal(notes, decoder.notes):
            quiet, notes = 0.0, decoder.notes.clone()
            continue
        quiet += CHECK_INTERVAL  # no clock: that would go on while all processes are suspended
        if quiet > WORKER_TIMEOUT:
            busy = torch.nonzero(notes != NOWHERE).flatten().tolist() or range(len(workers))
            told = " or ".join(_told(number, workers[number], "hangs", decoder) for number in busy)
            _kill(workers)
            return (
                f"{KEY}: {told}: nothing was decoded in {WORKER_TIMEOUT:g} s; does the disk answer?"
            )


def _told(number: int, worker: BaseProcess, what: str, decoder: _Decoder) -> str:
    position = int(decoder.notes[number])
    place = "between two batches" if position == NOWHERE else f"at {decoder.paths[position]!r}"
    return f"worker {number} (pid {worker.pid}) {what} {place}"


def _end_of(worker: BaseProcess) -> str:
    code = worker.exitcode or 0
    return f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _kill(workers: list[BaseProcess]) -> None:
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join(END_TIMEOUT)


def _unchanged(item: str | None) -> str | None:
    return item


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Worker processes begin with these signals blocked, so that none can end them before they
    ignore it; the main one gets it afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _deaths_noticed_by_looking() -> Iterator[None]:
    """DataLoader sets a handler of SIGCHLD that raises wherever the main process is when a worker
    dies, in the middle of an update for instance. It is taken away again: `_wait` looks after the
    workers."""
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, before if callable(before) else signal.SIG_DFL)


def _leave_signals_to_the_main_process(_: int) -> None:
    # Ctrl-C and a scheduler's SIGTERM reach every process of the group; the main one finishes its
    # batch and saves, for which it needs the workers. They end with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
