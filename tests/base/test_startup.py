"""Ctrl-C while a command imports its libraries."""

import subprocess
import sys

import pytest

from tiny_runs import ROOT

INTERRUPTED = """
import os, runpy, signal, sys

class Interrupting:
    def find_spec(self, name, *_):
        if name == "pydantic":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a command, to which a signal comes while it imports its libraries."""


def test_a_program_that_imports_a_command_keeps_its_own_ctrl_c():
    code = (
        "import signal, fgsm; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize("command", sorted(ROOT.glob("*.py")), ids=lambda file: file.stem)
def test_ctrl_c_during_the_imports_of_a_command_is_one_line(command):
    words = [sys.executable, "-c", INTERRUPTED, str(command), "--help"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
