"""Locks between processes: files that one process at a time holds."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def locked(file: Path) -> Iterator[bool]:
    """Hold the lock on `file`, which is made if it is missing and stays; yields whether this
    process has it.

    It ends with the block, and with the process however that dies; children do not inherit it. It
    holds between the machines of a shared file system, too. Where there are no locks (some file
    systems, Windows) everyone has it.

    Args:
        file: nobody else may read or write it.

    Raises:
        OSError: the file cannot be made.
    """
    try:
        import fcntl
    except ImportError:
        yield True
        return
    # a lock of lockf is this process's alone; one of flock would live on in its worker processes
    with file.open("a+b") as opened:
        try:
            fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            own = True
        except (BlockingIOError, PermissionError):  # POSIX allows either
            own = False
        except OSError:
            own = True
        yield own
        if own:
            with suppress(OSError):
                fcntl.lockf(opened, fcntl.LOCK_UN)
