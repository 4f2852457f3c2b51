"""Runs train.py in this process and ends it after the first training step.

python -m benchmarks.first_step PACKAGE,PACKAGE -c CONFIG --run_dir DIR ...

The last line printed says when the step was finished, in seconds of the clock that all processes
share, and which of the packages were imported. Nothing is imported here that train.py does not
import itself."""

import json
import os
import runpy
import sys
from time import monotonic
from typing import Any

from trainer.trainer import Trainer


def stop_after_first_step(packages: list[str]) -> None:
    """Let the first `Trainer.train_batch` of this process be its last."""
    train_batch = Trainer.train_batch

    def last(trainer: Trainer, *batch: Any) -> None:
        # reads the device, so the step is finished
        float(train_batch(trainer, *batch).sums["loss"])
        imported = [name for name in packages if name in sys.modules]
        print(json.dumps({"finished": monotonic(), "imported": imported}), flush=True)
        os._exit(0)

    Trainer.train_batch = last


if __name__ == "__main__":
    packages, sys.argv = sys.argv[1], ["train.py", *sys.argv[2:]]
    stop_after_first_step(packages.split(","))
    runpy.run_path("train.py", run_name="__main__")
