"""How long OpenMP's threads spin: set by commands before torch is loaded, and only by them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from base import openmp

ROOT = Path(__file__).parents[2]
COMMANDS = [
    *(file.stem for file in sorted(ROOT.glob("*.py"))),
    "benchmarks.__main__",
    "tests.soak.__main__",
]
SHOW = f"""
import importlib, os, sys

def show():
    print([os.environ.get(name) for name in {openmp.SET_BY_USER}])

class BeforeTorch:
    def find_spec(self, name, *_):
        if name == "torch":
            show()
            sys.stdout.flush()
            os._exit(0)

sys.meta_path.insert(0, BeforeTorch())
importlib.import_module(sys.argv[1])
show()
"""
"""Prints the environment at the moment at which a module imports torch, or in the end."""


def environment_of_torch(module, **asked):
    environment = {
        **{name: value for name, value in os.environ.items() if name not in openmp.SET_BY_USER},
        **asked,
    }
    command = [sys.executable, "-c", SHOW, module]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux's wheels bring libgomp")
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_set_it_before_torch_is_imported(command):
    assert environment_of_torch(command) == f"['{openmp.SPIN_COUNT}', None]"


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        ({"GOMP_SPINCOUNT": "7"}, "['7', None]"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "[None, 'ACTIVE']"),
    ],
)
def test_what_the_user_has_set_is_kept(asked, kept):
    assert environment_of_torch("train", **asked) == kept


@pytest.mark.parametrize("room", ["base", "experiment", "models", "attacks"])
def test_programs_that_use_the_rooms_keep_what_they_have(room):
    assert environment_of_torch(room) == "[None, None]"


def test_other_systems_are_left_alone(monkeypatch):
    for name in openmp.SET_BY_USER:
        # Set first, so that it is what it was after the test, whatever the call does.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(openmp.sys, "platform", "darwin")
    openmp.spin_briefly()
    assert "GOMP_SPINCOUNT" not in os.environ
    monkeypatch.setattr(openmp.sys, "platform", "linux")
    openmp.spin_briefly()
    assert os.environ["GOMP_SPINCOUNT"] == str(openmp.SPIN_COUNT)
