"""Config files: read JSON, inherit, override, validate.

A file may name its parent in `extends`: its own keys win, and `null` deletes a key, which gives it
its default. That path is relative to the file; where the file is a symbolic link, to what it leads
to. A key that begins with `_`, and `$schema`, is a comment. `imports` names a user's own code (see
`base.config.imports`); those of a file add to those of its parents."""

import inspect
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import ValidationError

from base.config import arguments
from base.config.adversarial import read_sizes, size_keys
from base.config.config import Config
from base.config.hints import hint as key_hint
from base.config.imports import (
    FLAG,
    OwnCode,
    Request,
    changes,
    import_own_code,
    requests_of,
    requests_of_flag,
)
from base.config.origins import (
    Layer,
    Origins,
    Provenance,
    origin_of,
    origin_of_keys,
    origin_of_override,
    record,
)
from base.config.section import Section, section_in
from base.config.strict_json import LONE_SURROGATE, TYPE_NAMES, JSONError, parse_json, read_json_object
from base.config.training import OptimizerConfig, SchedulerConfig
from base.config.warnings import UNUSED_OK, warnings_of
from base.errors import ConfigError, all_of
from base.registry import did_you_mean
from base.text import one_line

Tree = dict[str, Any]
MMENGINES_PARENT = "_base_"
"""Where mmengine's configs name their parents. As a comment it would pass, and every inherited
value would be missing."""
LONGEST_PATH = 20
"""Names in a dotted key. The tree itself has five levels, free-form arguments a few more."""
IMPORTS = "imports"
Override = tuple[str, str]
"""A dotted key and the text of its value."""

QUOTES = ("'", '"')
DOTTED_WORD = re.compile(r"[A-Za-z_]\w*(?:\.\w+)*")
PLACEHOLDER = re.compile(r"\*\*.*\*\*")
"""ConvNorm's published configs write `**data dir**` and `**comet key**` where the user's own values
belong."""


def load_config(
    path: str | Path,
    overrides: Iterable[Override] = (),
    imports: Iterable[str | os.PathLike[str]] = (),
) -> Config:
    """The typed config of a file, its parents and the command line's overrides.

    Args:
        path: the file.
        overrides: single values on top of it.
        imports: files and modules of a user's own to import, as `--imports` names them, beside
            those that the config names.

    Raises:
        ConfigError: one line that names the file, or the flag, and what is wrong with it.
    """
    files = read_layers(path)
    recorded, own = run_imports(files, imports)
    layers = [*files, *override_layers(overrides)]
    config = validate_layers(layers, own, str(path))
    config._warnings = (*config.warnings, *changes(recorded, own))
    return config


def run_imports(
    layers: Sequence[Layer], words: Iterable[str | os.PathLike[str]] = ()
) -> tuple[list[OwnCode], list[OwnCode]]:
    """Import what the files of a config name, and then what `--imports` does.

    Returns:
        What they name, and what was imported, with digests.

    Raises:
        ConfigError: one line that names the file or the flag, and what could not be imported.
    """
    requests: list[Request] = []
    for layer in layers:
        named = layer.tree.get(IMPORTS, [])
        if named is None:
            # null deletes what the parents name
            requests = []
        else:
            requests += requests_of(named, f"{layer.origin}: {IMPORTS}", layer.folder)
    requests += requests_of_flag(words)
    return [request.code for request in requests], import_own_code(requests)


def validate_layers(layers: Sequence[Layer], own: Sequence[OwnCode], source: str) -> Config:
    """The typed config of files and flags on top of each other. Errors and warnings name the one
    that a value came from.

    Args:
        layers: the lowest first.
        own: what was imported for them.
        source: what errors name where none of them is to blame.

    Raises:
        ConfigError: one line.
    """
    tree, origins = merge_layers(layers)
    tree.pop(IMPORTS, None)
    if own:
        tree[IMPORTS] = [code.model_dump(exclude_none=True) for code in own]
        # lists of imports add up, where other values replace each other
        naming = [layer for layer in layers if layer.tree.get(IMPORTS)]
        named = sum(len(layer.tree[IMPORTS]) for layer in naming)
        flag = [FLAG] if len(own) > named else []
        origins[IMPORTS,] = ", ".join([*(layer.origin for layer in naming), *flag])
    return validate(tree, source, layers, origins)


def merge_layers(layers: Sequence[Layer], root: type[Section] = Config) -> tuple[Tree, Origins]:
    """The tree of layers on top of each other, and where each of its values comes from.

    Raises:
        ConfigError: a null for a key that does not exist, naming its layer.
    """
    tree: Tree = {}
    origins: Origins = {}
    for number, layer in enumerate(layers):
        try:
            # the nulls of the lowest are for `validate`, which tells all that is wrong with it
            tree = merge(tree, layer.tree, root) if number else dict(layer.tree)
        except ConfigError as error:
            raise ConfigError(f"{layer.origin}: {error}") from None
        record(origins, layer)
    return tree, origins


