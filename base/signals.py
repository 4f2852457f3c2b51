"""SIGINT and SIGTERM, which ask a long job to save and leave."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


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

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Meanwhile both signals only set `asked` (in the main thread; elsewhere Python allows no handlers)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: FrameType | None) -> None:
            self.asked = self.asked or number  # the first one counts, whatever comes while it is obeyed
            if self._may_interrupt and not _in_finaliser(frame):
                self._may_interrupt = False
                raise Interrupted

        previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Meanwhile, inside `caught`, the first of them raises `Interrupted`, too: for work that changes nothing."""
        try:
            self._may_interrupt = True
            yield
        finally:
            self._may_interrupt = False


def _in_finaliser(frame: FrameType | None) -> bool:
    """Whether an object is just being cleared away, where Python would print an exception and forget it."""
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False
