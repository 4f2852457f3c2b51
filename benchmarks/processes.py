"""New processes, for what cannot be measured in this one."""

import os
import subprocess
import sys
from collections.abc import Sequence

from base.errors import ConfigError
from benchmarks.steps import ROOT


def python(words: Sequence[str], threads: int) -> str:
    """What a Python process prints that is started with these words in the project's folder.

    Raises:
        ConfigError: it failed; with the last line of its complaint.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(  # noqa: S603 - this interpreter, words of this room
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode != 0:
        reason = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        reason = reason.removeprefix("error: ")
        raise ConfigError(
            f"{' '.join(words[:2])}: ended with exit code {done.returncode}: {reason}"
        )
    return done.stdout
