"""Log messages on the terminal and in `info.log`, and values in one readable line."""

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from base.errors import ProjectError
from base.meters import is_accuracy
from base.text import LineFormatter, TerminalFormatter


class _LogFile(logging.FileHandler):
    """A log file that cannot be written ends the run, as every other file of it does."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        raise


@contextmanager
def logging_to(file: Path, verbosity: int) -> Iterator[None]:
    """Send log messages to the terminal and to `file` (appended): warnings at verbosity 0, a line
    per epoch above it."""
    root = logging.getLogger()
    level = root.level
    log_file = _LogFile(file, encoding="utf-8")
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout), log_file]
    handlers[0].setFormatter(TerminalFormatter())
    handlers[1].setFormatter(LineFormatter("%(asctime)s %(levelname)s %(message)s"))
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(logging.INFO if verbosity > 0 else logging.WARNING)
    try:
        yield
    except ProjectError as error:  # the terminal gets it from the script, as its last line
        handlers[1].handle(
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


def describe(values: Mapping[str, Any]) -> str:
    """One readable line of logged values: accuracies in per cent, the rest in four significant
    digits."""
    return "  ".join(f"{key} {_number(key, value)}" for key, value in values.items())


def _number(key: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2%}" if is_accuracy(key) else f"{value:.4g}"
    return str(value)
