"""SIGINT, SIGTERM and SIGHUP, which ask a long job to save and exit."""

import _thread
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import NoReturn

from base.distributed import rank, world_size
from base.distributed.collectives import SIGNAL_INTERVAL, all_reduce_max
from base.distributed.session import (
    activity,
    announce_failure,
    count_activity,
    end_process,
    request_stop,
    requested_stop,
)
from base.stopping import STOPPING

END = 0
"""The byte that ends a watch. Signals are numbered from 1."""

PATIENCE = 20.0
"""Seconds that a process which has been asked to stop waits for others that do nothing. torchrun
and SLURM kill a process after 30 s by default."""

LAST_PATIENCE = 120.0
"""Seconds that such a process waits for others that compute."""

BUSY = 0.05
"""A process computes, rather than waits, if it uses more than this share of the time. CUDA may use
all of it to wait for a GPU; torchrun then ends such a process."""


QUESTION_BATCHES = 8
"""The largest number of minibatches between two questions; see `StopQuestions`."""

QUESTION_SECONDS = 1.0
"""The time between two questions is at most about this long, or one minibatch."""


class Interrupted(BaseException):
    """A signal came during work that may be given up at once."""


class StopSignals:
    """Remembers the signal that asked this process to stop.

    Attributes:
        asked: the number of the first such signal; None before.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self._may_interrupt = False
        self._caught = False

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Let these signals only set `asked`, inside the context.

        A SIGHUP that this process ignores, because it was started with nohup, stays ignored.
        With several processes, a signal to one of them reaches all. A process that has been asked
        to stop and waits in vain for another ends (see `_Watch`). Threads other than the main
        thread cannot handle signals, so there the context does nothing.
        """
        if self._caught or threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, frame: FrameType | None) -> None:
            # Later signals, such as a second Ctrl-C, do not change the exit code.
            self.asked = self.asked or number
            if self._may_interrupt and not _in_finalizer(frame):
                self._may_interrupt = False
                raise Interrupted

        self._caught = True
        previous = {
            number: signal.signal(number, handle) for number in STOPPING if not _under_nohup(number)
        }
        try:
            with _Watch() if world_size() > 1 else nullcontext():
                yield
        finally:
            self._caught = False
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Let a signal also raise `Interrupted`, inside this context and inside `caught`.

        It is raised at once if a signal has come before. This is for work that changes nothing.
        """
        try:
            self._may_interrupt = True
            if self.asked:
                raise Interrupted
            yield
        finally:
            self._may_interrupt = False


class StopQuestions:
    """When the processes that train together ask one another whether a signal has come.

    A question waits for the slowest process, so it is asked only after every 8th minibatch. Slow
    minibatches are asked after sooner, about once a second, because torchrun and SLURM wait for
    30 s only. All processes count the same minibatches and use the time of the slowest process, so
    they all ask after the same minibatch. A single process waits for nobody and always asks.
    """

    def __init__(self) -> None:
        self._interval = 1
        self._count = 0
        self._begin = time.perf_counter()

    def due(self, at_end: bool) -> bool:
        """Count a minibatch, and return whether to ask after it.

        Args:
            at_end: ask in any case, as something longer than a minibatch follows.
        """
        self._count += 1
        return world_size() == 1 or at_end or self._count >= self._interval

    def ask(self, own: int | None) -> int:
        """Return the number of the signal that any process has received, or 0; `own` is the one
        that this process has received."""
        if world_size() == 1:
            return own or 0
        milliseconds = int(1000 * (time.perf_counter() - self._begin) / self._count)
        fit = int(1000 * QUESTION_SECONDS) // max(1, all_reduce_max(milliseconds))
        self._interval = max(1, min(QUESTION_BATCHES, fit))
        answer = all_reduce_max(own or 0)
        self._count = 0
        self._begin = time.perf_counter()
        return answer


class _Watch:
    """A thread that receives signals while the main thread waits for other processes.

    Inside a collective the main thread runs code of gloo or DistributedDataParallel, and Python's
    signal handlers have to wait. The thread passes a signal on to the other processes, and the
    signals of others to the main thread. After a signal, all processes count their activity. If
    this process only waits, it ends with the signal's exit code when nobody has computed for
    `PATIENCE` seconds, because another process is then dead or stuck, or after `LAST_PATIENCE`
    seconds if others compute.
    """

    def __enter__(self) -> None:
        self._receiver, self._sender = socket.socketpair()
        for end in (self._receiver, self._sender):
            end.setblocking(False)
        # Python's C code writes the number of each signal into the socket, in every thread.
        self._before = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._work, name="signals", daemon=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._before)
        self._sender.send(bytes([END]))
        self._thread.join()
        self._receiver.close()
        self._sender.close()

    def _work(self) -> None:
        number = self._wait_for_signal()
        if number is not None:
            self._wait_for_end(number)

    def _wait_for_signal(self) -> int | None:
        """Return the number of the first signal to any process; None if the watch ended before."""
        while True:
            received = self._received()
            if END in received:
                return None
            for number in received:
                if number in STOPPING:
                    request_stop(number)
                    return number
            number = requested_stop()
            if number:
                # Run this process's handler, as if the signal had been sent to it.
                _thread.interrupt_main(number)
                return number

    def _wait_for_end(self, number: int) -> None:
        """End the process if it waits in vain for others, after the signal `number`."""
        now = time.monotonic()
        computed = time.process_time()
        count = activity()
        own_last = any_last = now
        while END not in self._received():
            before, now = now, time.monotonic()
            computed_before, computed = computed, time.process_time()
            if computed - computed_before > BUSY * (now - before):
                count_activity()
                own_last = now
            count_before, count = count, activity()
            if count != count_before:
                any_last = now
            waited = now - own_last
            if min(waited, now - any_last) > PATIENCE or waited > LAST_PATIENCE:
                _give_up(number, waited)

    def _received(self) -> bytes:
        """Wait a moment, and return the numbers of the signals that have come."""
        ready, _, _ = select.select([self._receiver], [], [], SIGNAL_INTERVAL)
        return self._receiver.recv(64) if ready else b""


def _under_nohup(number: int) -> bool:
    return signal.Signals(number).name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN


def _give_up(number: int, waited: float) -> NoReturn:
    name = signal.Signals(number).name
    print(
        f"error: rank {rank()}: stopped by {name} while it waited for another process, which has"
        f" not answered for {waited:.0f} s: the work since the last checkpoint is lost",
        file=sys.stderr,
    )
    announce_failure(128 + number)
    end_process(128 + number)


def _in_finalizer(frame: FrameType | None) -> bool:
    """Whether an object is being finalized. Python would print and drop an exception there."""
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False
