"""A checkpoint's seal: a SHA-256 digest of the file that travels inside it.

torch does not notice when a byte of a tensor has changed on the disk. The seal stands in the
comment of the zip archive that `torch.save` writes, at its very end, so that torch and every other
reader of zip files reads a sealed checkpoint as before. The digest is of all bytes before the
comment."""

import hashlib
import re
from pathlib import Path
from typing import BinaryIO

from base.errors import CheckpointError

SEAL = re.compile(rb"convnorm-trainer sha256 ([0-9a-f]{64})")
LENGTH = len(b"convnorm-trainer sha256 ") + 64
END = b"PK\x05\x06"
"""The end record of a zip archive begins with this. Without a comment it is the last 22 bytes of
the file, of which the last two, the comment's length, are zero."""
CHUNK = 1 << 20


def write_checksum(file: BinaryIO) -> None:
    """Seal a zip archive without a comment that is open for reading and writing."""
    file.seek(-2, 2)
    file.write(LENGTH.to_bytes(2, "little"))
    digest = _digest(file, file.tell())
    file.write(b"convnorm-trainer sha256 " + digest)


def verify_checksum(file: BinaryIO, path: Path) -> bool:
    """Whether the file has a seal; what it holds is then what was written. Other files (the
    original's) have none.

    Raises:
        CheckpointError: the seal is broken, or only a part of it is there: the file has changed
            since it was written.
    """
    size = file.seek(0, 2)
    tail = _read(file, max(0, size - LENGTH))
    match = SEAL.fullmatch(tail)
    if match is None:
        begins = _read(file, 0, 2)
        if begins == b"PK" and not (tail[-22:-18] == END and tail[-2:] == b"\0\0"):
            raise CheckpointError(
                f"{path}: is damaged: its end is missing or has changed; copy or fetch it again"
            )
        return False
    if _digest(file, size - LENGTH) != match[1]:
        raise CheckpointError(
            f"{path}: is damaged: its digest is not the one that it was written with"
        )
    return True


def _read(file: BinaryIO, position: int, count: int = -1) -> bytes:
    file.seek(position)
    return file.read(count)


def _digest(file: BinaryIO, size: int) -> bytes:
    """Of the first `size` bytes; the file's position is behind them then."""
    file.seek(0)
    digest = hashlib.sha256()
    while size > 0:
        chunk = file.read(min(CHUNK, size))
        if not chunk:
            break
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest().encode()
