"""Trees of JSON values: merging one over another, and finding the typed section of a path."""

from collections.abc import Sequence
from typing import Any

from base.config.config import Config
from base.config.nearest_key import nearest_key
from base.config.section import Section, section_in
from base.errors import ConfigError
from base.registry import format_hint, nearest_name
from base.text import one_line

Tree = dict[str, Any]


def merge(
    parent: Tree, child: Tree, root: type[Section] = Config, path: tuple[str, ...] = ()
) -> Tree:
    """Return `parent` updated with `child`, section by section; a null in `child` deletes the key.

    Args:
        parent, child: trees of JSON values.
        root: the section that the whole trees describe.
        path: the keys under which both lie in the whole trees.

    Raises:
        ConfigError: a null for a key that does not exist.
    """
    merged = dict(parent)
    for key, value in child.items():
        if value is None:
            # A misspelt null would silently keep the value that it should delete
            _check_known(key, merged, root, path)
            merged.pop(key, None)
        elif isinstance(value, dict):
            below = merged.get(key)
            if not isinstance(below, dict):
                below = {}
            merged[key] = merge(below, value, root, (*path, key))
        else:
            merged[key] = value
    return merged


def without_comments(value: Any) -> Any:
    """Return a tree without the keys that are comments."""
    if not isinstance(value, dict):
        return value
    return {key: without_comments(below) for key, below in value.items() if not is_comment(key)}


def without_nulls(tree: Tree, path: tuple[str, ...] = ()) -> Tree:
    """Return a tree without nulls, which mean the default, except those for unknown keys."""
    section = section_at(path)
    kept = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            kept[key] = without_nulls(value, (*path, key))
        # A null for an unknown key stays, so that validation reports it with all other problems
        elif value is not None or (section is not None and key not in section.known_fields()):
            kept[key] = value
    return kept


def leaves(tree: Tree, path: str = "") -> dict[str, Any]:
    """Return dotted key -> value of everything in a tree except its objects."""
    found = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= leaves(value, f"{path}{key}.")
        else:
            found[f"{path}{key}"] = value
    return found


def value_at(tree: Any, key: str) -> Any:
    """Return the value at a dotted key; None if the tree does not have the key."""
    for name in key.split("."):
        if not isinstance(tree, dict):
            return None
        tree = tree.get(name)
    return tree


def is_comment(key: str) -> bool:
    """Whether a key of a file is a comment, for people and editors."""
    return key.startswith("_") or key == "$schema"


def section_at(path: Sequence[str], root: type[Section] = Config) -> type[Section] | None:
    """Return the section class at a dotted path (`[]` is `root` itself), or None."""
    section = root
    for name in path:
        field = section.known_fields().get(name)
        if field is None:
            return None
        below = section_in(field.annotation)
        if below is None:
            return None
        section = below
    return section


def annotation_at(path: Sequence[str]) -> Any:
    """Return the type annotation of the field at a dotted path; None for an unknown field."""
    section = section_at(path[:-1])
    if section is None or not path:
        return None
    field = section.known_fields().get(path[-1])
    return None if field is None else field.annotation


def describe_unknown_key(path: Sequence[str], root: type[Section] = Config) -> str:
    """Return one line for an unknown key: its dotted path, the nearest key, and the known ones."""
    section = section_at(path[:-1], root)
    known = list(section.known_fields()) if section else []
    # Grids have keys of their own, which other projects do not know
    nearest = nearest_key(path, known) if root is Config else nearest_name(path[-1], known)
    return _unknown_key(path, nearest, known)


def _check_known(key: str, parent: Tree, root: type[Section], path: tuple[str, ...]) -> None:
    if is_comment(key):
        return
    section = section_at(path, root)
    if section is not None:
        if key not in section.known_fields():
            raise ConfigError(describe_unknown_key((*path, key), root))
    elif key not in parent:
        # free-form sections, such as the arguments of an optimizer, have no list of keys: only a
        # key that resembles one of the parent's is a mistake
        nearest = nearest_name(key, parent)
        if nearest is not None:
            raise ConfigError(_unknown_key((*path, key), nearest, parent))


def _unknown_key(path: Sequence[str], nearest: str | None, known: Any) -> str:
    key = one_line(".".join(path), 200)
    return f"{key}: unknown key{format_hint(nearest)} (known here: {', '.join(known)})"
