"""One line for all errors that pydantic finds in a config."""

import json
import re
from collections.abc import Collection, Sequence
from typing import Any

from pydantic import ValidationError

from base.config.adversarial import size_keys
from base.config.arguments import ARGUMENT_OF_OTHERS, MISSING_ARGUMENT, OpenSection
from base.config.origins import Layer, Origins, origin_of, origin_of_keys, origin_of_null
from base.config.strict_json import TYPE_NAMES
from base.config.tree import describe_unknown_key, section_at
from base.errors import all_of
from base.registry import not_one_of
from base.text import one_line

DOTTED_KEY = re.compile(r"[A-Za-z_]\w*(?:\.\w+)*")
KNOWN_KEYS = " (known here: "
"""The beginning of the list of known keys in the message for an unknown one."""
Problem = tuple[str | None, str]
"""The file or flag that is to blame, if any, and a message that begins with a dotted key."""


def format_problems(problems: Sequence[Problem], source: str) -> str:
    """Return problems in one line, each after the file or flag that is to blame for it.

    Args:
        problems: at least one.
        source: what is named where no file or flag is to blame.
    """
    parts = []
    last = None
    for origin, text in problems:
        blamed = origin or source
        # The same file is not named again for each of its problems
        parts.append(one_line(text) if blamed == last else f"{blamed}: {one_line(text)}")
        last = blamed
    return all_of(parts)


def problems_of(
    error: ValidationError, origins: Origins, layers: Sequence[Layer] = ()
) -> list[Problem]:
    """Return each problem of a tree once, unknown keys first; `layers` are those of the tree."""
    # A misspelt required key causes two errors, of which "missing" says less, so it comes later.
    errors = sorted(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    wrong_keys = {".".join(map(str, each["loc"])) for each in errors}
    sections_listed: set[tuple[Any, ...]] = set()
    problems: list[Problem] = []
    for each in errors:
        text = _message(each)
        if each["type"] == "extra_forbidden":
            # A wrong arch.type makes its arguments unknown; the message for the type is enough.
            if _may_belong_to_wrong_entry(each["loc"], wrong_keys):
                continue
            section = tuple(each["loc"][:-1])
            if section in sections_listed:
                text = text.partition(KNOWN_KEYS)[0]
            sections_listed.add(section)
        remover = None
        if each["type"] == "missing":
            remover = origin_of_null(layers, [str(part) for part in each["loc"]])
        if remover is not None:
            key = text.partition(": ")[0]
            problems.append((remover, f"{key}: required, but null removes it"))
            continue
        problems.append((_blamed_origin(each, text, origins), text))
    return list(dict.fromkeys(problems))


def origin_of_first_key(text: str, origins: Origins) -> str | None:
    """Return the file or flag that gave the value of the key that a message begins with.

    That is None for a default, and for a message that does not begin with a dotted key.
    """
    key, colon, _ = text.partition(": ")
    if not colon or not DOTTED_KEY.fullmatch(key):
        return None
    return origin_of(origins, key.split("."))


def is_secret(path: Sequence[str]) -> bool:
    """Whether a value may be the Comet key, wherever in its section somebody has put it."""
    return list(path[:1]) == ["comet"]


def format_for_message(value: Any) -> str:
    """Return a config value as JSON, cut to 80 characters and without secrets."""
    text = json.dumps(value)
    # An object in the wrong place may be the section that holds the Comet key
    if isinstance(value, dict | list) and "{" in text:
        return TYPE_NAMES[type(value)]
    return one_line(text, 80)


def _may_belong_to_wrong_entry(path: Sequence[int | str], wrong_keys: Collection[str]) -> bool:
    """Whether a key may be an argument of an entry of a table whose name is wrong, too."""
    section = section_at([str(part) for part in path[:-1]])
    if section is None or not issubclass(section, OpenSection):
        return False
    return any(choice.key in wrong_keys for choice in section.choices)


def _blamed_origin(problem: Any, text: str, origins: Origins) -> str | None:
    path = tuple(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        return None
    if problem["type"] == MISSING_ARGUMENT:
        return origin_of(origins, problem["ctx"]["choice"].split("."))
    if problem["type"] != "value_error" or path in origins:
        return origin_of(origins, path)
    # Several values contradict each other. The message names their keys, some of them relative to
    # the section. The value that was given last is to blame.
    words = [tuple(word.split(".")) for word in DOTTED_KEY.findall(text)]
    candidates = [word for word in words if len(word) > 1] + words[:1]
    if path:
        candidates += [(*path, *word) for word in words]
    known = [word for word in candidates if word in origins]
    return origin_of_keys(origins, known) if known else origin_of(origins, path)


def _message(problem: Any) -> str:
    """One pydantic error as `dotted.key: what is wrong`."""
    path = [str(part) for part in problem["loc"]]
    key = one_line(".".join(path), 200)
    match problem["type"]:
        case "extra_forbidden":
            return describe_unknown_key(path)
        case "missing":
            return f"{key}: required, but not given"
        case "value_error":
            return _message_of_validator(key, str(problem["ctx"]["error"]))
    value = problem["input"]
    if problem["type"] in (ARGUMENT_OF_OTHERS, MISSING_ARGUMENT):
        return f"{key}: {problem['msg']}"
    if is_secret(path):
        return f"{key}: {problem['msg']} (the value is not shown)"
    if tuple(path) in size_keys() and isinstance(value, str):
        expected = 'expected a number, or a fraction of the pixel range such as "8/255"'
        return f"{key}: {expected}, not {format_for_message(value)}"
    if problem["type"] == "literal_error" and isinstance(value, str):
        # pydantic gives the names as one text: 'a', 'b' or 'c'
        expected = problem["ctx"]["expected"].replace(" or ", ", ")
        names = [name.strip("'") for name in expected.split(", ")]
        return f"{key}: {not_one_of(value, names)}"
    return f"{key}: {problem['msg']}, not {format_for_message(value)}"


def _message_of_validator(key: str, message: str) -> str:
    if not key:
        return message
    # Validators of a section begin with one of its keys, those of a value with the value in quotes
    if message[0] in ("'", '"'):
        return f"{key}: {message}"
    return f"{key}.{message}"
