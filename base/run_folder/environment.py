"""The versions, the code and the machine that a run was made with."""

import os
import platform
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from base.config import Config
from base.config.same_experiment import config_hash
from base.device import cuda_unavailable, nvidia_driver
from base.distributed import world_size
from base.output import replace_json
from base.rooms import ROOT
from base.run_folder.names import ENVIRONMENT
from base.run_folder.reader import RunFolder
from base.secrets import command_without_key

PROJECT = "convnorm-trainer"
PROVENANCE = ("version", "commit", "versions", "config_hash")
"""The keys of `result.json` that `provenance` fills."""
PACKAGES = ("torch", "torchvision", "numpy", "scikit-learn", "pydantic")


def record_environment(folder: Path, resumed: bool) -> list[str]:
    """Write `environment.json`.

    A resumed run keeps its first entry and appends the present environment under `resumed`.

    Returns:
        Warnings: the run had another number of threads or processes before, which changes rounding.
    """
    file = folder / ENVIRONMENT
    now = environment()
    first = RunFolder(folder).environment() if resumed else {}
    if not first:
        replace_json(file, now)
        return []
    resumes = first.get("resumed")
    if not isinstance(resumes, list):
        resumes = []
    before = first
    if resumes and isinstance(resumes[-1], dict):
        before = resumes[-1]
    replace_json(file, {**first, "resumed": [*resumes, now]})
    return [
        f"resumed with {now[key]} {what}, but the run had {before[key]}:"
        " from here on results may differ by rounding"
        for key, what in (("cpu_threads", "CPU threads"), ("processes", "processes"))
        if before.get(key, now[key]) != now[key]
    ]


def environment() -> dict[str, Any]:
    """Return the versions, command, commit and hardware of this process, without secrets."""
    unavailable = cuda_unavailable()
    # Cards whose driver does not work are counted, too, but tell nothing of themselves.
    cards = torch.cuda.device_count() if unavailable is None else 0
    return {
        "version": project_version(),
        "python": platform.python_version(),
        "packages": package_versions(),
        "command": command_without_key(sys.argv),
        "job": torchrun_job(),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_files": _git("status", "--porcelain", "--untracked-files=no"),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "processes": world_size(),
        "gpus": [_gpu(index) for index in range(cards)],
        "cuda": {
            "driver": nvidia_driver(),
            "version": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
            "nccl": _nccl(),
            "unavailable": unavailable,
        },
    }


def _nccl() -> str | None:
    if not torch.distributed.is_nccl_available():
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }


def torchrun_job() -> str | None:
    """Return an identifier that all attempts of one torchrun job share (see `--max-restarts`).

    It is the job's `--rdzv_id`, or the launcher's process if none was given. None without torchrun.
    """
    # TORCHELASTIC_RESTART_COUNT does not tell attempts apart: the launcher of each machine counts
    # only the failures that it has seen itself
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name == "none":
        return f"process {os.getppid()} of {platform.node()}"
    return name


def belongs_to_this_job(folder: Path) -> bool:
    """Return whether an earlier attempt of this torchrun job has created the run folder."""
    job = torchrun_job()
    return job is not None and RunFolder(folder).environment().get("job") == job


def provenance(config: Config) -> dict[str, Any]:
    """Return the versions, the commit and the config's hash behind the numbers of `result.json`.

    The commit ends in `-dirty` if tracked files have changed since.
    """
    commit = _git("rev-parse", "HEAD")
    if commit and _git("status", "--porcelain", "--untracked-files=no"):
        commit += "-dirty"
    return {
        "version": project_version(),
        "commit": commit,
        "versions": {"python": platform.python_version(), **package_versions()},
        "config_hash": config_hash(config),
    }


def project_version() -> str | None:
    """Return the version of this clone, or else of the installed package; None if unknown."""
    try:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        if project["name"] == PROJECT:
            return project["version"]
    except (OSError, ValueError, KeyError):
        # This code does not run from a clone
        pass
    try:
        return version(PROJECT)
    except PackageNotFoundError:
        return None


def package_versions() -> dict[str, str]:
    """Return the installed versions of the packages that results depend on."""
    return dict(_versions())


# Only the first answers count: a run goes on with the packages and the code that it started with,
# even if others are installed or committed meanwhile.
@cache
def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


@cache
def _git(*arguments: str) -> str | None:
    """Return a git command's output in this project's folder; None without a repository."""
    try:
        result = subprocess.run(  # noqa: S603 - fixed program and arguments
            ["git", *arguments],  # noqa: S607
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if result.returncode != 0:
        return None
    return result.stdout.strip()


def _cpu_name() -> str:
    # platform.processor() is empty on most Linux distributions
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
