"""The way from config files and flags to the typed config.

`load_config` reads a file and its parents (`read_layers`), imports a user's own code
(`run_imports`), adds the command line's values (`override_layers`), merges all of them
(`merge_layers`) and checks the result (`validate`).

A file may name its parent in `extends`: its own keys win, and null deletes a key, which restores
the default. The path is relative to the file; if the file is a symbolic link, to the target of the
link. Keys that begin with `_`, and `$schema`, are comments. `imports` names a user's own code (see
`base.config.imports`); the imports of a file are added to those of its parents.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import ValidationError

from base.config.adversarial import read_sizes
from base.config.arguments import UNCHECKED
from base.config.config import Config
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
    origin_of_override,
    record,
)
from base.config.problems import (
    Problem,
    format_for_message,
    format_problems,
    is_secret,
    origin_of_first_key,
    problems_of,
)
from base.config.section import Section
from base.config.strict_json import LONE_SURROGATE, JSONError, parse_json, read_json_object
from base.config.training import OptimizerConfig, SchedulerConfig
from base.config.tree import (
    Tree,
    annotation_at,
    merge,
    value_at,
    without_comments,
    without_nulls,
)
from base.config.warnings import UNUSED_OK, warnings_of
from base.errors import ConfigError
from base.text import one_line

Override = tuple[str, str]
"""A dotted key and the text of its value."""
IMPORTS = "imports"
MMENGINE_PARENT = "_base_"
"""The key under which mmengine's configs name their parents."""
MAX_KEY_PARTS = 20
"""Names in a dotted key. The tree has five levels, free-form arguments a few more."""
PLACEHOLDER = re.compile(r"\*\*.*\*\*")
"""ConvNorm's published configs write `**data dir**` and `**comet key**` where users put their own
values."""


def load_config(
    path: str | Path,
    overrides: Iterable[Override] = (),
    imports: Iterable[str | os.PathLike[str]] = (),
) -> Config:
    """Return the typed config of a file, its parents and the command line.

    Args:
        path: the file.
        overrides: single values that replace those of the file.
        imports: files and modules of a user's own to import, as `--imports` names them, in addition
            to those that the config names.

    Raises:
        ConfigError: one line that names the file, or the flag, and what is wrong.
    """
    files = read_layers(path)
    recorded, own = run_imports(files, imports)
    config = validate_layers([*files, *override_layers(overrides)], own, str(path))
    config._warnings = (*config.warnings, *changes(recorded, own))
    return config


def read_layers(path: str | Path) -> list[Layer]:
    """Return the JSON trees of a file and its parents, the file's own last.

    Raises:
        ConfigError: one line that names the file and, where it is known, the place in it.
    """
    layers: list[Layer] = []
    seen: set[Path] = set()
    file = Path(path)
    context = ""
    child = ""
    while True:
        target = _resolve(file)
        if target in seen:
            raise ConfigError(f"{context}{one_line(file)} extends itself")
        seen.add(target)
        try:
            tree = read_json_object(file)
        except ConfigError as error:
            raise ConfigError(f"{context}{error}") from None
        # The key begins like a comment, so the parent would be ignored without a message
        if MMENGINE_PARENT in tree:
            raise ConfigError(
                f"{context}{one_line(file)}: {MMENGINE_PARENT}: name the parent in extends instead"
            )
        parent = tree.pop("extends", None)
        folder = target.parent if file.is_symlink() else file.parent
        layers.append(Layer(f"{one_line(file)}{child}", tree, file, folder))
        if parent is None:
            return layers[::-1]
        context = f"{one_line(file)}: extends: "
        if not isinstance(parent, str):
            found = format_for_message(parent)
            raise ConfigError(f"{context}expected the path of a config file, not {found}")
        child = f" (extended by {one_line(file.name)})"
        file = folder / parent


def run_imports(
    layers: Sequence[Layer], names: Iterable[str | os.PathLike[str]] = ()
) -> tuple[list[OwnCode], list[OwnCode]]:
    """Import the code that the files of a config name, and then the code that `--imports` names.

    Returns:
        The code that they name, and the code that was imported, with digests.

    Raises:
        ConfigError: one line that names the file or the flag, and what could not be imported.
    """
    requests: list[Request] = []
    for layer in _layers_with_imports(layers):
        requests += requests_of(layer.tree[IMPORTS], f"{layer.origin}: {IMPORTS}", layer.folder)
    requests += requests_of_flag(names)
    return [request.code for request in requests], import_own_code(requests)


