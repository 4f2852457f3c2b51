"""Where each value of a config comes from: a file, one of its parents, a flag, or the default."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from base.text import one_line

Keys = tuple[str, ...]
Origins = dict[Keys, str]
"""The keys that lead to a leaf -> the file or flag that gave its value, lowest layer first."""
MAX_FLAG = 120
"""Characters of a flag in a message."""
MAX_ALIGNED = 60
"""The longest line of a formatted config that counts for the column of the comments."""


@dataclass(frozen=True)
class Layer:
    """The values that one file, or one flag, gives to a config.

    Attributes:
        origin: its name in messages, such as `configs/base.json (extended by my.json)` or
            `--set trainer.epochs=-1`.
        tree: its values.
        file: the file; an empty path for other layers.
        folder: the folder to which the paths of its `imports` are relative.
        is_flag: whether it is on the command line.
    """

    origin: str
    tree: dict[str, Any]
    file: Path = Path()
    folder: Path = Path()
    is_flag: bool = False


@dataclass(frozen=True)
class Provenance:
    """The origins of a config's values."""

    # Not compared: configs with the same values are equal, wherever the values come from
    origins: Origins = field(default_factory=dict, compare=False)


class Flag(tuple[str, str]):
    """An override (key and text of its value) with the flag as the user has written it."""

    written: str

    def __new__(cls, override: tuple[str, str], written: str = "") -> "Flag":
        flag = super().__new__(cls, override)
        flag.written = written
        return flag


def origin_of_override(override: tuple[str, str]) -> str:
    """Return an override as it is written on the command line."""
    key, text = override
    written = getattr(override, "written", "") or f"--set {key}={text}"
    # The value may be Comet's key
    if key.partition(".")[0] == "comet":
        separator = "=" if written.startswith("--set ") else " "
        written = written.partition(separator)[0]
    return one_line(written, MAX_FLAG)


def record(origins: Origins, layer: Layer) -> None:
    """Record the origin of every leaf of a layer that is put on top of the others."""
    sections = {known[:depth] for known in origins for depth in range(len(known))}
    for path, value in _leaves(layer.tree):
        if path in sections:
            # An empty object is merged with the section, and replaces nothing
            if value == {}:
                continue
            for below in [known for known in origins if _is_below(known, path)]:
                del origins[below]
        # Also removes the path itself, so that it is inserted again as the latest
        for depth in range(len(path)):
            origins.pop(path[: depth + 1], None)
        if value is not None:
            origins[path] = layer.origin


def _leaves(tree: Mapping[str, Any], path: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Yield the path and value of everything in a tree that is not an object with keys."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def origin_of(origins: Origins, path: Sequence[str]) -> str | None:
    """Return the file or flag that gave the value at a path; None for a default.

    For a section it is the one that gave the latest value in it.
    """
    return origin_of_keys(origins, [path])


def origin_of_keys(origins: Origins, paths: Iterable[Sequence[str]]) -> str | None:
    """Return the file or flag that gave the latest of the values at some paths."""
    keys = [tuple(path) for path in paths]
    # Later layers are inserted later
    for known in reversed(origins):
        if any(_is_below(known, path) or _is_below(path, known) for path in keys):
            return origins[known]
    return None


def origin_of_null(layers: Sequence[Layer], path: Sequence[str]) -> str | None:
    """Return the latest file or flag that removes a key, or a section above it; None without one.

    It removes what earlier layers give by a null.
    """
    for layer in reversed(layers):
        tree: Any = layer.tree
        for key in path:
            if not isinstance(tree, Mapping) or key not in tree:
                break
            tree = tree[key]
            if tree is None:
                return layer.origin
    return None


def _is_below(path: Keys, other: Keys) -> bool:
    """Whether a path is the other one or continues it."""
    return path[: len(other)] == other


def format_config(tree: Mapping[str, Any], origins: Origins) -> str:
    """Return a resolved tree as JSON, one line per key, with the origin of its value.

    The origin is a comment key: `"epochs": 5, "_epochs": "--set trainer.epochs=5"`. So the text can
    be used as a config.
    """
    lines = list(_lines(tree, origins, (), "  "))
    lengths = [len(line) for line, origin in lines if origin is not None]
    width = max((length for length in lengths if length <= MAX_ALIGNED), default=0)
    text = [line if origin is None else f"{line:<{width}}  {origin}" for line, origin in lines]
    return "\n".join(["{", *text, "}"])


def _lines(
    tree: Mapping[str, Any], origins: Origins, path: Keys, indent: str
) -> Iterator[tuple[str, str | None]]:
    """Yield the lines of an object, each with the comment that follows it; None for a bracket."""
    for number, (key, value) in enumerate(tree.items(), 1):
        comma = "," if number < len(tree) else ""
        below = (*path, key)
        if isinstance(value, Mapping) and value:
            yield f"{indent}{json.dumps(key)}: {{", None
            yield from _lines(value, origins, below, f"{indent}  ")
            yield f"{indent}}}{comma}", None
        else:
            origin = json.dumps(origin_of(origins, below) or "default")
            yield (
                f"{indent}{json.dumps(key)}: {json.dumps(value)},",
                f"{json.dumps(f'_{key}')}: {origin}{comma}",
            )
