"""The files that a command line names for reports, pictures and tables.

They are checked before the work and written after it. A path may also be `-` (standard output), a
device, a named pipe or `>(command)`. These are written to, never replaced. They have no suffix that
would choose the format, so the first possible format is taken.
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

logger = logging.getLogger(__name__)

PICTURES = ("png", "pdf", "svg")
ARRAYS = ("npz",)
KINDS = {PICTURES: "pictures", ARRAYS: "arrays"}
"""Formats -> what their files hold, for messages."""
DPI = 160
STDOUT = 1
OWN_FILES = re.compile(
    "|".join(map(re.escape, (CONFIG, RESULT, ENVIRONMENT, STUDY_INDEX, METRICS, LABELS, LOCK)))
    + r"|.*\.(log|pth)"
)
"""The files that a run writes into its folder, and a study beside it. Reports may be written there
under other names."""


class Picture(Protocol):
    """A `matplotlib.figure.Figure`."""

    def savefig(self, file: Any, /, **options: Any) -> None:
        """Write the picture to an open binary file."""


def is_stdout(path: str | Path) -> bool:
    """Whether `path` stands for standard output."""
    return str(path) in ("-", "/dev/stdout")


def is_stream(path: str | Path) -> bool:
    """Whether `path` is standard output, a pipe or a device. Nothing can be written beside it
    then."""
    if is_stdout(path):
        return True
    try:
        mode = Path(path).stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def format_of(path: str | Path, formats: Sequence[str]) -> str:
    """Return the format of a path, one of `formats`, by its suffix. A stream without such a suffix
    gets the first format.

    Raises:
        ConfigError: the suffix is not one of `formats`.
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
    """Check that all outputs can and may be written, and make missing folders.

    If one of them is standard output, everything else that the command prints goes to stderr from
    now on, until `run_script` ends.

    Args:
        outputs: flag -> path, or None if the flag was not given.
        formats: flag -> suffixes that its path may have. A flag that is not listed may have any.
        files: input files, which must not be overwritten.
        folders: run folders that are input. The names of a run's own files in them are refused,
            whether or not the file exists.

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
        place = "-" if is_stdout(path) else os.path.realpath(path)
        if place == "-" or not is_stream(path):
            other = places.setdefault(place, flag)
            if other != flag:
                raise ConfigError(f"{flag} {path}: {other} is written there, too")
    if "-" in places:
        sys.stdout = sys.stderr


def write_output(path: str | Path, data: bytes) -> None:
    """Write `data` to a path, through links, pipes and devices, and make missing folders.

    A file is replaced atomically. It is not an error if the reader of a pipe has left, such as
    `head`.

    Raises:
        OSError: it cannot be written.
    """
    if not is_stream(path):
        place = Path(os.path.realpath(path))
        place.parent.mkdir(parents=True, exist_ok=True)
        with replacing(place) as file:
            file.write(data)
        return
    # Text that was printed before has to come first.
    sys.stdout.flush()
    try:
        # Opening /dev/stdout would begin at the start of the file that it is redirected to.
        target = os.dup(STDOUT) if is_stdout(path) else path
        # Path.open takes no descriptor.
        with open(target, "wb", buffering=0) as stream:  # noqa: PTH123
            remaining = memoryview(data)
            # A raw file may write less than it is given.
            while remaining:
                remaining = remaining[stream.write(remaining) :]
    except BrokenPipeError:
        return


def save_figure(figure: Picture, path: str | Path) -> None:
    """Write a matplotlib figure in the format of the path's suffix, and make missing folders.

    Raises:
        ConfigError: the suffix is not that of a picture, or the path cannot be written.
    """
    # Only a figure is saved here, so matplotlib has been imported already
    from matplotlib import rc_context

    picture = BytesIO()
    # 42 is TrueType; publishers do not accept matplotlib's default, Type 3
    with warnings.catch_warnings(record=True) as caught, rc_context({"pdf.fonttype": 42}):
        warnings.filterwarnings("always", message="Glyph .* missing")
        figure.savefig(picture, format=format_of(path, PICTURES), dpi=DPI)
    # matplotlib warns about each missing letter; one line for all of them is enough.
    glyphs = [one for one in caught if str(one.message).startswith("Glyph")]
    if glyphs:
        logger.warning("%s: the font lacks letters of some names, which appear as boxes", path)
    for other in caught:
        if other not in glyphs:
            warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    with writing(path):
        write_output(path, picture.getvalue())


def save_json(path: str | Path, values: Any) -> None:
    """Write plain values as indented JSON, and make missing folders.

    Raises:
        ConfigError: the path cannot be written.
    """
    with writing(path):
        write_output(path, as_json(values))


def replace_json(path: Path, values: Any) -> None:
    """Replace a file of a run or a study by plain values as indented JSON, in one step.

    Raises:
        OSError: it cannot be written.
    """
    with replacing(path) as file:
        file.write(as_json(values))


def as_json(values: Any) -> bytes:
    """Return the contents of a JSON file; numbers that are infinite or NaN become null."""
    return f"{json_text(values, indent=2)}\n".encode()


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn an `OSError` of writing `path` into one line.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from None


def check_folder(folder: Path) -> None:
    """Make a folder if it is missing, and check that files can be written into it.

    Raises:
        OSError: they cannot.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=folder):
        pass


def _check(path: str | Path, files: Sequence[Path], folders: Sequence[Path]) -> None:
    if is_stdout(path):
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
