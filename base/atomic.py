"""Files that are at every moment either the old one or the new one, complete, even if the process
or the machine dies."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

TEMPORARY = re.compile(r"\..+\.(?P<process>\d+)\.incomplete")
"""Names of files that are not complete yet; the number is of the process that writes."""


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file, open for reading and writing, that takes the place of `path` in one step when the
    block ends.

    It is written beside `path`, flushed to the disk, renamed, and the rename flushed, too. Where
    the block raises, `path` stays what it was and nothing else is left.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    temporary = _beside(path)
    try:
        with temporary.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def link_or_copy(source: Path, target: Path) -> None:
    """Let `target` hold in one step what `source` holds: by a hard link where the file system has
    them, by a copy elsewhere.

    Only for files that are replaced as a whole and never written in place.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    temporary = _beside(target)
    try:
        temporary.unlink(missing_ok=True)
        temporary.hardlink_to(source)
        temporary.replace(target)
        # replacing a link by another one to the same file does nothing
        temporary.unlink(missing_ok=True)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        with replacing(target) as file:
            file.write(source.read_bytes())
    sync_folder(target.parent)


def sweep(folder: Path) -> None:
    """Remove what processes of this machine that are dead have left incomplete in `folder`; nothing
    else is touched."""
    for path in folder.iterdir():
        match = TEMPORARY.fullmatch(path.name)
        if match and not _alive(int(match["process"])):
            with suppress(OSError):  # another process may be sweeping, too
                path.unlink()


def sync_folder(folder: Path) -> None:
    """Let the names in `folder` survive a power failure."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.incomplete")


def _alive(process: int) -> bool:
    if os.name != "posix":  # there signal 0 is not a question
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
