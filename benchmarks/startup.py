"""Seconds from the quickstart's command to its first training step, and the packages that it has
imported by then.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

from benchmarks.processes import python
from benchmarks.rows import BenchmarkRow, Goal, Settings
from benchmarks.timing import Spread

GOAL = 6
REPEATS = 3
UNUSED = ("comet_ml", "tensorboard", "matplotlib")
"""Packages that the quickstart does not use."""

NOTE = (
    "a new process each time; from just before it starts to the end of the first train_batch,"
    " imports included"
)


def measure(settings: Settings) -> list[BenchmarkRow]:
    """A row of seconds, and one that counts the packages imported without need."""
    runs = [_first_step(settings) for _ in range(min(REPEATS, settings.repeats))]
    seconds = Spread.of([run["seconds"] for run in runs])
    imported = sorted({name for run in runs for name in run["imported"]})
    counts = Spread.of([float(len(run["imported"])) for run in runs])
    found = ", ".join(imported) or "none of them"
    command = "python train.py -c configs/quickstart.json"
    return [
        BenchmarkRow(
            "from the command to the first step",
            command,
            seconds,
            "s",
            goal=Goal(GOAL, at_least=False),
            note=NOTE,
        ),
        BenchmarkRow(
            "packages imported without need",
            command,
            counts,
            "packages",
            goal=Goal(0, at_least=False),
            note=f"of {', '.join(UNUSED)}: {found}",
        ),
    ]


def _first_step(settings: Settings) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        arguments = [
            *("-m", "benchmarks.first_step", ",".join(UNUSED)),
            *("-c", "configs/quickstart.json"),
            *("--run_dir", str(Path(folder) / "run")),
            *("--set", f"system.num_threads={settings.threads}"),
            *("--set", f"system.device={settings.device}"),
        ]
        start = monotonic()
        printed = python(arguments, settings.threads)
    step = json.loads(printed.splitlines()[-1])
    return {"seconds": step["finished"] - start, "imported": step["imported"]}
