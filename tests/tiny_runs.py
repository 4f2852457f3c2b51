"""Runs of about a second, for tests of everything around training."""

import os
import runpy
import signal
import sys
import warnings
from importlib import import_module
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch
from PIL import Image

from base.base_trainer import BaseTrainer
from base.checkpoint import load_checkpoint
from base.config import validate
from base.config.tree import merge
from base.errors import ProjectError, Stopped
from data_loader import workers
from experiment.experiment import Experiment

ROOT = Path(__file__).parents[1]
TINY = {
    "name": "tiny",
    "seed": 3,
    "arch": {
        "type": "simpleCNN",
        "args": {"conv_layer_type": "prec_conv", "norm_layer_type": "no"},
    },
    "data_loader": {
        "type": "DigitsDataLoader",
        "args": {"batch_size": 8, "num_batches": 3, "validation_split": 0.1},
    },
    "optimizer": {"type": "SGD", "args": {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4}},
    "trainer": {"epochs": 3, "verbosity": 0},
}


def config_of(**sections):
    return validate(merge(TINY, sections))


def run(folder, config):
    return Experiment.from_config(config).run(folder and str(folder))


def interrupt(monkeypatch, folder, config, after):
    """Run until `after` updates are done, then send this process SIGTERM, as a cluster would."""
    update, count = BaseTrainer.update, 0

    def counted(self, loss):
        nonlocal count
        update(self, loss)
        count += 1
        if count == after:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(BaseTrainer, "update", counted)
        with pytest.raises(
            Stopped, match=rf"stopped by SIGTERM after .* continue with -r {folder}"
        ) as caught:
            run(folder, config)
    assert caught.value.exit_code == 143
    assert count == after


def read_arrays(file):
    """Return the arrays of a `.npz` file by name; the file is closed."""
    with np.load(file) as arrays:
        return dict(arrays)


def difference(first, second):
    """Return the names of all values that differ between two checkpoints, wall-clock time aside."""
    different = []

    def walk(a, b, path):
        if isinstance(a, dict):
            if a.keys() != b.keys():
                different.append(path)
                return
            for key in a:
                if key != "train_seconds":
                    walk(a[key], b[key], f"{path}.{key}")
        elif isinstance(a, (list, tuple)):
            if len(a) != len(b):
                different.append(path)
                return
            for index, (x, y) in enumerate(zip(a, b, strict=True)):
                walk(x, y, f"{path}.{index}")
        elif isinstance(a, torch.Tensor):
            if not torch.equal(a, b):
                different.append(path)
        elif a != b:
            different.append(path)

    walk(load_checkpoint(first), load_checkpoint(second), "")
    return different


def forked(function):
    """Start a process that calls `function` and exits with 0, or with a `ProjectError`'s code.

    Returns the process's id.
    """
    with warnings.catch_warnings():
        # Python warns that forking a process with threads may deadlock.
        warnings.simplefilter("ignore")
        process = os.fork()
    if process:
        return process
    code = 99
    try:
        # The threads of the parent do not exist in this process.
        torch.set_num_threads(1)
        function()
        code = 0
    except ProjectError as error:
        code = error.exit_code
    except SystemExit as end:
        code = end.code
    finally:
        os._exit(code)


def exit_code(process):
    """Wait for a process from `forked`; return its exit code, or minus the number of a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


SLOW_IMPORTS = (
    "matplotlib.figure",
    "scipy.stats",
    "sklearn.datasets",
    "sklearn.metrics",
    # By torch itself, for its optimizers and for determinism.
    "torch._dynamo",
    "torch._inductor",
)
"""What commands import when they first need it, which takes seconds in every process."""


def script(name, *words, cwd, before=None):
    """Run a command with these words in a forked process, which saves the time for imports.

    `before` is called in the process first.
    """
    for module in SLOW_IMPORTS:
        import_module(module)
    streams = {
        1: Path(cwd).parent / f"{os.getpid()}.out",
        2: Path(cwd).parent / f"{os.getpid()}.err",
    }

    def become():
        os.chdir(cwd)
        for number, file in streams.items():
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w") for number in streams)
        sys.argv = [str(ROOT / name), *map(str, words)]
        if before:
            before()
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        finally:
            sys.stdout.flush()
            sys.stderr.flush()

    code = exit_code(forked(become))
    stdout, stderr = (file.read_text() for file in streams.values())
    return CompletedProcess([name, *words], code, stdout, stderr)


class Patience(float):
    """Seconds, as a bound of `data_loader.workers`, that run out only while one worker is at the
    image at `position` (None: while all are between two batches), however slow the machine is."""

    def __new__(cls, seconds, position):
        patience = super().__new__(cls, seconds)
        patience.position, patience.decoders = position, []
        return patience

    def __lt__(self, quiet):
        busy = [at for at in self.decoders[-1].current.tolist() if at != workers.IDLE]
        return super().__lt__(quiet) and busy == ([] if self.position is None else [self.position])


def impatient_workers(monkeypatch, position):
    """Let the patience with decoding processes end after half a second, and only while one is at
    the image at `position`."""
    patience, start = Patience(0.5, position), workers._start

    def noted(decoder, *arguments):
        patience.decoders.append(decoder)
        start(decoder, *arguments)

    monkeypatch.setattr(workers, "CHECK_INTERVAL", 0.1)
    monkeypatch.setattr(workers, "WORKER_TIMEOUT", patience)
    monkeypatch.setattr(workers, "_start", noted)
    return patience


def write_images(
    folder: Path, classes: dict[str, int], size: tuple[int, int] = (8, 8), suffix: str = "png"
) -> None:
    """Write random images of `size` (width, height) into a folder per class.

    `classes` maps the name of a class to its number of images.
    """
    for number, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng([number, i]).integers(
                0, 256, (size[1], size[0], 3), dtype=np.uint8
            )
            Image.fromarray(pixels).save(folder / name / f"{i:03}.{suffix}")
