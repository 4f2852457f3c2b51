"""Config files: read JSON, inherit, override, validate.

A file may name its parent in `extends`: its own keys win, and `null` deletes a key, which gives it its default. That path is
relative to the file; where the file is a symbolic link, to what it leads to. A key that begins with `_`, and `$schema`,
is a comment.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import ValidationError

from base.config import Config
from base.config_robustness import SIZES, read_sizes
from base.config_section import Section
from base.errors import ConfigError
from base.json_file import HALF_A_PAIR, KINDS, JSONError, one_line, parse_json, read_json_object
from base.registry import did_you_mean

Tree = dict[str, Any]
LONGEST_PATH = 20
"""Names in a dotted key. The tree itself has five levels, free-form arguments a few more."""
Override = tuple[str, str]
"""A dotted key and the text of its value."""

QUOTES = ("'", '"')
PLACEHOLDER = re.compile(r"\*\*.*\*\*")
"""ConvNorm's published configs write `**data dir**` and `**comet key**` where the user's own values belong."""


def load_config(path: str | Path, overrides: Iterable[Override] = ()) -> Config:
    """The typed config of a file, its parents and the command line's overrides.

    Raises:
        ConfigError: one line that names the file and what is wrong with it.
    """
    return validate(override(read_tree(path), overrides), str(path))


def read_tree(path: str | Path, root: type[Section] = Config) -> Tree:
    """The JSON tree of a file merged over its parents'; `root` is what it holds.

    Raises:
        ConfigError: one line that names the file and, where there is one, the place in it.
    """
    trees, files, file, context = [], set(), Path(path), ""
    while True:
        place = _resolved(file)
        if place in files:
            raise ConfigError(f"{context}{one_line(file)} extends itself")
        files.add(place)
        try:
            trees.append(read_json_object(file))
        except ConfigError as error:
            raise ConfigError(f"{context}{error}") from None
        parent = trees[-1].pop("extends", None)
        if parent is None:
            break
        context = f"{one_line(file)}: extends: "
        if not isinstance(parent, str):
            raise ConfigError(f"{context}expected the path of a config file, not {_shown(parent)}")
        file = (place if file.is_symlink() else file).parent / parent
    tree = trees.pop()
    try:
        while trees:
            tree = merge(tree, trees.pop(), root)
    except ConfigError as error:
        raise ConfigError(f"{one_line(path)}: {error}") from None
    return tree


def merge(parent: Tree, child: Tree, root: type[Section] = Config, path: tuple[str, ...] = ()) -> Tree:
    """`parent` with the keys of `child`, which win; where the child says null the key is gone.

    Args:
        parent, child: trees of JSON values.
        root: what the whole trees hold.
        path: the keys under which these two lie in them.

    Raises:
        ConfigError: a null for a key that does not exist: a misspelt one would keep what it was to delete.
    """
    merged = dict(parent)
    for key, value in child.items():
        if value is None:
            _refuse_unknown(key, merged, root, path)
            merged.pop(key, None)
        elif isinstance(value, dict):
            below = merged.get(key)
            merged[key] = merge(below if isinstance(below, dict) else {}, value, root, (*path, key))
        else:
            merged[key] = value
    return merged


def _refuse_unknown(key: str, parent: Tree, root: type[Section], path: tuple[str, ...]) -> None:
    """Refuse a key that a section does not know, or, among free-form arguments, one that is like another that is there."""
    section = section_at(path, root)
    known = list(section.model_fields) if section else [other for other in parent if path]
    hint = did_you_mean(key, known)
    if key not in known and not is_comment(key) and (section or hint):
        raise ConfigError(f"{one_line('.'.join((*path, key)), 200)}: unknown key{hint} (known here: {', '.join(known)})")


def override(tree: Tree, overrides: Iterable[Override]) -> Tree:
    """`tree` with dotted keys replaced: a value is JSON, a bare word is a string, the field's own type decides between them."""
    for key, text in overrides:
        path = key.split(".")
        if not all(path) or len(path) > LONGEST_PATH:
            raise ConfigError(f"{key[:80]!r}: expected a dotted key such as trainer.epochs")
        value = _parse(text, path)
        for name in reversed(path):
            value = {name: value}
        tree = merge(tree, value)
    return tree


def validate(tree: Tree, source: str = "config") -> Config:
    """The typed config of a JSON tree.

    Raises:
        ConfigError: one line that names `source`, the dotted key, the value, what was expected and the nearest valid name.
    """
    source = one_line(source)
    try:
        tree = merge({}, _without_comments(tree))
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    tree = _explain_placeholders(tree, source)
    _refuse_broken_text(tree, source)
    try:
        return Config.model_validate_json(json.dumps(read_sizes(tree)))
    except ValidationError as error:
        # a misspelt key first: where it was a required one, that is missed, too, and says less
        problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ConfigError(f"{source}: {one_line(_told(problems[0]))}{more}") from None


def _resolved(file: Path) -> Path:
    try:
        return file.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in it, a loop of links
        raise ConfigError(f"{one_line(file)}: cannot be read: {one_line(error)}") from None


