"""Warnings about a valid config that may not do what its author wants: train without any
normalization, or set keys without effect."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from base.config.arguments import OpenSection
from base.config.config import Config
from base.config.origins import Origins, origin_of
from base.config.section import Needs, Section, lies_in
from base.config.tree import value_at
from base.text import one_line

UNUSED_OK = "_unused_ok"
"""The comment key that silences the warning about keys without effect: true, a dotted key or
section, or a list of them."""
LAYER_KEYS = ("arch.args.conv_layer_type", "arch.args.norm_layer_type")


def warnings_of(
    config: Config,
    files: Mapping[str, Any],
    flags: Mapping[str, Any],
    silenced: Any,
    origins: Origins,
) -> tuple[str, ...]:
    """Return the warnings about a config, each in one line.

    Args:
        config: the resolved config.
        files: the tree of its file and the parents.
        flags: the tree of the command line's values.
        silenced: the value of `UNUSED_OK`.
        origins: the file or flag that each value came from.
    """
    found = (
        _warn_of_normalization(config, files, flags),
        _warn_of_unused_keys(config, silenced, origins),
    )
    return tuple(warning for warning in found if warning is not None)


def _warn_of_normalization(
    config: Config, files: Mapping[str, Any], flags: Mapping[str, Any]
) -> str | None:
    args = config.arch.args
    # Files that name both layers intend the pair, and so do flags that name both. Who gives a flag
    # for only one of them may have forgotten the other
    if _layers_in(files) == [args.conv_layer_type, args.norm_layer_type]:
        return None
    if None not in _layers_in(flags):
        return None
    names = (
        f"arch.args.conv_layer_type {args.conv_layer_type}"
        f" with arch.args.norm_layer_type {args.norm_layer_type}"
    )
    if len(args.normalizations) > 1:
        return f"{names} normalizes twice in a row; ConvNorm needs no norm layer (--norm no)"
    if not args.normalizations and not args.normalizes_weights:
        return (
            f"{names} is a network without any normalization;"
            " if you intend this, name both in the config file"
        )
    return None


def _layers_in(tree: Mapping[str, Any]) -> list[Any]:
    """The types of the convolution and of the norm layer; None for one that is not given."""
    return [value_at(tree, key) for key in LAYER_KEYS]


def _warn_of_unused_keys(config: Config, silenced: Any, origins: Origins) -> str | None:
    if silenced is True:
        return None
    if not isinstance(silenced, list):
        silenced = [silenced]
    silenced_keys = [str(key) for key in silenced]
    unused = []
    for key, value, needed in _unmet(config, config):
        if lies_in(key, silenced_keys):
            continue
        origin = origin_of(origins, key.split("."))
        given_by = f" of {origin}" if origin else ""
        shown = one_line(json.dumps(value), 40)
        unused.append(f"{key} {shown}{given_by} (only with {needed})")
    if not unused:
        return None
    return f"without effect in this run: {', '.join(unused)}"


def _unmet(config: Config, section: Section, path: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yield key, value and missing condition of every key that has no effect in this config."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _unmet(config, value, f"{path}{name}.")
        # A resolved config sets every key, so a default says nothing about what its author wants
        elif name in section.model_fields_set and value != field.default:
            for needs in field.metadata:
                if isinstance(needs, Needs) and not needs.met(config):
                    yield f"{path}{name}", value, needs.what
    if isinstance(section, OpenSection):
        for name, value, takers in section.unused(section.chosen(config)):
            yield f"{path}{name}", value, takers
