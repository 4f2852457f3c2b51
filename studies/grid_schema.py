"""The JSON Schema of a grid file, generated from the types of grids and configs.

`python -m studies.grid_schema` writes `configs/grid_schema.json`. Every shipped grid names it in
`$schema`, so that editors complete and check grids. For the values of config keys it refers to
`configs/schema.json`.
"""

import json
import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from pydantic import TypeAdapter

from base.config import json_schema
from studies.grid import Grid, Settings

FILE = json_schema.FOLDER / "grid_schema.json"
CONFIG_SCHEMA = "schema.json"
"""The schema of configs, relative to this one."""
NOT_IN_GRIDS = ("seed", "imports", "comet.api")
"""Config keys that no variant may set: seeds have their own key, code is imported before the
variants are read, and a secret would be visible in command lines."""
FILE_KEYS = {
    "$schema": {"type": "string", "description": "This schema, for editors."},
    "extends": {
        "type": "string",
        "description": "Parent grid, relative to this file; the keys of this file win.",
    },
}


def schema() -> dict[str, Any]:
    """Return the JSON Schema of a grid file: its own keys, and dotted config keys as settings."""
    # pydantic repeats the schema of settings wherever they may stand; each of these becomes a
    # reference to the one that lists the config keys
    free_form = json.dumps(TypeAdapter(Settings).json_schema(), sort_keys=True)
    settings = json.dumps({"$ref": "#/$defs/Settings"})
    grid = json.dumps(Grid.model_json_schema(), sort_keys=True)
    generated = json.loads(grid.replace(free_form, settings))
    generated["properties"] = FILE_KEYS | generated["properties"]
    generated["patternProperties"] = {"^_": {}}
    generated["$defs"] = {"Settings": _settings()}
    return generated


def _settings() -> dict[str, Any]:
    """Return the schema of settings: dotted config key -> value."""
    whole = json_schema.schema()
    keys = {}
    # Keys that begin with an underscore are comments
    open_sections = {"^_": {}}
    for key, pointer, node in _keys(whole, whole, "", "#"):
        if key not in NOT_IN_GRIDS and key not in json_schema.FILE_KEYS:
            keys[key] = {"$ref": f"{CONFIG_SCHEMA}{pointer}"}
        if _is_open(node):
            open_sections[f"^{re.escape(key)}\\."] = {}
    return {
        "type": "object",
        "description": (
            "Dotted config key -> value, on top of the base config; null gives a key its default."
        ),
        "properties": keys,
        "patternProperties": open_sections,
        "additionalProperties": False,
    }


def _keys(
    whole: dict[str, Any], section: dict[str, Any], path: str, pointer: str
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield dotted key, JSON pointer and schema of everything below a section."""
    for name, node in section.get("properties", {}).items():
        here = f"{pointer}/properties/{name}"
        # An optional section has a schema for its values and one for null
        value = next((kind for kind in node.get("anyOf", []) if kind.get("type") != "null"), node)
        below = here
        if "$ref" in value:
            below = value["$ref"]
            value = _at(whole, below)
        yield path + name, here, value
        yield from _keys(whole, value, f"{path}{name}.", below)


def _at(whole: dict[str, Any], pointer: str) -> dict[str, Any]:
    """Return what a JSON pointer such as `#/$defs/TrainerConfig` refers to."""
    for name in pointer.removeprefix("#/").split("/"):
        whole = whole[name]
    return whole


def _is_open(node: dict[str, Any]) -> bool:
    """Return whether an object takes keys that its schema does not list."""
    return node.get("type") == "object" and node.get("additionalProperties", True) is not False


if __name__ == "__main__":
    # Fills the registry, whose names and arguments the schema lists
    import_module("experiment")
    FILE.write_text(json.dumps(schema(), indent=2) + "\n")
