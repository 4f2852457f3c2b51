"""What is fuzzed: everything that reads a file which may come from elsewhere."""

import io
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from base.checkpoint import load_checkpoint, save_checkpoint
from base.config_files import load_config, validate
from base.errors import ProjectError
from base.optimization import check_optimization
from base.resuming import saved_run

CONFIGS = Path(__file__).parents[1] / "configs"
SMALL = {"state_dict": {"weight": torch.arange(3.0)}, "epoch": 1, "mean": [0.5, 0.5, 0.5]}


def read_config(file: Path) -> None:
    """As train.py does, before it looks for data."""
    config = load_config(file)
    check_optimization(config.optimizer, config.lr_scheduler)
    if validate(config.dump()).dump() != config.dump():
        raise AssertionError("the resolved config is another one when it is read again")


def read_checkpoint(file: Path) -> None:
    """As evaluation and resume do."""
    load_checkpoint(file)
    saved_run(str(file))


def config_seeds() -> list[bytes]:
    """All shipped configs."""
    return [file.read_bytes() for file in sorted(CONFIGS.rglob("*.json")) if file.name != "schema.json"]


def checkpoint_seeds() -> list[bytes]:
    """A sealed checkpoint, one of ConvNorm's form, and one in torch's older format; the last two have no seal."""
    config = load_config(CONFIGS / "quickstart.json").dump()
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder, "sealed"), {**SMALL, "config": config})
        seeds = [Path(folder, "sealed").read_bytes()]
    for zipped in (True, False):
        file = io.BytesIO()
        torch.save({**SMALL, "config": config}, file, _use_new_zipfile_serialization=zipped)
        seeds.append(file.getvalue())
    return seeds


TARGETS: dict[str, tuple[Callable[[Path], None], Callable[[], list[bytes]]]] = {
    "config": (read_config, config_seeds),
    "checkpoint": (read_checkpoint, checkpoint_seeds),
}


def examine(target: str, file: Path) -> bool:
    """Read a file; whether it was good. Anything but a result or an error of one line is raised.

    Raises:
        AssertionError: an error of several lines.
        Exception: whatever else happens.
    """
    try:
        TARGETS[target][0](file)
    except ProjectError as error:
        if len(str(error).splitlines()) != 1:
            raise AssertionError(f"{len(str(error).splitlines())} lines: {error}") from error
        return False
    return True
