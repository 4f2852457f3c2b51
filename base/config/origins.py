"""Where each value of a config comes from: a file, one of its parents, a flag, or the default."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from base.text import one_line

Keys = tuple[str, ...]
Origins = dict[Keys, str]
"""Keys down to a leaf -> what gave it its value, in the order in which they were put on top of each
other."""
LONGEST = 120
"""Characters of a flag that is shown."""
DEFAULT = "default"
WIDEST = 60
"""Lines up to this length decide where the comments are aligned."""


@dataclass(frozen=True)
class Layer:
    """What one file, or one flag, says of a config.

    Attributes:
        origin: what messages call it, such as `configs/base.json (extended by my.json)` or
            `--set trainer.epochs=-1`.
        tree: the tree of its values.
        folder: what the paths of its `imports` are relative to.
        is_flag: whether it stands on the command line.
    """

    origin: str
    tree: dict[str, Any]
    folder: Path = Path()
    is_flag: bool = False


@dataclass(frozen=True)
class Provenance:
    """The origins of a config's values. Configs with the same values are equal, wherever those come
    from, so this equals every other one."""

    origins: Origins = field(default_factory=dict, compare=False)


class Flag(tuple[str, str]):
    """An override, key and text of its value, that knows how the user has written it."""

    written: str

    def __new__(cls, override: tuple[str, str], written: str = "") -> "Flag":
        flag = super().__new__(cls, override)
        flag.written = written
        return flag


def origin_of_override(override: tuple[str, str]) -> str:
    """How an override stands on the command line. Comet's key is not shown."""
    key, text = override
    written = getattr(override, "written", "") or f"--set {key}={text}"
    if key.partition(".")[0] == "comet":
        written = written.partition("=" if written.startswith("--set ") else " ")[0]
    return one_line(written, LONGEST)


def record(origins: Origins, layer: Layer) -> None:
    """Note the leaves of a layer that is put on top."""
    sections = {known[:depth] for known in origins for depth in range(len(known))}
    for path, value in leaves(layer.tree):
        if path in sections:
            if value == {}:
                # an empty object replaces nothing
                continue
            for below in [known for known in origins if _is_below(known, path)]:
                del origins[below]
        for depth in range(len(path)):
            origins.pop(path[: depth + 1], None)
        if value is not None:
            origins[path] = layer.origin


def leaves(tree: Mapping[str, Any], path: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Path and value of everything in a tree that is not an object, or an empty one."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def origin_of(origins: Origins, path: Sequence[str]) -> str | None:
    """What gave the value at a path, or, where it is a section, the last value in it; None for a
    default."""
    found = _latest(origins, [tuple(path)])
    return None if found is None else origins[found]


def origin_of_keys(origins: Origins, paths: Iterable[Sequence[str]]) -> str | None:
    """What came last of what gave the values at some paths."""
    found = _latest(origins, [tuple(path) for path in paths])
    return None if found is None else origins[found]


def _latest(origins: Origins, paths: Sequence[Keys]) -> Keys | None:
    found = None
    for known in origins:
        if any(_is_below(known, path) or _is_below(path, known) for path in paths):
            found = known
    return found


def _is_below(path: Keys, other: Keys) -> bool:
    """Whether a path is another one, or lies in it."""
    return path[: len(other)] == other


def format_config(tree: Mapping[str, Any], origins: Origins) -> str:
    """A resolved tree as JSON, one line per key, with the origin of its value as a comment key
    beside it: `"epochs": 5, "_epochs": "--set trainer.epochs=5"`. It can be used as a config."""
    lines = list(_lines(tree, origins, (), "  "))
    lengths = [len(line) for line, origin in lines if origin is not None]
    width = max((length for length in lengths if length <= WIDEST), default=0)
    text = [line if origin is None else f"{line:<{width}}  {origin}" for line, origin in lines]
    return "\n".join(["{", *text, "}"])


def _lines(
    tree: Mapping[str, Any], origins: Origins, path: Keys, indent: str
) -> Iterator[tuple[str, str | None]]:
    """Lines of an object, each with the comment that follows it; None for a bracket."""
    for number, (key, value) in enumerate(tree.items(), 1):
        comma = "," if number < len(tree) else ""
        below = (*path, key)
        if isinstance(value, Mapping) and value:
            yield f"{indent}{json.dumps(key)}: {{", None
            yield from _lines(value, origins, below, f"{indent}  ")
            yield f"{indent}}}{comma}", None
        else:
            origin = json.dumps(origin_of(origins, below) or DEFAULT)
            yield (
                f"{indent}{json.dumps(key)}: {json.dumps(value)},",
                f"{json.dumps(f'_{key}')}: {origin}{comma}",
            )
