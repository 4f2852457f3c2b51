"""Config files: read JSON, inherit, override, validate.

A file may name its parent in `extends`: its own keys win, and `null` deletes a key, which gives it its default. That path is
relative to the file; where the file is a symbolic link, to what it leads to. A key that begins with `_`, and `$schema`,
is a comment.
"""

import json
import re
from collections.abc import Iterable
from math import isinf
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import ValidationError

from base.config import Config
from base.config_section import Section
from base.errors import ConfigError
from base.registry import did_you_mean

Tree = dict[str, Any]
Override = tuple[str, str]
"""A dotted key and the text of its value."""

PLACEHOLDER = re.compile(r"\*\*.*\*\*")
"""ConvNorm's published configs write `**data dir**` and `**comet key**` where the user's own values belong."""


def load_config(path: str | Path, overrides: Iterable[Override] = ()) -> Config:
    """The typed config of a file, its parents and the command line's overrides.

    Raises:
        ConfigError: one line that names the file and what is wrong with it.
    """
    return validate(override(read_tree(path), overrides), str(path))


def read_tree(path: str | Path, children: tuple[Path, ...] = ()) -> Tree:
    """The JSON tree of a file merged over its parents'."""
    file = Path(path)
    if file.resolve() in children:
        raise ConfigError(f"{path}: extends itself, by way of {', '.join(str(child) for child in children)}")
    tree = _read_json(file)
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: extends: expected the path of a config file, not {parent!r}")
    folder = (file.resolve() if file.is_symlink() else file).parent
    return merge(read_tree(folder / parent, (*children, file.resolve())), tree)


def merge(parent: Tree, child: Tree) -> Tree:
    """`parent` with the keys of `child`, which win; where the child says null the key is gone."""
    merged = dict(parent)
    for key, value in child.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict):
            below = merged.get(key)
            merged[key] = merge(below if isinstance(below, dict) else {}, value)
        else:
            merged[key] = value
    return merged


def override(tree: Tree, overrides: Iterable[Override]) -> Tree:
    """`tree` with dotted keys replaced: a value is JSON, a bare word is a string, the field's own type decides between them."""
    for key, text in overrides:
        path = key.split(".")
        if not all(path):
            raise ConfigError(f"{key!r}: expected a dotted key such as trainer.epochs")
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
    tree = _explain_placeholders(merge({}, _without_comments(tree)), source)
    try:
        return Config.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        problems = error.errors()
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in _one_line(problems[0]))
        raise ConfigError(f"{source}: {line}{more}") from None


def _read_json(file: Path) -> Tree:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read as UTF-8 text: {error}") from None
    try:
        tree = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_number, parse_float=_finite_float)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file}: line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ConfigError(f"{file}: {reason}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: expected a JSON object, not {type(tree).__name__}")
    return tree


def _unique_keys(pairs: list[tuple[str, Any]]) -> Tree:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} is given twice in one object")
    return tree


def _refuse_number(text: str) -> None:
    raise ValueError(f"{text} is not a finite number")


def _finite_float(text: str) -> float:
    value = float(text)
    if isinf(value):
        _refuse_number(text)
    return value


def _without_comments(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_comments(v) for k, v in value.items() if not k.startswith("_") and k != "$schema"}
    return value


def _parse(text: str, path: list[str]) -> Any:
    """The value that `text` stands for in the field at `path`."""
    annotation = annotation_at(path)
    types = set(get_args(annotation)) if get_origin(annotation) in (Union, UnionType) else {annotation}
    if bool in types and text.lower() in ("true", "false"):
        return text.lower() == "true"  # Python's spelling too, as on ConvNorm's command line
    try:
        value = json.loads(text, parse_constant=_refuse_number, parse_float=_finite_float)
    except (ValueError, RecursionError):
        return text
    if str in types and value is not None and not isinstance(value, str):
        return text
    return value


def _explain_placeholders(tree: Tree, source: str) -> Tree:
    data_dir = tree.get("data_loader", {})
    for key in ("args", "data_dir"):
        data_dir = data_dir.get(key, {}) if isinstance(data_dir, dict) else {}
    if isinstance(data_dir, str) and PLACEHOLDER.fullmatch(data_dir):
        raise ConfigError(
            f"{source}: data_loader.args.data_dir: {data_dir!r} is the published config's placeholder: put the folder of the"
            " data set there, or add --set data_loader.args.data_dir=FOLDER"
        )
    comet = tree.get("comet")
    if isinstance(comet, dict) and isinstance(comet.get("api"), str) and PLACEHOLDER.fullmatch(comet["api"]):
        return merge(tree, {"comet": {"api": None}})  # no key: the run is logged offline, or with COMET_API_KEY
    return tree


def annotation_at(path: list[str]) -> Any:
    """The type annotation of the field at a dotted path, or None where the tree has no such field."""
    section = section_at(path[:-1])
    field = section.model_fields.get(path[-1]) if section and path else None
    return field.annotation if field else None


def section_at(path: list[str]) -> type[Section] | None:
    """The section class at a dotted path (`[]` is `Config` itself), or None."""
    section: type[Section] = Config
    for name in path:
        field = section.model_fields.get(name)
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        section = next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)
        if section is None:
            return None
    return section


def _one_line(problem: dict[str, Any]) -> str:
    """One pydantic error as `dotted.key: what is wrong`."""
    path = [str(part) for part in problem["loc"]]
    key, value = ".".join(path), problem["input"]
    match problem["type"]:
        case "extra_forbidden":
            section = section_at(path[:-1])
            known = list(section.model_fields) if section else []
            return f"{key}: unknown key{did_you_mean(path[-1], known)} (known here: {', '.join(known)})"
        case "missing":
            return f"{key}: required, but not given"
        case "literal_error":
            expected = problem["ctx"]["expected"]
            names = [name.strip("'") for name in expected.replace(" or ", ", ").split(", ")]
            return f"{key}: {value!r} is not one of: {', '.join(names)}{did_you_mean(str(value), names)}"
        case "json_invalid":  # the tree is our own JSON; quoting it all would show Comet's key
            return "holds text that is no valid Unicode, such as a path in another encoding than the terminal's"
        case "value_error":
            message = str(problem["ctx"]["error"])
            return f"{key}.{message}" if key and not message.startswith("'") else f"{key}{': ' if key else ''}{message}"
    found = "***" if path[:1] == ["comet"] else json.dumps(value)  # may be the key
    return f"{key}: {problem['msg']}, not {found}"
