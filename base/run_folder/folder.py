"""Create a run folder for a new run, or open the folder of a run that is continued.

A run folder is `<save_dir>/<name>/<run id>/`, or the folder that `--run_dir` names. All ranks call
`create`, `open` and `write_description`; only rank 0 touches the folder.
"""

import errno
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np

from base.atomic import replacing, sweep
from base.checkpoint import has_checkpoint
from base.config import Config
from base.distributed import from_primary, is_primary
from base.errors import CheckpointError, ConfigError
from base.output import replace_json
from base.run_folder.environment import belongs_to_this_job, record_environment, torchrun_job
from base.run_folder.locks import process_lock
from base.run_folder.names import CONFIG, ENVIRONMENT, LABELS, LOCK

logger = logging.getLogger(__name__)


@contextmanager
def create(save_dir: str, name: str, run_dir: str | None = None) -> Iterator[Path]:
    """Create an empty folder for a new run and lock it; yield its path.

    Files that an earlier attempt of the same torchrun job left in `run_dir` before its first
    checkpoint are overwritten.

    Args:
        save_dir: folder of all runs.
        name: folder in it. The run folder is made there and named after the time.
        run_dir: the run folder itself, instead of `save_dir` and `name`.

    Raises:
        ConfigError: `run_dir` already holds a run, or the folder cannot be created.
    """
    with ExitStack() as stack:
        yield from_primary(lambda: stack.enter_context(_create(save_dir, name, run_dir)))


@contextmanager
def open(folder: Path) -> Iterator[None]:
    """Lock the folder of a run that is continued.

    Raises:
        ConfigError: another process trains in it.
        CheckpointError: the folder cannot be written.
    """
    with ExitStack() as stack:
        from_primary(lambda: stack.enter_context(_locked(folder)))
        yield


def write_description(
    folder: Path, config: Config, labels: Mapping[str, np.ndarray], *, resumed: bool
) -> None:
    """Write `config.json`, `environment.json` and `labels.npz`, which say what the run is."""
    if not is_primary():
        return
    replace_json(folder / CONFIG, config.dump())
    for warning in record_environment(folder, resumed):
        logger.warning(warning)
    with replacing(folder / LABELS) as file:
        np.savez_compressed(file, **labels)


@contextmanager
def _create(save_dir: str, name: str, run_dir: str | None) -> Iterator[Path]:
    folder = Path(run_dir or save_dir)
    given = f"--run_dir {folder}" if run_dir else f"trainer.save_dir: {folder}"
    try:
        # Before `name` is added, in which a tilde is an ordinary character
        folder = folder.expanduser()
        if not run_dir:
            folder = folder / name / datetime.now().strftime("%Y%m%d-%H%M%S-%f")
        folder.mkdir(parents=True, exist_ok=bool(run_dir))
        # An existing folder may be read-only
        with NamedTemporaryFile(dir=folder):
            pass
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, FileExistsError) and Path(error.filename).is_symlink():
            target = Path(error.filename).readlink()
            reason = f"{error.filename} is a link to {target}, where there is no folder"
        raise ConfigError(f"{given}: the run folder cannot be made or written: {reason}") from None
    with _locked(folder):
        if has_checkpoint(folder):
            raise ConfigError(
                f"--run_dir {folder}: already holds a run;"
                f" continue it with -r {folder}, or name another folder"
            )
        if (folder / CONFIG).exists() and not belongs_to_this_job(folder):
            raise ConfigError(
                f"--run_dir {folder}: holds a run without a checkpoint;"
                " remove it, or name another folder"
            )
        job = torchrun_job()
        if job:
            # Written first, because the next attempt finds out here whether the folder is its own
            replace_json(folder / ENVIRONMENT, {"job": job})
        yield folder


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a run folder and remove the temporary files of dead processes from it."""
    with ExitStack() as stack:
        try:
            if not stack.enter_context(process_lock(folder / LOCK)):
                raise ConfigError(f"{folder}: another process trains in this folder")
            sweep(folder)
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be written: {error.strerror}") from None
        with _write_errors_explained(folder):
            yield


@contextmanager
def _write_errors_explained(folder: Path) -> Iterator[None]:
    """Turn a system error about a full disk or an unwritable folder into a `CheckpointError`."""
    try:
        yield
    except OSError as error:
        inside = isinstance(error.filename, str) and Path(error.filename).is_relative_to(folder)
        # write() and fsync() of a full disk raise errors without a file name
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
        if not inside and not is_full:
            raise
        place = error.filename if inside else folder
        raise CheckpointError(f"{place}: cannot be written: {error.strerror}") from error
