"""JSON as Python reads it, without what JSON files have no business to hold; every refusal names
line and column.

Refused beside bad syntax: a key given twice in one object (a comment, whose key begins with `_`,
may stand there any number of times), NaN and Infinity, numbers beyond the range of a float, strings
that are no Unicode text (half a surrogate pair), more than `DEEPEST` levels, bytes that are no
UTF-8. A UTF-8 byte order mark is passed over."""

import codecs
import json
import re
from collections.abc import Iterator
from math import isfinite, isinf
from pathlib import Path
from typing import Any

from base.errors import ConfigError
from base.text import one_line

DEEPEST = 100
"""Levels of objects and lists in one another. Configs have less than ten; Python's own limit
depends on its version."""
TOKEN = re.compile(
    r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|-?[0-9][0-9.eE+-]*|-?Infinity|NaN|[][{}:]', re.DOTALL
)
"""All tokens of JSON but those that can always stay as they are (commas, true, false, null). A
string without an end reaches to the end of the text, so brackets in strings are never taken for
structure."""
HALF_A_PAIR = re.compile("[\ud800-\udfff]")
"""A surrogate that stands alone, for those of a pair are one character in Python."""
KINDS = {
    dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number",
    type(None): "null",
}  # fmt: skip
"""What values are called in messages."""
UTF_16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class JSONError(ValueError):
    """What is wrong with a JSON text, and where.

    Attributes:
        reason: what is wrong, in one line.
        line, column: where, both from 1 on; columns are characters.
        syntax: whether the text is no JSON at all.
    """

    def __init__(self, reason: str, text: str, position: int, syntax: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.syntax = reason, syntax
        self.line = text.count("\n", 0, position) + 1
        self.column = position - text.rfind("\n", 0, position)


def read_json_object(file: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        ConfigError: one line, `file: line L, column C: what is wrong`; without a place where the
            file cannot be read at all.
    """
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{one_line(file)}: no such config file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ConfigError(
            f"{one_line(file)}: cannot be read: {one_line(getattr(error, 'strerror', None) or error)}"
        ) from None
    try:
        text = _decode(data)
        value = parse_json(text)
        if not isinstance(value, dict):
            start = len(text) - len(text.lstrip())
            raise JSONError(f"expected a JSON object, not {KINDS[type(value)]}", text, start)
    except JSONError as error:
        raise ConfigError(
            f"{one_line(file)}: line {error.line}, column {error.column}: {error.reason}"
        ) from None
    return value


def parse_json(text: str) -> Any:
    """The value of a JSON text, as `json.loads` gives it.

    Raises:
        JSONError: it is no JSON, or holds something that is refused.
    """
    _refuse_depth(text)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        reason = (
            f"not valid JSON: {error.msg}"
            if text.strip()
            else "nothing here: expected a JSON object"
        )
        raise JSONError(reason, text, error.pos, syntax=True) from None
    except ValueError:  # an integer of thousands of digits, which is now found again
        value = None
    _refuse_values(text)
    return value


def json_text(value: Any, indent: int | None = None) -> str:
    """A value as JSON, with null in place of infinite numbers and NaN, which JSON does not have.

    Every result, report and log that is written as JSON goes through here.
    """
    return json.dumps(_with_nulls(value), indent=indent, allow_nan=False)


def _with_nulls(value: Any) -> Any:
    if isinstance(value, float) and not isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _with_nulls(below) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [_with_nulls(item) for item in value]
    return value


def _decode(data: bytes) -> str:
    if data.startswith(UTF_16_MARKS):
        raise JSONError("UTF-16 or UTF-32 text: expected UTF-8", "", 0)
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        before = _with_plain_line_ends(data[: error.start].decode())
        raise JSONError(
            f"byte 0x{data[error.start]:02x} is not UTF-8 text", before, len(before)
        ) from None
    return _with_plain_line_ends(text)


def _with_plain_line_ends(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _words(text: str) -> Iterator[tuple[str, int]]:
    return ((match.group(), match.start()) for match in TOKEN.finditer(text))


def _refuse_depth(text: str) -> None:
    depth = 0
    for word, position in _words(text):
        if word in "[{":
            depth += 1
            if depth > DEEPEST:
                raise JSONError(f"nested deeper than {DEEPEST} levels", text, position)
        elif word in "]}":
            depth -= 1


def _refuse_values(text: str) -> None:
    """Refuse what `json.loads` has let pass in a text, which is therefore known to be of JSON's
    grammar."""
    keys: list[set[str]] = []  # of the objects and lists that are open
    string, begin = "", 0  # the latest string and its place: a key, where a colon follows
    for word, position in _words(text):
        match word[0]:
            case "{" | "[":
                keys.append(set())
            case "}" | "]":
                keys.pop()
            case '"':
                string, begin = json.loads(word) if "\\" in word else word[1:-1], position
                if HALF_A_PAIR.search(string):
                    raise JSONError("half a surrogate pair is no text", text, position)
            case ":":
                if string in keys[-1] and not string.startswith("_"):
                    raise JSONError(
                        f"key {string[:80]!r} is given twice in one object", text, begin
                    )
                keys[-1].add(string)
            case _:
                if word.endswith(("NaN", "Infinity")):
                    raise JSONError(f"{word} is not a finite number", text, position)
                if isinf(float(word)):
                    raise JSONError(
                        f"{one_line(word, 20)} is too large a number: expected at most 1.8e308",
                        text,
                        position,
                    )
