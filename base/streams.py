"""Standard streams that cannot stop the work when they are closed, broken or on a full disk."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedWriter, FileIO, TextIOWrapper
from pathlib import Path
from typing import TextIO, TypeAlias

Readable: TypeAlias = bytes | bytearray | memoryview


class _Forgiving(FileIO):
    """A file that drops everything after the first failed write.

    Attributes:
        problem: the error of that write; None before.
    """

    problem: OSError | None = None

    def write(self, data: Readable) -> int | None:
        """Write like `FileIO.write`, but never raise an `OSError`."""
        if self.problem is None:
            try:
                return super().write(data)
            except OSError as error:
                self.problem = error
        return memoryview(data).nbytes


class StandardStreams:
    """Replacements of stdout and stderr, and whether stdout could be written."""

    def __init__(self) -> None:
        self._raw: dict[str, _Forgiving] = {}

    def problem(self) -> OSError | None:
        """Return the error of writing stdout; None if there was none, or if it was closed."""
        if "stdout" not in self._raw:
            return None
        return self._raw["stdout"].problem

    def forgiving(self, name: str) -> TextIO:
        """Return a stream that replaces `sys.stdout` or `sys.stderr`, whose name is `name`."""
        stream = getattr(sys, name)
        if stream is None:
            # Python found it closed at its start.
            return Path(os.devnull).open("w", encoding="utf-8", errors="backslashreplace")
        if not isinstance(stream, TextIOWrapper):
            return stream
        stream.flush()
        try:
            self._raw[name] = _Forgiving(stream.fileno(), "wb", closefd=False)
        except OSError:
            # It has no descriptor, such as a stream in memory in a test.
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
    """Replace stdout and stderr by streams that accept everything, inside the context.

    A closed stream, a reader that has left and a full disk raise nothing. Characters that the
    encoding does not have are written as escapes. Closed descriptors 0 to 2 are opened to the null
    device, also after the context.
    """
    for number in range(3):
        _open_if_closed(number)
    streams = StandardStreams()
    before = (sys.stdout, sys.stderr)
    replaced = (streams.forgiving("stdout"), streams.forgiving("stderr"))
    sys.stdout, sys.stderr = replaced
    try:
        yield streams
    finally:
        for stream, old in zip(replaced, before, strict=True):
            if old is None:
                stream.close()
            else:
                stream.flush()
        sys.stdout, sys.stderr = before


def _open_if_closed(number: int) -> None:
    """Open a descriptor to the null device if it is closed."""
    try:
        os.fstat(number)
    except OSError:
        # Otherwise the next file that is opened gets this number, and the output of every library
        # that prints to it.
        nothing = os.open(os.devnull, os.O_RDWR)
        if nothing != number:
            os.dup2(nothing, number)
            os.close(nothing)
        os.set_inheritable(number, True)
