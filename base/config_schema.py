"""The JSON Schema of a config file, generated from the typed tree.

`python -m base.config_schema` writes it to `configs/schema.json`; every shipped config names that file in `$schema`, so that
editors complete and check.
"""

import json
import sys
from pathlib import Path
from typing import Any

from base.config import Config


def schema() -> dict[str, Any]:
    """The JSON Schema of a config file, with the two keys that only files have."""
    generated = Config.model_json_schema()
    generated["properties"] = {
        "$schema": {"type": "string", "description": "This schema, for editors."},
        "extends": {"type": "string", "description": "Parent config, relative to this file; keys here win, null deletes."},
        **generated["properties"],
    }
    generated["required"] = []  # a parent may give what a child leaves out
    _allow_comments_and_nulls(generated)
    return generated


def _allow_comments_and_nulls(node: Any) -> None:
    """Let every object of the schema hold `_comment` keys, need no key, and take null (the default) for each."""
    if isinstance(node, dict):
        if node.get("additionalProperties") is False:
            node["patternProperties"] = {"^_": {}}
            node.pop("required", None)
            for name, value in node["properties"].items():
                if "type" in value or "$ref" in value or "enum" in value:
                    described = {k: value.pop(k) for k in ("description", "default") if k in value}
                    node["properties"][name] = {"anyOf": [value, {"type": "null"}], **described}
        for value in node.values():
            _allow_comments_and_nulls(value)
    elif isinstance(node, list):
        for value in node:
            _allow_comments_and_nulls(value)


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "configs/schema.json")
    target.write_text(json.dumps(schema(), indent=2) + "\n")