def _without_comments(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_comments(below) for key, below in value.items() if not is_comment(key)}
    return value


def is_comment(key: str) -> bool:
    """Whether a key of a file is there for people and editors only."""
    return key.startswith("_") or key == "$schema"


def _refuse_broken_text(value: Any, source: str, path: tuple[str, ...] = ()) -> None:
    """Refuse zero bytes, which neither paths nor command lines can hold, and half surrogate pairs, which is how Python hands
    over bytes of a command line that are no UTF-8."""
    if isinstance(value, str) and ("\0" in value or HALF_A_PAIR.search(value)):
        reason = "holds a zero byte" if "\0" in value else "not UTF-8 text"
        content = "" if _is_secret(path) else f": {_shown(value)}"
        raise ConfigError(f"{source}: {one_line('.'.join(path))}: {reason}{content}")
    if isinstance(value, dict):
        for key, below in value.items():
            _refuse_broken_text(key, source, (*path, key))
            _refuse_broken_text(below, source, (*path, key))
    elif isinstance(value, list):
        for index, below in enumerate(value):
            _refuse_broken_text(below, source, (*path, str(index)))


def _parse(text: str, path: list[str]) -> Any:
    """The value that `text` stands for in the field at `path`."""
    annotation = annotation_at(path)
    parts = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    types = {get_args(part)[0] if get_origin(part) is Annotated else part for part in parts}
    if bool in types and text.lower() in ("true", "false"):
        return text.lower() == "true"  # Python's spelling too, as on ConvNorm's command line
    try:
        value = parse_json(text)
    except JSONError as error:
        if error.syntax or str in types:
            return text
        raise ConfigError(f"{one_line('.'.join(path))}: {error.reason}") from None
    if str in types and value is not None and not isinstance(value, str):
        return text
    return value


def _explain_placeholders(tree: Tree, source: str) -> Tree:
    data_dir = tree.get("data_loader", {})
    for key in ("args", "data_dir"):
        data_dir = data_dir.get(key, {}) if isinstance(data_dir, dict) else {}
    if isinstance(data_dir, str) and PLACEHOLDER.fullmatch(data_dir):
        raise ConfigError(
            f"{source}: data_loader.args.data_dir: {_shown(data_dir, repr)} is the published config's placeholder: put the"
            " folder of the data set there, or add --set data_loader.args.data_dir=FOLDER"
        )
    comet = tree.get("comet")
    if isinstance(comet, dict) and isinstance(comet.get("api"), str) and PLACEHOLDER.fullmatch(comet["api"]):
        return merge(tree, {"comet": {"api": None}})  # no key: the run is logged offline, or with COMET_API_KEY
    return tree


def annotation_at(path: Sequence[str]) -> Any:
    """The type annotation of the field at a dotted path, or None where the tree has no such field."""
    section = section_at(path[:-1])
    field = section.model_fields.get(path[-1]) if section and path else None
    return field.annotation if field else None


def section_at(path: Sequence[str], root: type[Section] = Config) -> type[Section] | None:
    """The section class at a dotted path (`[]` is `root` itself), or None."""
    section = root
    for name in path:
        field = section.model_fields.get(name)
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        section = next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)
        if section is None:
            return None
    return section


def _told(problem: dict[str, Any]) -> str:
    """One pydantic error as `dotted.key: what is wrong`."""
    path = [str(part) for part in problem["loc"]]
    key = one_line(".".join(path), 200)
    match problem["type"]:
        case "extra_forbidden":
            section = section_at(path[:-1])
            known = list(section.model_fields) if section else []
            return f"{key}: unknown key{did_you_mean(path[-1], known)} (known here: {', '.join(known)})"
        case "missing":
            return f"{key}: required, but not given"
        case "value_error":
            message = str(problem["ctx"]["error"])
            return f"{key}.{message}" if key and message[0] not in QUOTES else f"{key}{': ' if key else ''}{message}"
    if _is_secret(path):
        return f"{key}: {problem['msg']} (what was given is not shown)"
    value = problem["input"]
    if tuple(path) in SIZES and isinstance(value, str):
        expected = 'expected a number, or a fraction of the pixel range such as "8/255"'
        return f"{key}: {expected}, not {_shown(value)}"
    if problem["type"] == "literal_error":
        names = [name.strip("'") for name in problem["ctx"]["expected"].replace(" or ", ", ").split(", ")]
        return f"{key}: {_shown(value, repr)} is not one of: {', '.join(names)}{did_you_mean(str(value)[:80], names)}"
    return f"{key}: {problem['msg']}, not {_shown(value)}"


def _is_secret(path: Sequence[str]) -> bool:
    """Whether what a config holds at `path` may be, or hold, the Comet key: wherever in that section someone has put it."""
    return list(path[:1]) == ["comet"]


def _shown(value: Any, text: Callable[[Any], str] = json.dumps) -> str:
    """A config value in a message: as JSON, no longer than a line bears. Objects are not shown: a whole section that is in the
    wrong place may be the one that holds the Comet key."""
    content = text(value)
    return KINDS[type(value)] if isinstance(value, dict | list) and "{" in content else one_line(content, 80)
