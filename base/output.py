"""The files that a command line names for reports, pictures and tables: checked before the work,
written after it.

A path may also be `-` (standard output), a device, a named pipe or `>(command)`: these are written
to, never replaced, and have no suffix that would decide the format, so the first one of those that
there are is taken.
"""

import logging
import os
import re
import stat
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Protocol

from base.atomic import replacing
from base.config.strict_json import json_text
from base.errors import ConfigError
from base.run_folder.names import CONFIG, ENVIRONMENT, LABELS, LOCK, METRICS, RESULT, STUDY_INDEX
from base.streams import closed_at_start

logger = logging.getLogger(__name__)

PICTURES = ("png", "pdf", "svg")
ARRAYS = ("npz",)
KINDS = {PICTURES: "pictures", ARRAYS: "arrays"}
"""What files of these formats hold, in words."""
DPI = 160
STDOUT = 1
DESCRIPTOR = re.compile(r"/dev/fd/(\d+)|/proc/(?:self|thread-self|\d+)/fd/(\d+)")
OWN_FILES = re.compile(
    "|".join(map(re.escape, (CONFIG, RESULT, ENVIRONMENT, STUDY_INDEX, METRICS, LABELS, LOCK)))
    + r"|.*\.(log|pth)"
)
"""What a run writes into its folder, and a study beside it. Reports may lie there, too, under other
names."""


class Picture(Protocol):
    """A `matplotlib.figure.Figure`."""

    def savefig(self, file: Any, /, **options: Any) -> None:
        """Write the picture to an open file."""


def descriptor_of(path: str | Path) -> int | None:
    """The open file of this process that a path stands for, such as 1 for `-` and `/dev/stdout`;
    None for all other paths."""
    if str(path) == "-":
        return STDOUT
    place = Path(path)
    # a link to a link to a link ...
    for _ in range(40):
        match = DESCRIPTOR.fullmatch(str(place))
        if match:
            return int(match[1] or match[2])
        if not place.is_symlink():
            return None
        place = Path(os.path.normpath(place.parent / place.readlink()))
    return None


def is_stream(path: str | Path) -> bool:
    """Whether what is written to `path` goes on to somewhere else instead of lying there: it is a
    descriptor, a pipe or a device. Nothing can then be written beside it."""
    if descriptor_of(path) is not None:
        return True
    try:
        mode = Path(path).stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def format_of(path: str | Path, formats: Sequence[str]) -> str:
    """The format of a path by its suffix, one of `formats`; the first of them for a stream without
    such a suffix.

    Raises:
        ConfigError: another suffix.
    """
    suffix = Path(path).suffix.lower().removeprefix(".")
    if suffix not in formats and is_stream(path):
        return formats[0]
    if suffix not in formats:
        what = KINDS.get(tuple(formats), "tables")
        raise ConfigError(
            f"{path}: {Path(path).suffix!r} is not a format of {what};"
            f" expected one of: {', '.join(formats)}"
        )
    return suffix


def check_outputs(
    outputs: Mapping[str, str | Path | None],
    formats: Mapping[str, Sequence[str]],
    files: Iterable[str | Path] = (),
    folders: Iterable[str | Path] = (),
) -> None:
    """Refuse outputs that cannot or must not be written, before the work; missing folders are made.

    Where one of them is standard output, everything else that the script prints goes to stderr from
    now on, until `run_script` ends.

    Args:
        outputs: flag -> path, or None where the flag was not given.
        formats: flag -> suffixes that its path may have; flags of any suffix are left out.
        files: that are being read, so that none of them is written over.
        folders: run folders that are being read, whose own files are not written over, be they
            there or not.

    Raises:
        ConfigError: naming the flag and the path.
    """
    given = {flag: path for flag, path in outputs.items() if path is not None}
    places: dict[str, str] = {}
    for flag, path in given.items():
        if flag in formats:
            format_of(path, formats[flag])
        try:
            _check(path, [Path(file) for file in files], [Path(folder) for folder in folders])
        except OSError as error:
            raise ConfigError(
                f"{flag} {path}: cannot be written: {error.strerror or error}"
            ) from None
        place = "-" if descriptor_of(path) == STDOUT else os.path.realpath(path)
        if place == "-" or not is_stream(path):
            other = places.setdefault(place, flag)
            if other != flag:
                raise ConfigError(f"{flag} {path}: {other} is written there, too")
    if "-" in places:
        sys.stdout = sys.stderr


def write_output(path: str | Path, data: bytes) -> None:
    """Write `data` to a path: through a link, a pipe or a device; a file is either the old or the
    new one at every moment. Missing folders are made.

    A pipe whose reader has left, such as `head`, has had enough.

    Raises:
        OSError: it cannot be written.
    """
    number = descriptor_of(path)
    if number is None and not is_stream(path):
        place = Path(os.path.realpath(path))
        place.parent.mkdir(parents=True, exist_ok=True)
        with replacing(place) as file:
            file.write(data)
        return
    # what was printed before stands before
    sys.stdout.flush()
    try:
        # opening /dev/fd/N would begin at the start of a file that others are writing to, too
        place = path if number is None else os.dup(number)
        with open(place, "wb", buffering=0) as stream:  # noqa: PTH123
            rest = memoryview(data)
            while rest:
                rest = rest[stream.write(rest) :]
    except BrokenPipeError:
        return


def save_figure(figure: Picture, path: str | Path) -> None:
    """Write a matplotlib figure in the format of the path's suffix; missing folders are made.

    Raises:
        ConfigError: the suffix is not a format of pictures, or the path cannot be written.
    """
    picture = BytesIO()
    with warnings.catch_warnings(record=True) as told:
        warnings.filterwarnings("always", message="Glyph .* missing")
        figure.savefig(picture, format=format_of(path, PICTURES), dpi=DPI)
    glyphs = [one for one in told if str(one.message).startswith("Glyph")]
    if glyphs:
        logger.warning("%s: its font lacks letters of some names, which are boxes there", path)
    for other in told:
        if other not in glyphs:
            warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    with writing(path):
        write_output(path, picture.getvalue())


def save_json(path: str | Path, values: Any) -> None:
    """Write plain values as indented JSON; missing folders are made.

    Raises:
        ConfigError: the path cannot be written.
    """
    with writing(path):
        write_output(path, as_json(values))


def as_json(values: Any) -> bytes:
    """The contents of a JSON file of ours; numbers that are infinite or NaN are null."""
    return f"{json_text(values, indent=2)}\n".encode()


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Around the writing of a file.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from None


def check_folder(folder: Path) -> None:
    """Make sure that files can be written into a folder, which is made if it is missing.

    Raises:
        OSError: they cannot.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=folder):
        pass


def _check(path: str | Path, files: Sequence[Path], folders: Sequence[Path]) -> None:
    number = descriptor_of(path)
    if number in closed_at_start:
        raise OSError("it is closed")
    if number is not None:
        try:
            from fcntl import F_GETFL, fcntl
        except ImportError:
            # Windows
            return
        if fcntl(number, F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError("not open for writing")
        return
    place = Path(os.path.realpath(path))
    if place.is_dir():
        raise OSError("a folder")
    if is_stream(path):
        return
    for file in files:
        if _same(place, file):
            raise OSError(f"it is {file}, which is being read")
    for folder in folders:
        if place.parent == Path(os.path.realpath(folder)) and OWN_FILES.fullmatch(place.name):
            raise OSError(f"it is a file of the run in {folder}, which is being read")
    check_folder(place.parent)


def _same(first: Path, second: Path) -> bool:
    try:
        return first.samefile(second)
    except OSError:
        return False
