"""The schema of grid files is current, accepts good grids and refuses bad ones."""

import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from referencing import Registry
from referencing.jsonschema import DRAFT202012

from studies.grid_schema import schema

CONFIGS = Path(__file__).parents[2] / "configs"
GRIDS = sorted((CONFIGS / "ablations").glob("*.json"))


@pytest.fixture(scope="module")
def validator():
    files = {
        name: json.loads((CONFIGS / name).read_text())
        for name in ("schema.json", "grid_schema.json")
    }
    registry = Registry().with_resources(
        (name, DRAFT202012.create_resource(tree)) for name, tree in files.items()
    )
    return Draft202012Validator({"$ref": "grid_schema.json"}, registry=registry)


def test_the_schema_is_current():
    written = json.loads((CONFIGS / "grid_schema.json").read_text())
    assert written == schema(), "run: python -m studies.grid_schema"


@pytest.mark.parametrize("file", GRIDS, ids=lambda file: file.stem)
def test_every_shipped_grid_names_the_schema_and_is_valid(file, validator):
    tree = json.loads(file.read_text())
    assert (file.parent / tree["$schema"]).resolve() == CONFIGS / "grid_schema.json"
    validator.validate(tree)


@pytest.mark.parametrize(
    "settings",
    [
        {"trainer.epochs": 3, "_note": "x"},
        {"optimizer.args.lr": 0.1, "lr_scheduler.args.milestones": [3]},
        {"lr_scheduler": None, "trainer": {"epochs": 3}},
    ],
)
def test_settings_that_are_accepted(settings, validator):
    validator.validate(
        {"base": "b.json", "axes": {"a": {"x": settings}}, "variants": {"v": settings}}
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"trainer.epoch": 3},
        {"trainer.epochs": "many"},
        {"trainer": {"epoch": 3}},
        {"seed": 3},
        {"comet.api": "secret"},
        {"trainer.epochs.x": 3},
    ],
)
def test_settings_that_are_refused(settings, validator):
    assert not validator.is_valid({"base": "b.json", "variants": {"v": settings}})
    assert not validator.is_valid({"base": "b.json", "axes": {"a": {"x": settings}}})


def test_grids_that_are_refused(validator):
    for tree in (
        {"axis": {}},
        {"seeds": []},
        {"seeds": [-1]},
        {"axes": {"a": {}}},
        {"base": 3},
        {"variants": []},
    ):
        assert not validator.is_valid({"base": "b.json", **tree}), tree
