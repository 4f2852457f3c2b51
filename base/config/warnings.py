"""What a good config may still do against its author's will: train without any normalization, or
name keys without effect."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from base.config.arguments import OpenSection
from base.config.config import Config
from base.config.origins import Origins, origin_of
from base.config.section import Needs, Section, lies_in
from base.text import one_line

UNUSED_OK = "_unused_ok"
"""The comment key that silences the warning of keys without effect: true, a dotted key or section,
or a list of them."""
PAIR = ("conv_layer_type", "norm_layer_type")


def warnings_of(
    config: Config,
    files: Mapping[str, Any],
    flags: Mapping[str, Any],
    silenced: Any = None,
    origins: Origins | None = None,
) -> tuple[str, ...]:
    """The warnings of a config, each in one line.

    Args:
        config: the resolved config.
        files: the tree of its file and that one's parents.
        flags: the tree of what the command line puts on top.
        silenced: the value of `UNUSED_OK`.
        origins: which file or flag each value came from.
    """
    found = [
        _of_normalization(config, files, flags),
        _of_unused_keys(config, silenced, origins or {}),
    ]
    return tuple(filter(None, found))


def _of_normalization(
    config: Config, files: Mapping[str, Any], flags: Mapping[str, Any]
) -> str | None:
    args = config.arch.args
    pair = (args.conv_layer_type, args.norm_layer_type)
    # files that name both mean it, and so do flags that name both; a flag for one of them may have
    # forgotten the other
    if _pair(files) == pair or None not in _pair(flags):
        return None
    names = f"arch.args.conv_layer_type {args.conv_layer_type} with arch.args.norm_layer_type {args.norm_layer_type}"
    if len(args.normalizations) > 1:
        return f"{names} normalizes twice in a row; ConvNorm needs no norm layer (--norm no)"
    if not args.normalizations and not args.normalizes_weights:
        return f"{names} is a network without any normalization; a config file that means this names both"
    return None


def _pair(tree: Mapping[str, Any]) -> tuple[Any, Any]:
    arch = tree.get("arch")
    args = arch.get("args") if isinstance(arch, dict) else None
    return tuple(args.get(name) if isinstance(args, dict) else None for name in PAIR)


def _of_unused_keys(config: Config, silenced: Any, origins: Origins) -> str | None:
    if silenced is True:
        return None
    quiet = [str(key) for key in (silenced if isinstance(silenced, list) else [silenced])]
    unused = [
        f"{key} {one_line(json.dumps(value), 40)}{_given_by(key, origins)} (only with {needed})"
        for key, value, needed in _unmet(config, config)
        if not lies_in(key, quiet)
    ]
    return f"without effect in this run: {', '.join(unused)}" if unused else None


def _given_by(key: str, origins: Origins) -> str:
    origin = origin_of(origins, key.split("."))
    return f" of {origin}" if origin else ""


def _unmet(config: Config, section: Section, path: str = "") -> Iterator[tuple[str, Any, str]]:
    """Key, value and what is missed of every key that was set to something else than its default,
    in vain."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _unmet(config, value, f"{path}{name}.")
        elif name in section.model_fields_set and value != field.default:
            for needs in field.metadata:
                if isinstance(needs, Needs) and not needs.met(config):
                    yield f"{path}{name}", value, needs.what
    if isinstance(section, OpenSection):
        for name, value, takers in section.unused(section.chosen(config)):
            yield f"{path}{name}", value, takers
