"""The environment and the provenance that a run records."""

import tomllib
from pathlib import Path

import pytest

import base.run_folder.environment as environment_module
from base.config import validate
from base.config.same_experiment import config_hash
from base.config.tree import merge
from base.run_folder.environment import (
    PROVENANCE,
    package_versions,
    project_version,
    provenance,
)

TREE = {
    "arch": {"type": "simpleCNN"},
    "data_loader": {"type": "ImageFolderDataLoader", "args": {"data_dir": "a"}},
    "trainer": {"noise_file": "noise.npy"},
    "seed": 2,
}


def test_the_version_is_that_of_the_clone(monkeypatch, tmp_path):
    declared = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    monkeypatch.setattr(environment_module, "version", lambda name: f"installed {name}")
    assert project_version() == declared["version"]
    monkeypatch.setattr(environment_module, "ROOT", tmp_path)
    assert project_version() == f"installed {declared['name']}", "without a clone"
    for other in ("[project]\nname = 'another'\nversion = '9'", "[tool]", "= no toml"):
        (tmp_path / "pyproject.toml").write_text(other)
        assert project_version() == f"installed {declared['name']}"


def test_a_commit_with_changes_says_so(monkeypatch):
    answers = {"rev-parse": "abc", "status": " M train.py"}
    monkeypatch.setattr(environment_module, "_git", lambda command, *_: answers[command])
    values = provenance(validate(TREE))
    assert tuple(values) == PROVENANCE
    assert values["commit"] == "abc-dirty"
    answers["status"] = ""
    assert provenance(validate(TREE))["commit"] == "abc"
    answers |= {"rev-parse": None, "status": None}
    assert provenance(validate(TREE))["commit"] is None


def test_a_commit_made_during_a_run_is_not_the_runs(monkeypatch, tmp_path):
    before = provenance(validate(TREE))["commit"]
    monkeypatch.setattr(environment_module, "ROOT", tmp_path)
    assert provenance(validate(TREE))["commit"] == before


def test_versions_of_packages_installed_during_a_run_are_not_the_runs(monkeypatch):
    before = package_versions()
    monkeypatch.setattr(environment_module, "version", lambda name: f"installed {name}")
    # What one caller does to its answer changes no other's
    package_versions().clear()
    assert package_versions() == before != {}


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"data_loader": {"args": {"data_dir": "b"}}, "trainer": {"noise_file": "c.npy"}}, True),
        ({"name": "other", "system": {"num_threads": 3}}, True),
        ({"trainer": {"epochs": 200, "OCNN": False}}, True),
        ({"arch": {"args": {"num_classes": 10, "in_channels": 3}}}, True),
        ({"trainer": {"epochs": 3}}, False),
        ({"trainer": {"noise_file": None}}, False),
        ({"seed": 3}, False),
        ({"optimizer": {"type": "SGD", "args": {"lr": 0.25}}}, False),
    ],
)
def test_the_hash_depends_only_on_what_is_computed(change, same):
    other = config_hash(validate(merge(TREE, change)))
    assert (other == config_hash(validate(TREE))) is same
    assert len(other) == 64
