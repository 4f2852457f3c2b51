"""How OpenMP's threads wait; commands import this module, through base.startup, before any other.

torch's libraries read the setting when they are loaded, and nearly every module of this project
loads them. So the import of this module makes the setting. Only commands import it: a program of
your own that uses the rooms keeps its setting.
"""

import os
import sys

SPIN_COUNT = 3000
"""Turns of the loop in which a thread waits before it sleeps. benchmarks/README.md has what other
values cost."""

SET_BY_USER = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def spin_briefly() -> None:
    """Let OpenMP's threads fall asleep soon when they wait for work, so that other processes run.

    torch's wheels for Linux bring GNU's OpenMP (libgomp), whose threads wait in a loop of 300,000
    turns before they sleep. If two processes train on the same cores, each keeps the cores busy
    while it only waits, and both run at a quarter of their speed instead of half.

    Other OpenMP libraries (LLVM's on macOS, Intel's) do not read the variable. Processes that this
    one starts inherit it. A setting of the user's is kept.
    """
    if sys.platform == "linux" and not any(name in os.environ for name in SET_BY_USER):
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)


spin_briefly()
