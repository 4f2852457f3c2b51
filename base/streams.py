"""Standard streams that cannot stop the work: closed ones, ones whose reader has left, and ones on
a full disk."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedWriter, FileIO, TextIOWrapper
from pathlib import Path
from typing import TextIO, TypeAlias

Readable: TypeAlias = bytes | bytearray | memoryview


closed_at_start: set[int] = set()
"""Descriptors 0 to 2 that were closed when `forgiving_streams` began: what is written there is
lost."""


class _Forgiving(FileIO):
    """Writes until that fails for the first time, and drops everything from then on.

    Attributes:
        problem: why writing has failed; None as long as it has not.
    """

    problem: OSError | None = None

    def write(self, data: Readable) -> int | None:
        """Like `FileIO.write`, but never raises an `OSError`."""
        if self.problem is None:
            try:
                return super().write(data)
            except OSError as error:
                self.problem = error
        return memoryview(data).nbytes


class StandardStreams:
    """What has become of stdout and stderr inside `forgiving_streams`."""

    def __init__(self) -> None:
        self._raw: dict[str, _Forgiving] = {}

    def problem(self) -> OSError | None:
        """Why stdout could not be written to its end; None where it could, or was closed."""
        raw = self._raw.get("stdout")
        return None if raw is None else raw.problem

    def forgiving(self, name: str) -> TextIO:
        """A stream in place of `sys.stdout` or `sys.stderr`."""
        stream = getattr(sys, name)
        if stream is None:
            # Python has found it closed
            return Path(os.devnull).open("w", encoding="utf-8", errors="backslashreplace")
        if not isinstance(stream, TextIOWrapper):
            return stream
        stream.flush()
        try:
            self._raw[name] = _Forgiving(stream.fileno(), "wb", closefd=False)
        except OSError:
            # a test's stream, which lies in memory
            stream.reconfigure(errors="backslashreplace")
            return stream
        return TextIOWrapper(
            BufferedWriter(self._raw[name]),
            encoding=stream.encoding,
            errors="backslashreplace",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )


@contextmanager
def forgiving_streams() -> Iterator[StandardStreams]:
    """While this lasts, stdout and stderr take everything: a closed stream, a reader that has left
    and a full disk raise nothing. Letters that the encoding does not have are written as escapes.

    Descriptors 0 to 2 that are closed lead to nothing afterwards, too: the next file that is opened
    would get their number otherwise, and with it whatever a library prints.
    """
    for number in range(3):
        _occupy(number)
    streams, before = StandardStreams(), (sys.stdout, sys.stderr)
    sys.stdout, sys.stderr = streams.forgiving("stdout"), streams.forgiving("stderr")
    mine = sys.stdout, sys.stderr
    try:
        yield streams
    finally:
        for stream, old in zip(mine, before, strict=True):
            if old is None:
                stream.close()
            else:
                stream.flush()
        sys.stdout, sys.stderr = before


def _occupy(number: int) -> None:
    try:
        os.fstat(number)
    except OSError:
        closed_at_start.add(number)
        nothing = os.open(os.devnull, os.O_RDWR)
        if nothing != number:
            os.dup2(nothing, number)
            os.close(nothing)
        os.set_inheritable(number, True)
