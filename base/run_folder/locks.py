"""Locks between processes. No other file of the project takes locks.

The operating system releases these locks when their process dies, however it dies, and they also
hold between machines that share a file system. Where there are no locks (Windows, some file
systems), every process gets the lock.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:
    fcntl = None

# The package filelock, which torch requires, only knows flock() locks of files that it opens
# itself. They do not serve here: data loader workers would inherit the lock of a run and keep it
# after the run was killed, and a launcher could not hand its lock to the run that it starts.


@contextmanager
def process_lock(file: Path) -> Iterator[bool]:
    """Hold the lock on `file` for this process alone; yield whether this process has it.

    Child processes do not inherit the lock. The file is created if it is missing and is kept.

    Args:
        file: the lock file. Nothing else in this process may open it: POSIX releases the lock as
            soon as any descriptor of the file is closed.

    Raises:
        OSError: the file cannot be created.
    """
    if fcntl is None:
        yield True
        return
    # Closing the file releases the lock
    with file.open("a+b") as opened:
        has_lock = True
        try:
            # lockf() locks belong to the process; flock() locks would live on in its children
            fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            # POSIX allows either error for a file that another process has locked
            has_lock = False
        except OSError:
            # This file system has no locks
            pass
        yield has_lock


def lock_descriptor(descriptor: int, *, wait: bool) -> bool:
    """Lock an open file until all its descriptors are closed; return whether it is locked now.

    The lock belongs to the open file: a child process that gets the descriptor holds it as well.

    Args:
        descriptor: of a file that is open for writing.
        wait: wait until no other process has the lock.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # This file system has no locks
        pass
    return True