def read_tree(path: str | Path, root: type[Section] = Config) -> Tree:
    """The JSON tree of a file merged over its parents'; `root` is what it holds. No code is
    imported.

    Raises:
        ConfigError: one line that names the file and, where there is one, the place in it.
    """
    return merge_layers(read_layers(path), root)[0]


def read_layers(path: str | Path) -> list[Layer]:
    """The JSON trees of a file and its parents, the file's own last.

    Raises:
        ConfigError: one line that names the file and, where there is one, the place in it.
    """
    layers: list[Layer] = []
    files: set[Path] = set()
    file, context, child = Path(path), "", ""
    while True:
        place = _resolved(file)
        if place in files:
            raise ConfigError(f"{context}{one_line(file)} extends itself")
        files.add(place)
        try:
            tree = read_json_object(file)
        except ConfigError as error:
            raise ConfigError(f"{context}{error}") from None
        if MMENGINES_PARENT in tree:
            raise ConfigError(
                f"{context}{one_line(file)}: {MMENGINES_PARENT}: a parent is named in extends here"
            )
        parent = tree.pop("extends", None)
        folder = (place if file.is_symlink() else file).parent
        layers.append(Layer(f"{one_line(file)}{child}", tree, folder))
        if parent is None:
            return layers[::-1]
        context = f"{one_line(file)}: extends: "
        if not isinstance(parent, str):
            raise ConfigError(f"{context}expected the path of a config file, not {_shown(parent)}")
        child = f" (extended by {one_line(file.name)})"
        file = folder / parent


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


