"""New Python processes, for measurements that this one cannot make of itself."""

import os
import subprocess
import sys
from collections.abc import Sequence

from base.errors import ConfigError
from base.rooms import ROOT


def python(arguments: Sequence[str], threads: int) -> str:
    """Run Python with these arguments in the project's folder, and return its standard output.

    Raises:
        ConfigError: it failed; the message holds the last line of its stderr.
    """
    done = subprocess.run(  # noqa: S603 - this interpreter, arguments of this package
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment(threads),
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        reason = (done.stderr.strip() or "it printed no reason").splitlines()[-1]
        reason = reason.removeprefix("error: ")
        raise ConfigError(
            f"{' '.join(arguments[:2])}: ended with exit code {done.returncode}: {reason}"
        )
    return done.stdout


def environment(threads: int) -> dict[str, str]:
    """The environment of such a process: this one's, with so many threads and with this project's
    packages.
    """
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
