"""Files that are replaced atomically: a reader, or a crash, finds the old or the new one."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

TEMPORARY = re.compile(r"\..+\.(?P<process>\d+)\.incomplete")
"""Names of files that are not complete yet, with the id of the process that writes them. The id is
unique on one machine only, so files that several machines write need a lock.
"""


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a new file for reading and writing; it replaces `path` when the block ends.

    The file is written beside `path`, flushed to the disk and renamed, and the rename is flushed,
    too. If the block raises, `path` is unchanged and the new file is removed.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    temporary = _temporary_of(path)
    try:
        with temporary.open("w+b") as file:
            yield file
            file.flush()
            # Without it the rename can reach the disk before the contents do.
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def link_or_copy(source: Path, target: Path) -> None:
    """Replace `target` by the contents of `source`: by a hard link if the file system has them,
    otherwise by a copy.

    Both files must always be replaced as a whole, never written in place.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    temporary = _temporary_of(target)
    try:
        temporary.unlink(missing_ok=True)
        temporary.hardlink_to(source)
        temporary.replace(target)
        # POSIX renames nothing if both names are links to the same file, so one may remain.
        temporary.unlink(missing_ok=True)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        with replacing(target) as file:
            file.write(source.read_bytes())
    sync_folder(target.parent)


def sweep(folder: Path) -> None:
    """Remove the incomplete files that dead processes of this machine left in `folder`."""
    for path in folder.iterdir():
        match = TEMPORARY.fullmatch(path.name)
        if match and not _is_alive(int(match["process"])):
            # Another process may be sweeping the same folder.
            with suppress(OSError):
                path.unlink()


def sync_folder(folder: Path) -> None:
    """Flush the names in `folder` to the disk, so that they survive a power failure.

    Some network file systems cannot do that for a folder; they are left alone.
    """
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _temporary_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.incomplete")


def _is_alive(process: int) -> bool:
    if os.name != "posix":
        # Windows would end the process: signal 0 only tests for one on POSIX.
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        # It belongs to another user.
        return True
    return True
