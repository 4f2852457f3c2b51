"""A checkpoint's checksum: a SHA-256 digest of the file, stored inside the file.

torch does not notice when a byte of a tensor has changed on the disk. The checksum is the comment
of the zip archive that `torch.save` writes, at its very end, so that torch and every other reader
of zip files can still read the file. It covers all bytes before the comment.
"""

import hashlib
import re
from pathlib import Path
from typing import BinaryIO

from base.errors import CheckpointError

LABEL = b"convnorm-trainer sha256 "
COMMENT = re.compile(re.escape(LABEL) + rb"([0-9a-f]{64})")
COMMENT_LENGTH = len(LABEL) + 64
END_RECORD = b"PK\x05\x06"
"""The end record of a zip archive begins with this. Without a comment it is the last 22 bytes of
the file, and its last two bytes, the comment's length, are zero."""
CHUNK = 1 << 20


def write_checksum(file: BinaryIO) -> None:
    """Add the checksum to a zip archive without a comment that is open for reading and writing."""
    file.seek(-2, 2)
    # The comment's length is covered by the digest
    file.write(COMMENT_LENGTH.to_bytes(2, "little"))
    digest = _digest(file, file.tell())
    file.write(LABEL + digest)


def verify_checksum(file: BinaryIO, path: Path) -> bool:
    """Verify the checksum of an open file; return whether it has one.

    Files of other code bases have none.

    Raises:
        CheckpointError: the checksum is wrong or only a part of it is there, so the file has
            changed since it was written.
    """
    size = file.seek(0, 2)
    tail = _read(file, max(0, size - COMMENT_LENGTH))
    match = COMMENT.fullmatch(tail)
    if match is None:
        # A zip archive without this comment is whole only if it ends in an end record without one
        is_zip = _read(file, 0, 2) == b"PK"
        is_whole = tail[-22:-18] == END_RECORD and tail[-2:] == b"\0\0"
        if is_zip and not is_whole:
            raise CheckpointError(
                f"{path}: is damaged: its end is missing or has changed; copy or fetch it again"
            )
        return False
    if _digest(file, size - COMMENT_LENGTH) != match[1]:
        raise CheckpointError(
            f"{path}: is damaged: its checksum is wrong, so it has changed since it was written"
        )
    return True


def _read(file: BinaryIO, position: int, count: int = -1) -> bytes:
    file.seek(position)
    return file.read(count)


def _digest(file: BinaryIO, size: int) -> bytes:
    """Return the hexadecimal digest of the first `size` bytes; leave the position behind them."""
    file.seek(0)
    digest = hashlib.sha256()
    while size > 0:
        chunk = file.read(min(CHUNK, size))
        if not chunk:
            break
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest().encode()