def override_layers(overrides: Iterable[Override]) -> list[Layer]:
    """Return overrides as layers to put on top of the files.

    A value is JSON, and anything else is text. For a key whose type is text, a number is text, too.

    Raises:
        ConfigError: a key or a value cannot be read; the message names the flag.
    """
    layers = []
    for setting in overrides:
        key, text = setting
        path = key.split(".")
        origin = origin_of_override(setting)
        if not all(path) or len(path) > MAX_KEY_PARTS:
            raise ConfigError(f"{origin}: expected a dotted key such as trainer.epochs")
        if path[0] == IMPORTS:
            raise ConfigError(f"{origin}: your own code is named by {FLAG} FILE_OR_MODULE")
        try:
            value = _parse_override(text, path)
        except ConfigError as error:
            raise ConfigError(f"{origin}: {error}") from None
        for name in reversed(path):
            value = {name: value}
        layers.append(Layer(origin, value, is_flag=True))
    return layers


def merge_layers(layers: Sequence[Layer], root: type[Section] = Config) -> tuple[Tree, Origins]:
    """Merge layers and record where each value comes from.

    Args:
        layers: the lowest first.
        root: the section that the trees describe.

    Raises:
        ConfigError: a null for a key that does not exist, naming its layer.
    """
    tree: Tree = {}
    origins: Origins = {}
    for number, layer in enumerate(layers):
        if number == 0:
            # Its nulls have nothing to delete; `validate` reports those for unknown keys
            tree = dict(layer.tree)
        else:
            try:
                tree = merge(tree, layer.tree, root)
            except ConfigError as error:
                raise ConfigError(f"{layer.origin}: {error}") from None
        record(origins, layer)
    return tree, origins


def validate_layers(layers: Sequence[Layer], own: Sequence[OwnCode], source: str) -> Config:
    """Return the typed config of files and flags.

    Args:
        layers: the lowest first.
        own: the code that was imported for them.
        source: what errors name where no layer is to blame.

    Raises:
        ConfigError: one line that names the layer that a value came from.
    """
    tree, origins = merge_layers(layers)
    tree.pop(IMPORTS, None)
    if own:
        tree[IMPORTS] = [code.model_dump(exclude_none=True) for code in own]
        # Lists of imports are added up, whereas other values replace each other, so several layers
        # may have given this one
        naming = _layers_with_imports(layers)
        named = sum(len(layer.tree[IMPORTS]) for layer in naming)
        sources = [layer.origin for layer in naming if layer.tree[IMPORTS]]
        if len(own) > named:
            sources.append(FLAG)
        origins[IMPORTS,] = ", ".join(sources)
    return validate(tree, source, layers, origins)


def validate(
    tree: Tree,
    source: str = "config",
    layers: Sequence[Layer] = (),
    origins: Origins | None = None,
    *,
    check_names: bool = True,
) -> Config:
    """Return the typed config of a JSON tree. No code is imported for it.

    Args:
        tree: the whole tree.
        source: what errors call it.
        layers: the files and flags of which it was merged, if any.
        origins: the file or flag that each value came from.
        check_names: False accepts any names and arguments of entries, because the code that
            registers them may not be imported; it also disables warnings.

    Raises:
        ConfigError: one line that names the file, the flag or `source`, the dotted key, the value,
            what was expected and the nearest valid name.
    """
    source = one_line(source)
    origins = origins or {}
    silenced = tree.get(UNUSED_OK)
    tree = without_nulls(without_comments(tree))
    tree = _handle_placeholders(tree, source)
    _check_text(tree, source, origins)
    try:
        context = None if check_names else UNCHECKED
        # As JSON, because pydantic's strict mode accepts a list for a tuple only there
        config = Config.model_validate_json(json.dumps(read_sizes(tree)), context=context)
    except ValidationError as error:
        problems = problems_of(error, origins, layers)
        if check_names:
            problems += _problems_of_optimization(tree, error, origins)
        raise ConfigError(format_problems(problems, source)) from None
    config._provenance = Provenance(origins)
    if not check_names:
        return config
    files = [layer for layer in layers if not layer.is_flag]
    flags = [layer for layer in layers if layer.is_flag]
    tree_of_files = merge_layers(files)[0] if layers else tree
    # The empty layer below makes a null in a flag delete its key instead of being kept
    tree_of_flags = merge_layers([Layer("", {}), *flags])[0]
    config._warnings = warnings_of(config, tree_of_files, tree_of_flags, silenced, origins)
    return config


def read_tree(path: str | Path, root: type[Section] = Config) -> Tree:
    """Return the JSON tree of a file merged over its parents'. No code is imported.

    Args:
        path: the file.
        root: the section that it describes.

    Raises:
        ConfigError: one line that names the file and, where it is known, the place in it.
    """
    return merge_layers(read_layers(path), root)[0]


def override(tree: Tree, overrides: Iterable[Override]) -> Tree:
    """Return a tree with dotted keys replaced; see `override_layers`.

    Raises:
        ConfigError: a key does not exist, or a value cannot be read; the message names the flag.
    """
    return merge_layers([Layer("config", tree), *override_layers(overrides)])[0]


@contextmanager
def origins_named(config: Config) -> Iterator[None]:
    """Prefix an error that begins with a dotted key with the file or flag that gave its value."""
    try:
        yield
    except ConfigError as error:
        origin = origin_of_first_key(str(error), config.origins)
        if origin is None:
            raise
        raise ConfigError(f"{origin}: {error}") from error


