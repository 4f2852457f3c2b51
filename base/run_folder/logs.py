"""Log messages on the terminal and in `info.log`, and logged values as one readable line."""

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from base.distributed import is_primary
from base.errors import ProjectError
from base.meters import is_accuracy
from base.text import LineFormatter, TerminalFormatter


class _LogFile(logging.FileHandler):
    """A log file that ends the run when it cannot be written, like every other file of a run."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        raise


@contextmanager
def logging_to(file: Path, verbosity: int) -> Iterator[None]:
    """Send the log messages of rank 0 to the terminal and append them to `file`.

    Other ranks log nothing, as rank 0 has the same messages.

    Args:
        file: the log file.
        verbosity: 0 for warnings only; above 0 also one line per epoch.
    """
    root = logging.getLogger()
    level = root.level
    handlers: list[logging.Handler] = [logging.NullHandler()]
    if is_primary():
        terminal = logging.StreamHandler(sys.stdout)
        terminal.setFormatter(TerminalFormatter())
        log_file = _LogFile(file, encoding="utf-8")
        log_file.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(message)s"))
        handlers = [terminal, log_file]
        root.setLevel(logging.INFO if verbosity > 0 else logging.WARNING)
    for handler in handlers:
        root.addHandler(handler)
    try:
        yield
    except ProjectError as error:
        # To the file only: on the terminal the command prints the error as its last line
        handlers[-1].handle(
            logging.makeLogRecord(
                {"levelname": "ERROR", "levelno": logging.ERROR, "msg": str(error)}
            )
        )
        raise
    finally:
        root.setLevel(level)
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()


def format_values(values: Mapping[str, Any]) -> str:
    """Format logged values in one line: accuracies in percent, others with four digits."""
    return "  ".join(f"{key} {_format_number(key, value)}" for key, value in values.items())


def _format_number(key: str, value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    if is_accuracy(key):
        return f"{value:.2%}"
    return f"{value:.4g}"
