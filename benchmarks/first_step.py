"""Runs train.py in this process and ends it after the first training step.

    python -m benchmarks.first_step PACKAGE,PACKAGE -c CONFIG --run_dir DIR ...

The last line printed says when the step was finished, in seconds of the clock that all processes
share, and which of the packages were imported. This module must import only what train.py imports
itself.
"""

import json
import os
import runpy
import sys
from time import monotonic
from typing import Any

from trainer.trainer import Trainer


def stop_after_first_step(packages: list[str]) -> None:
    """End this process after the first `Trainer.train_batch`."""
    train_batch = Trainer.train_batch

    def last(trainer: Trainer, *batch: Any) -> None:
        # Reading a value waits for the device, so the step is finished.
        float(train_batch(trainer, *batch).sums["loss"])
        imported = [name for name in packages if name in sys.modules]
        print(json.dumps({"finished": monotonic(), "imported": imported}), flush=True)
        os._exit(0)

    Trainer.train_batch = last


if __name__ == "__main__":
    stop_after_first_step(sys.argv[1].split(","))
    sys.argv = ["train.py", *sys.argv[2:]]
    runpy.run_path("train.py", run_name="__main__")