def check_optimization_of(config: Config) -> None:
    """Check the arguments of optimizer and schedule, alone and together.

    Raises:
        ConfigError: naming the file or flag that the value came from.
    """
    # Imported here because it brings torch
    from base.optim import check_optimization

    with origins_named(config):
        check_optimization(config.optimizer, config.lr_scheduler)


def _layers_with_imports(layers: Iterable[Layer]) -> list[Layer]:
    """Return the layers whose `imports` count: null deletes those of the layers before it."""
    found: list[Layer] = []
    for layer in layers:
        if IMPORTS in layer.tree:
            found = [] if layer.tree[IMPORTS] is None else [*found, layer]
    return found


def _problems_of_optimization(
    tree: Tree, error: ValidationError, origins: Origins
) -> list[Problem]:
    """Return what is wrong with the arguments of optimizer and schedule.

    They are normally checked once the tree is valid. This tree is not, but a user should see all
    problems at once.
    """
    wrong_sections = {problem["loc"][0] for problem in error.errors() if problem["loc"]}
    problems: list[Problem] = []
    for key in ("optimizer", "lr_scheduler"):
        if key in tree and key not in wrong_sections:
            problem = _problem_of_optimization(key, json.dumps(tree[key]))
            if problem is not None:
                problems.append((origin_of_first_key(problem, origins), problem))
    return problems


@lru_cache(maxsize=64)
def _problem_of_optimization(key: str, section: str) -> str | None:
    """Return what is wrong with one of the two sections, given as JSON; None if it is valid."""
    # Imported here because it brings torch, which a config without mistakes does not need
    from base.optim import check_optimization

    optimizer = OptimizerConfig()
    scheduler = SchedulerConfig()
    if key == "optimizer":
        optimizer = OptimizerConfig.model_validate_json(section)
    else:
        scheduler = SchedulerConfig.model_validate_json(section)
    try:
        check_optimization(optimizer, scheduler)
    except ConfigError as problem:
        return str(problem)
    return None


def _resolve(file: Path) -> Path:
    try:
        return file.resolve()
    # A ValueError for a null byte, a RuntimeError for links that form a loop
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{one_line(file)}: cannot be read: {one_line(error)}") from None


def _check_text(value: Any, source: str, origins: Origins, path: tuple[str, ...] = ()) -> None:
    """Check that no text holds a null byte or a lone surrogate."""
    if isinstance(value, str):
        # Paths and command lines cannot hold null bytes
        if "\0" in value:
            reason = "contains a null byte"
        # Python reads a byte of the command line that is not UTF-8 as a lone surrogate
        elif LONE_SURROGATE.search(value):
            reason = "not UTF-8 text"
        else:
            return
        content = "" if is_secret(path) else f": {format_for_message(value)}"
        blamed = origin_of(origins, path) or source
        raise ConfigError(f"{blamed}: {one_line('.'.join(path))}: {reason}{content}")
    if isinstance(value, dict):
        for key, below in value.items():
            _check_text(key, source, origins, (*path, key))
            _check_text(below, source, origins, (*path, key))
    elif isinstance(value, list):
        for index, below in enumerate(value):
            _check_text(below, source, origins, (*path, str(index)))


def _parse_override(text: str, path: list[str]) -> Any:
    """Return the value of a text on the command line for the field at `path`."""
    types = _types_of(annotation_at(path))
    # Python's spelling, too, as on ConvNorm's command line
    if bool in types and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        value = parse_json(text)
    except JSONError as error:
        if error.is_syntax_error or str in types:
            return text
        raise ConfigError(f"{one_line('.'.join(path))}: {error}") from None
    if str in types and value is not None and not isinstance(value, str):
        return text
    return value


def _types_of(annotation: Any) -> set[Any]:
    """The types of a union, or the only type, without their metadata."""
    parts = (annotation,)
    if get_origin(annotation) in (Union, UnionType):
        parts = get_args(annotation)
    return {get_args(part)[0] if get_origin(part) is Annotated else part for part in parts}


def _handle_placeholders(tree: Tree, source: str) -> Tree:
    data_dir = value_at(tree, "data_loader.args.data_dir")
    if isinstance(data_dir, str) and PLACEHOLDER.fullmatch(data_dir):
        raise ConfigError(
            f"{source}: data_loader.args.data_dir: {one_line(repr(data_dir), 80)} is the published"
            " config's placeholder: put the folder of the data set there, or add"
            " --set data_loader.args.data_dir=FOLDER"
        )
    comet_key = value_at(tree, "comet.api")
    if isinstance(comet_key, str) and PLACEHOLDER.fullmatch(comet_key):
        # Without a key the run is logged offline, or with COMET_API_KEY
        return merge(tree, {"comet": {"api": None}})
    return tree