def merge(
    parent: Tree, child: Tree, root: type[Section] = Config, path: tuple[str, ...] = ()
) -> Tree:
    """`parent` with the keys of `child`, which win; where the child says null the key is gone.

    Args:
        parent, child: trees of JSON values.
        root: what the whole trees hold.
        path: the keys under which these two lie in them.

    Raises:
        ConfigError: a null for a key that does not exist: a misspelt one would keep what it was to
            delete.
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
    """Refuse a key that a section does not know, or, among free-form arguments, one that is like
    another that is there."""
    section = section_at(path, root)
    known = list(section.known_fields()) if section else [other for other in parent if path]
    if key in known or is_comment(key):
        return
    if section:
        raise ConfigError(_unknown_key((*path, key), root))
    hint = did_you_mean(key, known)
    if hint:
        raise ConfigError(
            f"{one_line('.'.join((*path, key)), 200)}: unknown key{hint} (known here: {', '.join(known)})"
        )


def _unknown_key(path: Sequence[str], root: type[Section] = Config) -> str:
    section = section_at(path[:-1], root)
    known = list(section.known_fields()) if section else []
    hint = did_you_mean(path[-1], known)
    if root is Config:
        hint = key_hint(path, known, _torch_arguments(path))
    return f"{one_line('.'.join(path), 200)}: unknown key{hint} (known here: {', '.join(known)})"


def _torch_arguments(path: Sequence[str]) -> set[str]:
    """The arguments that the optimizers, or the schedules, take between them, where the path is
    that of one."""
    if len(path) != 2 or path[0] not in ("optimizer", "lr_scheduler"):
        return set()
    # here and not above: it brings torch, which a good config does not need
    from base.optim import OPTIMIZERS, SCHEDULERS

    classes = (OPTIMIZERS if path[0] == "optimizer" else SCHEDULERS).values()
    return {name for cls in classes for name in inspect.signature(cls).parameters}


def override(tree: Tree, overrides: Iterable[Override]) -> Tree:
    """`tree` with dotted keys replaced: a value is JSON, a bare word is a string, the field's own
    type decides between them.

    Raises:
        ConfigError: a key that does not exist, or a value that cannot be read; it names the flag.
    """
    return merge_layers([Layer("config", tree), *override_layers(overrides)])[0]


def override_layers(overrides: Iterable[Override]) -> list[Layer]:
    """Overrides as layers to put on top of a config's files; see `override`.

    Raises:
        ConfigError: as `override` does.
    """
    layers = []
    for setting in overrides:
        key, text = setting
        origin, path = origin_of_override(setting), key.split(".")
        if not all(path) or len(path) > LONGEST_PATH:
            raise ConfigError(f"{origin}: expected a dotted key such as trainer.epochs")
        if path[0] == IMPORTS:
            raise ConfigError(f"{origin}: your own code is named by {FLAG} FILE_OR_MODULE")
        try:
            value = _parse(text, path)
        except ConfigError as error:
            raise ConfigError(f"{origin}: {error}") from None
        for name in reversed(path):
            value = {name: value}
        layers.append(Layer(origin, value, is_flag=True))
    return layers


def validate(
    tree: Tree,
    source: str = "config",
    layers: Sequence[Layer] = (),
    origins: Origins | None = None,
    *,
    check_names: bool = True,
) -> Config:
    """The typed config of a JSON tree. No code is imported for it.

    Args:
        tree: the whole tree.
        source: what errors call it.
        layers: the files and flags that it was merged of, where it was.
        origins: which of them each value came from.
        check_names: False takes any name and argument of a part, as the code that registers it may
            be missing; nothing is warned of then.

    Raises:
        ConfigError: one line that names the file, the flag or `source`, the dotted key, the value,
            what was expected and the nearest valid name.
    """
    source, origins = one_line(source), origins or {}
    silenced = tree.get(UNUSED_OK)
    tree = _explain_placeholders(_without_nulls(_without_comments(tree)), source)
    _refuse_broken_text(tree, source, origins)
    try:
        context = None if check_names else arguments.UNCHECKED
        config = Config.model_validate_json(json.dumps(read_sizes(tree)), context=context)
    except ValidationError as error:
        problems = [*_problems(error, origins), *_problems_of_arguments(tree, error, origins)]
        raise ConfigError(_all_blamed(problems, source)) from None
    config._provenance = Provenance(origins)
    if not check_names:
        return config
    files = [layer for layer in layers if not layer.is_flag]
    flags = [layer for layer in layers if layer.is_flag]
    config._warnings = warnings_of(
        config,
        merge_layers(files)[0] if layers else tree,
        merge_layers([Layer("", {}), *flags])[0],
        silenced,
        origins,
    )
    return config


@contextmanager
def origins_named(config: Config) -> Iterator[None]:
    """Let an error that begins with a key of the config name the file or flag that its value came
    from."""
    try:
        yield
    except ConfigError as error:
        key, colon, _ = str(error).partition(": ")
        origin = None
        if colon and DOTTED_WORD.fullmatch(key):
            origin = origin_of(config.origins, key.split("."))
        if origin is None:
            raise
        raise ConfigError(f"{origin}: {error}") from error


def _all_blamed(problems: Sequence[tuple[str | None, str]], source: str) -> str:
    """Problems in one line, each after the file or flag that is to blame for it, which is named
    again only where it changes."""
    parts, last = [], None
    for origin, text in problems:
        blamed = origin or source
        parts.append(one_line(text) if blamed == last else f"{blamed}: {one_line(text)}")
        last = blamed
    return all_of(parts)


def _problems(error: ValidationError, origins: Origins) -> list[tuple[str | None, str]]:
    """Everything that is wrong with a tree, each problem once, with what it came from. Misspelt
    keys come first: where one was a required key, that is missed, too, and says less. What a
    section knows is listed once. A key that an unknown part may take is not told: the part's name
    says more."""
    listed: set[tuple[Any, ...]] = set()
    problems = []
    bad = {".".join(map(str, problem["loc"])) for problem in error.errors()}
    for problem in sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden"):
        if problem["type"] == "extra_forbidden" and _may_be_of_unknown_part(problem["loc"], bad):
            continue
        text = _told(problem)
        section = tuple(problem["loc"][:-1])
        if problem["type"] == "extra_forbidden":
            if section in listed:
                text = text.partition(" (known here: ")[0]
            listed.add(section)
        problems.append((_to_blame(problem, text, origins), text))
    return list(dict.fromkeys(problems))


def _may_be_of_unknown_part(path: Sequence[int | str], bad: Collection[str]) -> bool:
    """Whether an unknown key may be an argument of a part whose own name is among the keys that are
    wrong."""
    section = section_at([str(part) for part in path[:-1]])
    if section is None or not issubclass(section, arguments.OpenSection):
        return False
    return any(choice.key in bad for choice in section.choices)


def _to_blame(problem: Any, text: str, origins: Origins) -> str | None:
    """The file or flag that a problem came from; None where no value of a config is to blame."""
    path = tuple(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        return None
    if problem["type"] != "value_error" or path in origins:
        return origin_of(origins, path)
    # several values contradict each other: to blame is the one that came last
    words = [tuple(word.split(".")) for word in DOTTED_WORD.findall(text)]
    named = (
        [word for word in words if len(word) > 1]
        + words[:1]
        + [(*path, *word) for word in words if path]
    )
    known = [word for word in named if word in origins]
    return origin_of_keys(origins, known) if known else origin_of(origins, path)


def _problems_of_arguments(
    tree: Tree, error: ValidationError, origins: Origins
) -> list[tuple[str | None, str]]:
    """What is wrong with the arguments of optimizer and schedule, which are otherwise looked at
    once the tree is good."""
    bad = {problem["loc"][0] for problem in error.errors() if problem["loc"]}
    sections = [key for key in ("optimizer", "lr_scheduler") if key in tree and key not in bad]
    found = [_problem_of_arguments(key, json.dumps(tree[key])) for key in sections]
    return [
        (_origin_of_first_key(problem, origins), problem)
        for problem in found
        if problem is not None
    ]


def _origin_of_first_key(text: str, origins: Origins) -> str | None:
    """What the value came from whose dotted key a message begins with."""
    key = DOTTED_WORD.match(text)
    return None if key is None else origin_of(origins, key[0].split("."))


def check_optimization_of(config: Config) -> None:
    """Refuse arguments that optimizer and schedule do not take, also those that they take alone but
    not together.

    Raises:
        ConfigError: naming the file or flag that the value came from.
    """
    # here and not above: it brings torch
    from base.optim import check_optimization

    with origins_named(config):
        check_optimization(config.optimizer, config.lr_scheduler)


@lru_cache(maxsize=64)
def _problem_of_arguments(key: str, section: str) -> str | None:
    """What is wrong with the section of this key, given as JSON, beside the defaults of the other
    one."""
    # here and not above: it brings torch, which a good config does not need
    from base.optim import check_optimization

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
    """Null means the default. A null for a key that does not exist stays, to be refused with the
    others."""
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
        return {
            key: _without_comments(below) for key, below in value.items() if not is_comment(key)
        }
    return value


def is_comment(key: str) -> bool:
    """Whether a key of a file is a comment. Most are there for people and editors only; see
    `UNUSED_OK`."""
    return key.startswith("_") or key == "$schema"


def _refuse_broken_text(
    value: Any, source: str, origins: Origins, path: tuple[str, ...] = ()
) -> None:
    """Refuse zero bytes, which neither paths nor command lines can hold, and half surrogate pairs,
    which is how Python hands over bytes of a command line that are no UTF-8."""
    if isinstance(value, str) and ("\0" in value or LONE_SURROGATE.search(value)):
        reason = "holds a zero byte" if "\0" in value else "not UTF-8 text"
        content = "" if _is_secret(path) else f": {_shown(value)}"
        blamed = origin_of(origins, path) or source
        raise ConfigError(f"{blamed}: {one_line('.'.join(path))}: {reason}{content}")
    if isinstance(value, dict):
        for key, below in value.items():
            _refuse_broken_text(key, source, origins, (*path, key))
            _refuse_broken_text(below, source, origins, (*path, key))
    elif isinstance(value, list):
        for index, below in enumerate(value):
            _refuse_broken_text(below, source, origins, (*path, str(index)))


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
        if error.is_syntax_error or str in types:
            return text
        raise ConfigError(f"{one_line('.'.join(path))}: {error}") from None
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
    if (
        isinstance(comet, dict)
        and isinstance(comet.get("api"), str)
        and PLACEHOLDER.fullmatch(comet["api"])
    ):
        # no key: the run is logged offline, or with COMET_API_KEY
        return merge(tree, {"comet": {"api": None}})
    return tree


def annotation_at(path: Sequence[str]) -> Any:
    """The type annotation of the field at a dotted path, or None where the tree has no such
    field."""
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
            return (
                f"{key}.{message}"
                if key and message[0] not in QUOTES
                else f"{key}{': ' if key else ''}{message}"
            )
    if _is_secret(path):
        return f"{key}: {problem['msg']} (what was given is not shown)"
    value = problem["input"]
    if tuple(path) in size_keys() and isinstance(value, str):
        expected = 'expected a number, or a fraction of the pixel range such as "8/255"'
        return f"{key}: {expected}, not {_shown(value)}"
    if problem["type"] == "literal_error":
        names = [
            name.strip("'") for name in problem["ctx"]["expected"].replace(" or ", ", ").split(", ")
        ]
        return f"{key}: {_shown(value, repr)} is not one of: {', '.join(names)}{did_you_mean(str(value)[:80], names)}"
    return f"{key}: {problem['msg']}, not {_shown(value)}"


def _is_secret(path: Sequence[str]) -> bool:
    """Whether what a config holds at `path` may be, or hold, the Comet key: wherever in that
    section someone has put it."""
    return list(path[:1]) == ["comet"]


def _shown(value: Any, text: Callable[[Any], str] = json.dumps) -> str:
    """A config value in a message: as JSON, no longer than a line bears. Objects are not shown: a
    whole section that is in the wrong place may be the one that holds the Comet key."""
    content = text(value)
    return (
        TYPE_NAMES[type(value)]
        if isinstance(value, dict | list) and "{" in content
        else one_line(content, 80)
    )
