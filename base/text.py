"""Text of unknown origin, such as names of classes and files, made safe to show.

Everything that is shown on terminals and in logs, pictures and tables goes through `one_line`. A
name can then not move a cursor, break a row or reverse the text behind it.
"""

import logging
from collections.abc import Sequence
from typing import Any

FORMULA_SIGNS = ("=", "+", "-", "@")
"""Spreadsheets take a cell that begins with one of these for a formula."""


def one_line(value: Any, longest: int | None = None) -> str:
    """Return a value's text as one line in which every character is visible.

    Line breaks, control characters (C0, C1, DEL), marks that change the direction of writing, and
    other characters that a terminal does not show become escapes such as `\\n`, `\\x1b` and
    `\\u202e`. Half a surrogate pair, by which Python represents bytes that are not UTF-8, becomes
    `\\udcff`.

    Args:
        value: its `str` is the text.
        longest: characters; a longer text is cut and ends with `...`.
    """
    text = str(value)
    if longest is not None and len(text) > longest:
        text = f"{text[:longest]}..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or the name of its class without one."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return one_line(lines[0])


def describe_error(error: BaseException) -> str:
    """Return the class of an exception and the first line of its message, if it has one."""
    kind = type(error).__name__
    if not str(error).strip():
        return kind
    return f"{kind}: {first_line(error)}"


def counted(number: int, noun: str) -> str:
    """Return a number of things, such as `1 batch` or `2 batches`."""
    if number == 1:
        return f"1 {noun}"
    # Not "ch": epochs
    ending = "es" if noun.endswith(("s", "x", "tch", "sh")) else "s"
    return f"{number} {noun}{ending}"


def csv_text(value: Any) -> str:
    """Return a text cell of a CSV file: one line that spreadsheets do not take for a formula."""
    text = one_line(value)
    if text.startswith(FORMULA_SIGNS):
        # The apostrophe tells spreadsheets that the cell is text; they do not show it.
        return f"'{text}"
    return text


def text_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align columns, two blanks apart: the first one to the left, all others to the right."""
    lines = [[one_line(cell) for cell in line] for line in (heads, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    aligned = []
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        cells[0] = line[0].ljust(widths[0])
        aligned.append("  ".join(cells).rstrip())
    return "\n".join(aligned)


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
