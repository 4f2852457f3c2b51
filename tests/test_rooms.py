"""Packages import only those that they may import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = (
    "base", "models", "data_loader", "attacks", "evaluation", "trainer", "studies", "reports",
    "experiment", "benchmarks",
)  # fmt: skip
ROOMS = (*CODE, "configs", "tests")
MAY_IMPORT = {
    "base": set(),
    "models": {"base"},
    "data_loader": {"base"},
    "attacks": {"base"},
    "evaluation": {"base", "attacks", "models.layers"},
    "trainer": {"base", "attacks", "evaluation"},
    "studies": {"base"},
    "reports": {"base"},
    "experiment": {
        "base",
        "models",
        "data_loader",
        "attacks",
        "evaluation",
        "trainer",
        "studies",
        "reports",
    },
    "benchmarks": {*CODE},
    "script": {"base", "evaluation", "studies", "reports", "experiment"},
}
PACKAGES = {
    "base": {"torch", "pydantic", "pydantic_core", "numpy", "tqdm", "comet_ml", "matplotlib"},
    "reports": {"numpy", "scipy", "sklearn", "matplotlib"},
}
"""Of the rooms that may use only these."""
INSTALLED = ROOT / "models" / "layers" / "conv_norm"
"""The package that is installed by itself, under another name: the one place of relative
imports."""


def room_of(file):
    top = file.relative_to(ROOT).parts[0].removesuffix(".py")
    return top if top in ROOMS else "script"


def imports_of(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or (node.level, file.parent) == (1, INSTALLED), (
                f"{file}: relative import"
            )
            if node.level == 0:
                yield node.module


FILES = [
    *sorted(ROOT.glob("*.py")),
    *(file for room in CODE for file in sorted((ROOT / room).rglob("*.py"))),
]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_rooms_import_only_what_they_may(file):
    room = room_of(file)
    for name in imports_of(file):
        top = name.partition(".")[0]
        if top in ROOMS and top != room:
            allowed = any(f"{name}.".startswith(f"{part}.") for part in MAY_IMPORT[room])
            assert allowed, f"{file.name} of {room} imports {name}"
        if room in PACKAGES and top not in ROOMS:
            assert top in PACKAGES[room] or top in sys.stdlib_module_names, (
                f"{file.name} of {room} imports {name}"
            )


@pytest.mark.parametrize("file", sorted(INSTALLED.rglob("*.py")), ids=lambda file: file.name)
def test_the_installed_package_needs_torch_alone(file):
    for name in imports_of(file):
        top = name.partition(".")[0]
        assert top == "torch" or top in sys.stdlib_module_names, f"{file.name} imports {name}"


def test_a_wrong_flag_imports_nothing_slow_and_an_evaluation_not_the_compiler():
    code = (
        "import runpy, sys; sys.argv = ['train.py', '--debug', '--set', 'x']\n"
        "try: runpy.run_path('train.py', run_name='__main__')\n"
        "except BaseException as error: assert 'expected KEY=VALUE' in str(error), error\n"
        "slow = {'torchvision', 'scipy', 'sklearn', 'matplotlib', 'torch._dynamo'}\n"
        "print(sorted(slow & sys.modules.keys()))\n"
        "from base.machine import set_determinism\n"
        "set_determinism(False, None)\n"
        "print('torch._inductor' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\nFalse\n"
