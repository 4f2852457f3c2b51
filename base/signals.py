"""SIGINT and SIGTERM, which ask a long job to save and leave."""

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

from base.distributed import rank, world_size
from base.distributed.collectives import LOOK_EVERY
from base.distributed.session import (
    ask_all_to_stop,
    asked_to_stop,
    end_process,
    moments_computed,
    tell_failure,
)

STOPPING = (signal.SIGINT, signal.SIGTERM)
OVER = 0
"""What a watch is told when there is nothing to watch any more; no signal has this number."""
PATIENCE, LAST_PATIENCE = 20.0, 120.0
"""Seconds that a process which has been asked to stop waits for others that do nothing, and for
others that compute; torchrun and SLURM kill after 30 unless they are told otherwise."""
BUSY = 0.05
"""Share of the time in which a process has to compute not to be taken for one that only waits."""


class Interrupted(BaseException):
    """A signal came where work may be given up at once."""


class StopSignals:
    """Remembers the signal that asked for the stop.

    Attributes:
        asked: the number of the first one; None as long as there was none.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self._may_interrupt = False
        self._caught = False

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Meanwhile both signals only set `asked` (in the main thread; elsewhere Python allows no
        handlers).

        Where several processes work together, a signal to one of them reaches all, and one that has
        been asked to stop, but waits for another that does not answer, ends (see `_Watch`).
        """
        if self._caught or threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: FrameType | None) -> None:
            # the first one counts, whatever comes while it is obeyed
            self.asked = self.asked or number
            if self._may_interrupt and not _in_finaliser(frame):
                self._may_interrupt = False
                raise Interrupted

        self._caught = True
        previous = {number: signal.signal(number, note) for number in STOPPING}
        try:
            with _Watch() if world_size() > 1 else nullcontext():
                yield
        finally:
            self._caught = False
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Meanwhile, inside `caught`, the first of them raises `Interrupted`, too, at once where it
        has come already: for work that changes nothing."""
        try:
            self._may_interrupt = True
            if self.asked:
                raise Interrupted
            yield
        finally:
            self._may_interrupt = False


class _Watch:
    """A thread that hears signals while Python cannot: inside a collective the main thread waits in
    code of gloo or of DistributedDataParallel, and handlers of Python have to wait with it.

    It passes a signal on to the other processes, and hands theirs to the main thread. From a signal
    on all tell each other whether they still compute. Where this one only waits and none has
    computed for `PATIENCE` seconds, one of them is gone or stuck: nothing can be agreed on any
    more, and this one ends with the signal's exit code. It does so, too, after `LAST_PATIENCE`
    seconds of waiting for others that compute."""

    def __enter__(self) -> None:
        self._ears, self._mouth = socket.socketpair()
        for end in (self._ears, self._mouth):
            end.setblocking(False)
        self._before = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._work, name="signals", daemon=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._before)
        self._mouth.send(bytes([OVER]))
        self._thread.join()
        self._ears.close()
        self._mouth.close()

    def _work(self) -> None:
        asked = 0
        while not asked:
            numbers = self._heard()
            if OVER in numbers:
                return
            asked = next((number for number in numbers if number in STOPPING), 0)
            if asked:
                ask_all_to_stop(asked)
            else:
                asked = asked_to_stop()
                if asked:
                    _thread.interrupt_main(asked)  # as if it had come to this process
        now, computed, moments = time.monotonic(), time.process_time(), moments_computed(0)
        own_last = any_last = now
        while OVER not in self._heard():
            before, now = now, time.monotonic()
            computed_before, computed = computed, time.process_time()
            if computed - computed_before > BUSY * (now - before):
                moments_computed(1)
                own_last = now
            moments_before, moments = moments, moments_computed(0)
            if moments != moments_before:
                any_last = now
            if min(now - own_last, now - any_last) > PATIENCE or now - own_last > LAST_PATIENCE:
                name = signal.Signals(asked).name
                print(
                    f"rank {rank()}: stopped by {name} while it waited for another process, which has not answered for"
                    f" {now - own_last:.0f} s: what was done since the last checkpoint is lost",
                    file=sys.stderr,
                )
                tell_failure(128 + asked)
                end_process(128 + asked)

    def _heard(self) -> bytes:
        """The numbers of the signals that have come, after waiting for them a moment."""
        ready, _, _ = select.select([self._ears], [], [], LOOK_EVERY)
        return self._ears.recv(64) if ready else b""


def _in_finaliser(frame: FrameType | None) -> bool:
    """Whether an object is just being cleared away, where Python would print an exception and
    forget it."""
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False
