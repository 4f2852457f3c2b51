"""The targets of the fuzzer: code that reads files which may come from elsewhere."""

import atexit
import io
import json
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from itertools import count
from pathlib import Path
from random import Random
from shutil import rmtree
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import train
from base.base_trainer import BaseTrainer
from base.checkpoint import load_checkpoint, save_checkpoint
from base.config import load_config, validate
from base.config.tree import merge
from base.errors import ProjectError, Stopped
from base.optim import check_optimization
from base.run_folder.names import LAST
from tests.soak.mutations import corrupted
from tests.soak.scenarios import write_images

CONFIGS = Path(__file__).parents[2] / "configs"
FUZZED = {
    "name": "fuzz",
    "arch": {"type": "simpleCNN", "args": {"conv_layer_type": "conv", "norm_layer_type": "bn"}},
    "data_loader": {
        "type": "ImageFolderDataLoader",
        "args": {"batch_size": 4, "validation_split": 0.25},
    },
    "optimizer": {"type": "SGD", "args": {"lr": 0.01, "momentum": 0.9}},
    "lr_scheduler": {"type": "ReduceLROnPlateau", "monitor": "val_loss"},
    "trainer": {"epochs": 3, "ema_decay": 0.5, "verbosity": 0},
    "adversarial": {"report": False},
    "system": {"num_threads": 1},
}
BATCHES = 3
"""The number of minibatches in an epoch of such a run."""


class _StepDone(Exception):  # noqa: N818 - not an error: a resumed run can train
    """A resumed run has made a step."""


def read_config(file: Path) -> None:
    """Read a config as train.py does before it reads data."""
    config = load_config(file)
    check_optimization(config.optimizer, config.lr_scheduler)
    if validate(config.dump()).dump() != config.dump():
        raise AssertionError("the resolved config is another one when it is read again")


def read_checkpoint(file: Path) -> None:
    """Read a checkpoint as evaluation and resume do; resume it for one step in its folder."""
    load_checkpoint(file)
    update = BaseTrainer.update

    def update_once(trainer: BaseTrainer, losses: Tensor) -> None:
        update(trainer, losses)
        raise _StepDone

    # Without launch, a changed n_gpu would start processes
    with (
        patch.object(BaseTrainer, "update", update_once),
        patch("experiment.experiment.launch"),
        suppress(_StepDone),
    ):
        _train("-r", file)


def _train(*words: str | Path) -> None:
    """Run `train.py` with these arguments."""
    with patch.object(sys, "argv", ["train.py", *map(str, words)]):
        train.main()


def config_seeds() -> list[bytes]:
    """Return all shipped configs."""
    return [
        file.read_bytes()
        for file in sorted(CONFIGS.rglob("*.json"))
        if not file.name.endswith("schema.json")
    ]


def checkpoint_seeds() -> list[bytes]:
    """Return a run's checkpoint from its second epoch, with a checksum and without one in both of
    torch's formats.
    """
    contents = resumable()
    seeds = []
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder, "with_checksum"), contents)
        seeds.append(Path(folder, "with_checksum").read_bytes())
    for zipped in (True, False):
        file = io.BytesIO()
        torch.save({**contents, "schema_version": 1}, file, _use_new_zipfile_serialization=zipped)
        seeds.append(file.getvalue())
    return seeds


@cache
def resumable() -> dict[str, Any]:
    """Return the contents of a checkpoint to resume from.

    Its images are removed when this process exits.
    """
    place = Path(tempfile.mkdtemp())
    atexit.register(rmtree, place, ignore_errors=True)
    write_images(place / "images", training=4, test=1, side=8)
    config = merge(FUZZED, {"data_loader": {"args": {"data_dir": str(place / "images")}}})
    (place / "config.json").write_text(json.dumps(config))
    update, updates = BaseTrainer.update, count(1)

    def stop_in_the_second_epoch(trainer: BaseTrainer, losses: Tensor) -> None:
        update(trainer, losses)
        if next(updates) == BATCHES + 1:
            trainer.signals.asked = signal.SIGTERM

    with patch.object(BaseTrainer, "update", stop_in_the_second_epoch), suppress(Stopped):
        _train("-c", place / "config.json", "--run_dir", place / "run")
    return load_checkpoint(place / "run" / LAST)


def write_corrupted_checkpoint(file: Path, random: Random) -> None:
    """Write a checkpoint with a valid checksum in which one value is corrupted."""
    save_checkpoint(file, corrupted(resumable(), random))


TARGETS: dict[str, tuple[Callable[[Path], None], Callable[[], list[bytes]]]] = {
    "config": (read_config, config_seeds),
    "checkpoint": (read_checkpoint, checkpoint_seeds),
}


def examine(target: str, file: Path) -> bool:
    """Read a file; return whether it is accepted, or refused with an error of one line.

    Raises:
        AssertionError: the error has several lines.
        Exception: any other error.
    """
    try:
        TARGETS[target][0](file)
    except ProjectError as error:
        if len(str(error).splitlines()) != 1:
            raise AssertionError(f"{len(str(error).splitlines())} lines: {error}") from error
        return False
    return True
