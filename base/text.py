"""Text that others have written, such as names of classes and files, on its way to terminals, logs,
pictures and tables.

Everything that is shown goes through `one_line`, so that no name can move a cursor, break a row or
reverse what stands behind it.
"""

import logging
from typing import Any

FORMULA_SIGNS = ("=", "+", "-", "@")
"""A cell that begins with one of these is a formula to spreadsheets."""


def one_line(value: Any, longest: int | None = None) -> str:
    """A value's text as one line that shows all that is in it.

    Line breaks, control characters (C0, C1, DEL), signs that change the direction of writing, and
    whatever else a terminal does not show become escapes such as `\\n`, `\\x1b` and `\\u202e`; half
    a surrogate pair, which is how Python hands over bytes that are no UTF-8, becomes `\\udcff`.

    Args:
        value: anything with a text.
        longest: cut the text where it is longer.
    """
    text = str(value)
    if longest is not None and len(text) > longest:
        text = f"{text[:longest]}..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def first_line(error: Exception) -> str:
    """The first line of an exception's message; the name of its class where it has none."""
    lines = str(error).splitlines() or [type(error).__name__]
    return one_line(lines[0])


def csv_text(value: Any) -> str:
    """A text cell of a CSV file: one line, with an apostrophe before what a spreadsheet would
    compute."""
    text = one_line(value)
    return f"'{text}" if text.startswith(FORMULA_SIGNS) else text


def say(*values: Any) -> None:
    """Print a line for each value."""
    for value in values:
        print(one_line(value))


class LineFormatter(logging.Formatter):
    """Writes a log record as one line."""

    def format(self, record: logging.LogRecord) -> str:
        return one_line(super().format(record))


class TerminalFormatter(LineFormatter):
    """Writes a log record as one line, which begins with `warning: ` or `error: ` if it is one."""

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        if record.levelno < logging.WARNING:
            return line
        return f"{record.levelname.lower()}: {line}"
