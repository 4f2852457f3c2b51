"""Config files: read JSON, inherit, override, validate.

A file may name its parent in `extends`: its own keys win, and `null` deletes a key, which gives it its default. That path is
relative to the file; where the file is a symbolic link, to what it leads to. A key that begins with `_`, and `$schema`,
is a comment.
"""

import inspect
import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import ValidationError

from base.config import arguments
from base.config.adversarial import SIZES, read_sizes
from base.config.config import Config
from base.config.hints import hint as key_hint
from base.config.section import Section, section_in
from base.config.strict_json import HALF_A_PAIR, KINDS, JSONError, parse_json, read_json_object
from base.config.training import OptimizerConfig, SchedulerConfig
from base.config.warnings import UNUSED_OK, warnings_of
from base.errors import ConfigError, all_of
from base.registry import did_you_mean
from base.text import one_line

Tree = dict[str, Any]
MMENGINES_PARENT = "_base_"
"""Where mmengine's configs name their parents. As a comment it would pass, and every inherited value would be missing."""
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
    overrides = list(overrides)
    files = read_tree(path)
    return validate(override(files, overrides), str(path), overrides, files)


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
        if MMENGINES_PARENT in trees[-1]:
            raise ConfigError(f"{context}{one_line(file)}: {MMENGINES_PARENT}: a parent is named in extends here")
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


def config_chain(path: str | Path) -> list[Path]:
    """A config file and the parents that it `extends`, as far as they can be read."""
    files: list[Path] = []
    file: Path | None = Path(path)
    while file is not None and file not in files:
        files.append(file)
        try:
            parent = read_json_object(file).get("extends")
            place = file.resolve() if file.is_symlink() else file
        except (ConfigError, OSError):
            break
        file = place.parent / parent if isinstance(parent, str) else None
    return files


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
    known = list(section.known_fields()) if section else [other for other in parent if path]
    if key in known or is_comment(key):
        return
    if section:
        raise ConfigError(_unknown_key((*path, key), root))
    hint = did_you_mean(key, known)
    if hint:
        raise ConfigError(f"{one_line('.'.join((*path, key)), 200)}: unknown key{hint} (known here: {', '.join(known)})")


def _unknown_key(path: Sequence[str], root: type[Section] = Config) -> str:
    section = section_at(path[:-1], root)
    known = list(section.known_fields()) if section else []
    hint = did_you_mean(path[-1], known)
    if root is Config:
        hint = key_hint(path, known, _torch_arguments(path))
    return f"{one_line('.'.join(path), 200)}: unknown key{hint} (known here: {', '.join(known)})"


def _torch_arguments(path: Sequence[str]) -> set[str]:
    """The arguments that the optimisers, or the schedules, take between them, where the path is that of one."""
    if len(path) != 2 or path[0] not in ("optimizer", "lr_scheduler"):
        return set()
    # here and not above: it brings torch, which a good config does not need
    from base.optimization import OPTIMIZERS, SCHEDULERS

    classes = (OPTIMIZERS if path[0] == "optimizer" else SCHEDULERS).values()
    return {name for cls in classes for name in inspect.signature(cls).parameters}


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


def validate(
    tree: Tree, source: str = "config", overrides: Iterable[Override] = (), files: Tree | None = None
) -> Config:
    """The typed config of a JSON tree.

    Args:
        tree: the whole tree.
        source: what errors call it.
        overrides: what the command line has put into it.
        files: the tree before that; the whole tree where nothing was.

    Raises:
        ConfigError: one line that names `source`, the dotted key, the value, what was expected and the nearest valid name.
    """
    source = one_line(source)
    silenced = tree.get(UNUSED_OK)
    tree = _explain_placeholders(_without_nulls(_without_comments(tree)), source)
    _refuse_broken_text(tree, source)
    try:
        config = Config.model_validate_json(json.dumps(read_sizes(tree)))
    except ValidationError as error:
        problems = _problems(error) + _problems_of_arguments(tree, error)
        raise ConfigError(f"{source}: {all_of([one_line(problem) for problem in problems])}") from None
    config._warnings = warnings_of(config, tree if files is None else files, override({}, overrides), silenced)
    return config


def _problems(error: ValidationError) -> list[str]:
    """Everything that is wrong with a tree, each problem once. Misspelt keys come first: where one was a required key, that is
    missed, too, and says less. What a section knows is listed once."""
    listed: set[tuple[Any, ...]] = set()
    problems = []
    for problem in sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden"):
        text = _told(problem)
        section = tuple(problem["loc"][:-1])
        if problem["type"] == "extra_forbidden":
            if section in listed:
                text = text.partition(" (known here: ")[0]
            listed.add(section)
        problems.append(text)
    return list(dict.fromkeys(problems))


def _problems_of_arguments(tree: Tree, error: ValidationError) -> list[str]:
    """What is wrong with the arguments of optimiser and schedule, which are otherwise looked at once the tree is good."""
    bad = {problem["loc"][0] for problem in error.errors() if problem["loc"]}
    sections = [key for key in ("optimizer", "lr_scheduler") if key in tree and key not in bad]
    found = [_problem_of_arguments(key, json.dumps(tree[key])) for key in sections]
    return [problem for problem in found if problem is not None]


@lru_cache(maxsize=64)
def _problem_of_arguments(key: str, section: str) -> str | None:
    """What is wrong with the section of this key, given as JSON, beside the defaults of the other one."""
    # here and not above: it brings torch, which a good config does not need
    from base.optimization import check_optimization

    optimizer, scheduler = OptimizerConfig(), SchedulerConfig()
    if key == "optimizer":
        optimizer = OptimizerConfig.model_validate_json(section)
    else:
        scheduler = SchedulerConfig.model_validate_json(section)
    try:
        check_optimization(optimizer, scheduler)
    except ConfigError as problem:
        return str(problem)
    return None


def _without_nulls(tree: Tree, path: tuple[str, ...] = ()) -> Tree:
    """Null means the default. A null for a key that does not exist stays, to be refused with the others."""
    section = section_at(path)
    kept = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            kept[key] = _without_nulls(value, (*path, key))
        elif value is not None or (section is not None and key not in section.known_fields()):
            kept[key] = value
    return kept


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
    """Whether a key of a file is a comment. Most are there for people and editors only; see `UNUSED_OK`."""
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
    field = section.known_fields().get(path[-1]) if section and path else None
    return field.annotation if field else None


def section_at(path: Sequence[str], root: type[Section] = Config) -> type[Section] | None:
    """The section class at a dotted path (`[]` is `root` itself), or None."""
    section = root
    for name in path:
        field = section.known_fields().get(name)
        section = section_in(field.annotation) if field else None
        if section is None:
            return None
    return section


def _told(problem: dict[str, Any]) -> str:
    """One pydantic error as `dotted.key: what is wrong`."""
    path = [str(part) for part in problem["loc"]]
    key = one_line(".".join(path), 200)
    match problem["type"]:
        case "extra_forbidden":
            return _unknown_key(path)
        case "missing":
            return f"{key}: required, but not given"
        case arguments.OTHERS_ARGUMENT:
            return f"{key}: {problem['msg']}"
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
