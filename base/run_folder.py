"""The run folder: where one run writes, and what it says about itself.

`<save_dir>/<name>/<run id>/`, or exactly the folder that `--run_dir` names.
"""

import errno
import json
import logging
import os
import platform
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch

from base.atomic import replacing, sweep
from base.checkpoint.checkpoint import has_checkpoint
from base.checkpoint.resume import config_hash
from base.config.config import Config
from base.distributed.process_group import world_size
from base.errors import CheckpointError, ConfigError, ProjectError
from base.locks import locked
from base.output import as_json
from base.secrets import command_without_key
from base.text import LineFormatter

PROJECT = "convnorm-trainer"
PROVENANCE = ("version", "commit", "versions", "config_hash")
"""What `result.json` says about how its numbers came about."""
PACKAGES = ("torch", "torchvision", "numpy", "scikit-learn", "pydantic")
LOCK = ".lock"
"""The file that a run holds locked as long as it writes into its folder; it stays."""


@contextmanager
def new_run_folder(save_dir: str, name: str, run_dir: str | None = None) -> Iterator[Path]:
    """Make an empty folder for a new run, yield it, and keep all other runs out of it meanwhile. What an earlier attempt of the
    same job has left in `run_dir` before its first checkpoint is written over.

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
            raise ConfigError(f"--run_dir {folder}: already holds a run; continue it with -r {folder}, or name another folder")
        if (folder / "config.json").exists() and not begun_by_this_job(folder):
            raise ConfigError(f"--run_dir {folder}: holds a run without a checkpoint; remove it, or name another folder")
        if job():
            write_json(folder / "environment.json", {"job": job()})  # before anything else, as the next attempt asks for it
        yield folder


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Keep all other runs out of `folder` meanwhile, as far as its file system knows locks, and clear away what dead ones have
    left half written in it.

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
    """Turn what the system says about a full disk or a folder that is gone or may not be written into one line.

    Raises:
        CheckpointError: naming the folder.
    """
    try:
        yield
    except OSError as error:
        inside = isinstance(error.filename, str) and Path(error.filename).is_relative_to(folder)
        if not inside and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        raise CheckpointError(f"{error.filename if inside else folder}: cannot be written: {error.strerror}") from error


def job() -> str | None:
    """What all attempts of one torchrun job have in common (`--max-restarts`), and no other job: its `--rdzv_id`, or where it
    was not given the launcher's process. None without torchrun.

    The number of the attempt would not do: each machine's launcher counts only failures that it has seen itself.
    """
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"process {os.getppid()} of {platform.node()}" if name == "none" else name


def begun_by_this_job(folder: Path) -> bool:
    """Whether an earlier attempt of this torchrun job has made the run folder."""
    return job() is not None and _read_object(folder / "environment.json").get("job") == job()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; numbers that are infinite or NaN as null."""
    with replacing(path) as file:
        file.write(as_json(value))


class _LogFile(logging.FileHandler):
    """A log file that cannot be written ends the run, as every other file of it does."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        raise


@contextmanager
def logging_to(file: Path, verbosity: int) -> Iterator[None]:
    """Send log messages to the terminal and to `file` (appended): warnings at verbosity 0, a line per epoch above it."""
    root = logging.getLogger()
    level = root.level
    log_file = _LogFile(file, encoding="utf-8")
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout), log_file]
    handlers[0].setFormatter(LineFormatter())
    handlers[1].setFormatter(LineFormatter("%(asctime)s %(levelname)s %(message)s"))
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(logging.INFO if verbosity > 0 else logging.WARNING)
    try:
        yield
    except ProjectError as error:  # the terminal gets it from the script, as its last line
        handlers[1].handle(logging.makeLogRecord({"levelname": "ERROR", "levelno": logging.ERROR, "msg": str(error)}))
        raise
    finally:
        root.setLevel(level)
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()


def record_environment(folder: Path, resumed: bool) -> list[str]:
    """Write `environment.json`; a resumed run keeps what it began with and adds what it goes on with under `resumed`.

    Returns:
        What there is to warn of: the run had another number of threads or processes before, which round otherwise.
    """
    file = folder / "environment.json"
    now = environment()
    first = _read_object(file) if resumed else {}
    if not first:
        write_json(file, now)
        return []
    resumes = first.get("resumed")
    resumes = resumes if isinstance(resumes, list) else []
    before = resumes[-1] if resumes and isinstance(resumes[-1], dict) else first
    write_json(file, {**first, "resumed": [*resumes, now]})
    return [
        f"resumed with {now[key]} {what}, the run had {before[key]}: from here on results may differ by rounding"
        for key, what in (("cpu_threads", "CPU threads"), ("processes", "processes"))
        if before.get(key, now[key]) != now[key]
    ]


def _read_object(file: Path) -> dict[str, Any]:
    """A JSON object of ours; nothing where it is missing or damaged."""
    try:
        value = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def environment() -> dict[str, Any]:
    """Versions, command, commit and hardware of this process, for `environment.json`; secrets of the command are left out."""
    return {
        "version": project_version(),
        "python": platform.python_version(),
        "packages": package_versions(),
        "command": command_without_key(sys.argv),
        "job": job(),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_files": _git("status", "--porcelain", "--untracked-files=no"),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "processes": world_size(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def provenance(config: Config) -> dict[str, Any]:
    """What `result.json` says about how its numbers came about, `PROVENANCE`: this project's
    version and commit, with `-dirty` where tracked files have changed since, versions of packages,
    and a hash of the config (see `config_hash`)."""
    commit = _git("rev-parse", "HEAD")
    changed = "-dirty" if _git("status", "--porcelain", "--untracked-files=no") else ""
    return {
        "version": project_version(),
        "commit": commit and f"{commit}{changed}",
        "versions": {"python": platform.python_version(), **package_versions()},
        "config_hash": config_hash(config),
    }


def project_version() -> str | None:
    """The version of this project: that of its clone, or else the installed one; None where neither
    is known."""
    try:
        project = tomllib.loads(
            (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
        )["project"]
        if project["name"] == PROJECT:
            return project["version"]
    except (OSError, ValueError, KeyError):
        # it does not run from a clone
        pass
    try:
        return version(PROJECT)
    except PackageNotFoundError:
        return None


def package_versions() -> dict[str, str]:
    """The installed versions of the packages that results depend on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def describe(values: Mapping[str, Any]) -> str:
    """One readable line of logged values: accuracies in per cent, the rest in four significant digits."""
    return "  ".join(f"{key} {_number(key, value)}" for key, value in values.items())


def _number(key: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2%}" if "top" in key else f"{value:.4g}"
    return str(value)


@cache
def _git(*arguments: str) -> str | None:
    """The output of a git command in this project's folder; None without git or outside a repository.

    Each command is run once: what is committed while a run lasts is not what it has computed with.
    """
    try:
        result = subprocess.run(  # noqa: S603 - fixed program and arguments
            ["git", *arguments],  # noqa: S607
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
