"""Strict JSON: `json` from the standard library without its extensions.

`json` accepts several things that have no place in a config. `parse_json` refuses them: a key that
is given twice in one object (except comments, whose keys begin with `_`), NaN and Infinity, numbers
beyond the range of a float, half surrogate pairs, and more than `MAX_DEPTH` levels.
"""

import json
import re
from collections import Counter
from math import isfinite, isinf
from pathlib import Path
from typing import Any, NoReturn

from base.errors import ConfigError
from base.text import one_line

MAX_DEPTH = 100
"""The largest number of nested objects and lists. Configs have fewer than ten."""
TOO_DEEP = f"nested deeper than {MAX_DEPTH} levels"
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half a surrogate pair. Python merges the two halves of a whole one into one character."""
TYPE_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "null",
}
"""The names of JSON's types in messages."""


class JSONError(ValueError):
    """A JSON text that is refused.

    Attributes:
        place: `line L, column C`, both counted from 1; empty where the place is unknown.
        is_syntax_error: True if the text is not JSON at all.
    """

    def __init__(self, reason: str, place: str = "", is_syntax_error: bool = False) -> None:
        super().__init__(reason)
        self.place = place
        self.is_syntax_error = is_syntax_error


def read_json_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        ConfigError: one line that names the file and, where it is known, the line and column.
    """
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{one_line(file)}: no such config file") from None
    except (OSError, ValueError) as error:
        # pathlib raises a ValueError for a null byte in the path; it has no strerror
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{one_line(file)}: cannot be read: {one_line(reason)}") from None
    try:
        value = parse_json(_decode(data))
    except JSONError as error:
        place = f"{error.place}: " if error.place else ""
        raise ConfigError(f"{one_line(file)}: {place}{error}") from None
    if not isinstance(value, dict):
        found = TYPE_NAMES[type(value)]
        raise ConfigError(f"{one_line(file)}: expected a JSON object, not {found}")
    return value


def parse_json(text: str) -> Any:
    """Return the value of a JSON text, as `json.loads` does.

    Raises:
        JSONError: the text is not JSON, or it contains something that this module refuses.
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=_parse_object,
            parse_constant=_reject_constant,
            parse_float=_parse_float,
            parse_int=_parse_int,
        )
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        reason = f"not valid JSON: {error.msg}"
        if not text.strip():
            reason = "empty: expected a JSON object"
        raise JSONError(reason, place, is_syntax_error=True) from None
    except RecursionError:
        # The depth at which json itself gives up depends on the version of Python
        raise JSONError(TOO_DEEP) from None
    _check_text_and_depth(value, 0)
    return value


def json_text(value: Any, indent: int | None = None) -> str:
    """Return a value as JSON, with null in place of NaN and infinite numbers.

    Everything that is written as JSON (results, reports, logs) goes through this function.
    """
    return json.dumps(_replace_non_finite(value), indent=indent, allow_nan=False)


def _replace_non_finite(value: Any) -> Any:
    if isinstance(value, float) and not isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _replace_non_finite(below) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_non_finite(item) for item in value]
    return value


def _decode(data: bytes) -> str:
    try:
        # Editors on Windows put a byte order mark at the start, which utf-8-sig drops
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        lines = error.object[: error.start].split(b"\n")
        place = f"line {len(lines)}, column {len(lines[-1].decode()) + 1}"
        byte = error.object[error.start]
        raise JSONError(f"byte 0x{byte:02x} is not UTF-8 text", place) from None


def _parse_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        for key, count in Counter(key for key, _ in pairs).items():
            # Comments may share a key: a file may hold several keys called "_"
            if count > 1 and not key.startswith("_"):
                raise JSONError(f"key {key[:80]!r} is given twice in one object")
    return tree


def _reject_constant(name: str) -> NoReturn:
    raise JSONError(f"{name} is not a finite number")


def _parse_float(text: str) -> float:
    number = float(text)
    if isinf(number):
        raise JSONError(f"{one_line(text, 20)} is too large a number: expected at most 1.8e308")
    return number


def _parse_int(text: str) -> int:
    # float() comes first because int() raises an error of its own for thousands of digits
    _parse_float(text)
    return int(text)


def _check_text_and_depth(value: Any, depth: int) -> None:
    if isinstance(value, str):
        # json accepts "\ud800", which no file and no terminal can encode
        if LONE_SURROGATE.search(value):
            raise JSONError("half a surrogate pair is not text")
    elif isinstance(value, dict | list):
        if depth == MAX_DEPTH:
            raise JSONError(TOO_DEEP)
        for item in value:
            _check_text_and_depth(item, depth + 1)
        if isinstance(value, dict):
            for item in value.values():
                _check_text_and_depth(item, depth + 1)
