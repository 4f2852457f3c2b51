"""The run folder: where one run writes.

`<save_dir>/<name>/<run id>/`, or exactly the folder that `--run_dir` names.
"""

import errno
import json
import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from base.atomic import replacing, sweep
from base.checkpoint import has_checkpoint
from base.errors import CheckpointError, ConfigError
from base.output import as_json
from base.run_folder.locks import locked
from base.run_folder.names import CONFIG, ENVIRONMENT, LOCK


@contextmanager
def new_run_folder(save_dir: str, name: str, run_dir: str | None = None) -> Iterator[Path]:
    """Make an empty folder for a new run, yield it, and keep all other runs out of it meanwhile.
    What an earlier attempt of the same job has left in `run_dir` before its first checkpoint is
    written over.

    Raises:
        ConfigError: `run_dir` already holds a run, or the folder cannot be made.
    """
    folder = Path(run_dir or save_dir)
    try:
        folder = folder.expanduser()  # of `name` nothing is expanded
        if not run_dir:
            folder = folder / name / datetime.now().strftime("%Y%m%d-%H%M%S-%f")
        folder.mkdir(parents=True, exist_ok=bool(run_dir))
        with NamedTemporaryFile(dir=folder):
            pass  # can be written to, then
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{folder}: the run folder cannot be made or written: {error}") from None
    with only_run_in(folder):
        if has_checkpoint(folder):
            raise ConfigError(
                f"--run_dir {folder}: already holds a run; continue it with -r {folder}, or name another folder"
            )
        if (folder / CONFIG).exists() and not begun_by_this_job(folder):
            raise ConfigError(
                f"--run_dir {folder}: holds a run without a checkpoint; remove it, or name another folder"
            )
        if job():
            # before anything else, as the next attempt asks for it
            write_json(folder / ENVIRONMENT, {"job": job()})
        yield folder


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Keep all other runs out of `folder` meanwhile, as far as its file system knows locks, and
    clear away what dead ones have left half written in it.

    Raises:
        ConfigError: another run is there.
        CheckpointError: the folder cannot be written.
    """
    with ExitStack() as stack:
        try:
            if not stack.enter_context(locked(folder / LOCK)):
                raise ConfigError(f"{folder}: another process trains in this folder")
            sweep(folder)
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be written: {error.strerror}") from None
        with explained(folder):
            yield


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn what the system says about a full disk or a folder that is gone or may not be written
    into one line.

    Raises:
        CheckpointError: naming the folder.
    """
    try:
        yield
    except OSError as error:
        inside = isinstance(error.filename, str) and Path(error.filename).is_relative_to(folder)
        if not inside and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        raise CheckpointError(
            f"{error.filename if inside else folder}: cannot be written: {error.strerror}"
        ) from error


def job() -> str | None:
    """What all attempts of one torchrun job have in common (`--max-restarts`), and no other job:
    its `--rdzv_id`, or where it was not given the launcher's process. None without torchrun.

    The number of the attempt would not do: each machine's launcher counts only failures that it has
    seen itself."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"process {os.getppid()} of {platform.node()}" if name == "none" else name


def begun_by_this_job(folder: Path) -> bool:
    """Whether an earlier attempt of this torchrun job has made the run folder."""
    return job() is not None and _read_object(folder / ENVIRONMENT).get("job") == job()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; numbers that are infinite or NaN as null."""
    with replacing(path) as file:
        file.write(as_json(value))


def _read_object(file: Path) -> dict[str, Any]:
    """A JSON object of ours; nothing where it is missing or damaged."""
    try:
        value = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
