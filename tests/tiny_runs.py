"""Runs of about a second, for tests of everything around training."""

import contextlib
import gc
import logging
import os
import runpy
import signal
import subprocess
import sys
import traceback
import warnings
from functools import cache
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
from data_loader.datasets import LabeledImages, MemoryImages, read_digits
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


all_digits = cache(read_digits)


def few_digits(train):
    """Digits of 16 x 16: 405 for training and 61 for the test."""
    digits = all_digits(train)
    few = slice(405 if train else 61)
    pixels = digits.images.pixels[few, :, ::2, ::2].contiguous()
    # A copy, as label noise may change it
    return LabeledImages(MemoryImages(pixels), digits.labels[few].copy(), digits.class_names)


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
    except Exception:
        traceback.print_exc(file=sys.__stderr__)
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


class Fork(subprocess.Popen):
    """`subprocess.Popen`, which forks this process where it is asked for another Python process.

    That saves the seconds for imports. The new process has the modules of this one and its filters
    of warnings. A test of what Python does before the first line of a program cannot use it.

    Args:
        args: the command; after `sys.executable` come a file, `-c` and a program, or `-m` and the
            name of a module, and then words.
        before: is called in the new process first.
        env, pass_fds, preexec_fn, named: those of `subprocess.Popen`.
    """

    def __init__(
        self, args, *, before=None, env=None, pass_fds=(), preexec_fn=None, **named
    ) -> None:
        if args[0] != sys.executable:
            super().__init__(args, env=env, pass_fds=pass_fds, preexec_fn=preexec_fn, **named)
            return
        for module in SLOW_IMPORTS:
            import_module(module)

        def become():
            code = 99
            try:
                if preexec_fn:
                    preexec_fn()
                _leave_open_files(pass_fds)
                _forget_signal_handlers()
                # Those of pytest, which take the log of this process
                logging.getLogger().handlers.clear()
                logging.getLogger().setLevel(logging.WARNING)
                # Popen switches it off while it forks.
                gc.enable()
                # The threads of the parent do not exist in this process.
                torch.set_num_threads(1)
                if env is not None:
                    os.environ.clear()
                    os.environ.update(env)
                    sys.path[:0] = [path for path in env.get("PYTHONPATH", "").split(":") if path]
                sys.stdin, sys.stdout, sys.stderr = (
                    os.fdopen(number, mode) for number, mode in enumerate(("r", "w", "w"))
                )
                if before:
                    before()
                # torchrun asks for output without a buffer.
                words = args[2:] if args[1] == "-u" else args[1:]
                code = _run_program([str(word) for word in words])
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

        with warnings.catch_warnings():
            # Python warns that forking a process with threads may deadlock.
            warnings.simplefilter("ignore")
            # It is called between fork and exec, and does not return.
            named = {"pass_fds": pass_fds, "restore_signals": False, **named}
            super().__init__(args, preexec_fn=become, **named)


def fork_programs():
    """Let this process fork the Python programs that it starts: `before` of a `Fork`."""
    subprocess.Popen = Fork


def _leave_open_files(kept):
    """Let the descriptors of files that this process has from its parent lead nowhere.

    They are not closed: objects of the parent would later close other files of the same number.
    Among them is the pipe whose end `Popen` takes for the beginning of the program.
    """
    nowhere = os.open(os.devnull, os.O_RDWR)
    for file in list(Path("/dev/fd").iterdir()):
        number = int(file.name)
        if number > 2 and number not in (nowhere, *kept):
            with contextlib.suppress(OSError):
                # The folder itself has been read, and is closed.
                os.fstat(number)
                os.dup2(nowhere, number, inheritable=False)


def _forget_signal_handlers():
    """As in a new program: the parent's functions are not called, what it ignores is ignored."""
    for number in signal.valid_signals():
        if number == signal.SIGINT and callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler)
        elif callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)


def _run_program(words):
    """Run what Python runs by these words; return the exit code."""
    try:
        if words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            exec(words[1], {"__name__": "__main__"})  # noqa: S102 - the test's own program
        elif words[0] == "-m":
            sys.argv = words[1:]
            # As in a new process, in which nothing has imported it yet
            sys.modules.pop(words[1], None)
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).resolve().parent))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def python(*words, timeout=300, **named):
    """Return the exit code and the output of a forked Python process with these words."""
    command = [sys.executable, *map(str, words)]
    process = Fork(command, stdout=-1, stderr=-1, text=True, **named)
    stdout, stderr = process.communicate(timeout=timeout)
    return CompletedProcess(command, process.returncode, stdout, stderr)


def script(name, *words, cwd, before=None):
    """Run a command with these words in a forked process, which saves the time for imports.

    `before` is called in the process first.
    """
    # Not pipes, which processes that outlive the command would keep open
    streams = [Path(cwd).parent / f"{os.getpid()}.{which}" for which in ("out", "err")]
    with streams[0].open("w") as stdout, streams[1].open("w") as stderr:
        command = [sys.executable, str(ROOT / name), *map(str, words)]
        code = Fork(command, before=before, cwd=cwd, stdout=stdout, stderr=stderr).wait()
    return CompletedProcess(command, code, *(file.read_text() for file in streams))


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
