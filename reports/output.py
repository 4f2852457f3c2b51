"""The files that reports are written to."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from base.errors import ConfigError


def check_output(path: str | Path, formats: Sequence[str], what: str) -> None:
    """Refuse a path that no report can be written to, before the work that it would hold; missing folders are made.

    Args:
        path: its suffix decides the format.
        formats: suffixes without the dot.
        what: what is to be written, such as `"pictures"`, for the error.

    Raises:
        ConfigError: its suffix is no known format, it is a folder, or its folder cannot be made.
    """
    file = Path(path)
    if file.suffix.lower().removeprefix(".") not in formats:
        raise ConfigError(f"{path}: {file.suffix!r} is no format of {what}; expected one of: {', '.join(formats)}")
    if file.is_dir():
        raise ConfigError(f"{path}: cannot be written: a folder")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None


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
