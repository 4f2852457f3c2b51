"""What a run says about the versions, the code and the machine it ran with."""

import platform
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from base.checkpoint.resume import config_hash
from base.config import Config
from base.distributed import world_size
from base.rooms import ROOT
from base.run_folder.folder import _read_object, job, write_json
from base.run_folder.names import ENVIRONMENT
from base.secrets import command_without_key

PROJECT = "convnorm-trainer"
PROVENANCE = ("version", "commit", "versions", "config_hash")
"""What `result.json` says about how its numbers came about."""
PACKAGES = ("torch", "torchvision", "numpy", "scikit-learn", "pydantic")


def record_environment(folder: Path, resumed: bool) -> list[str]:
    """Write `environment.json`; a resumed run keeps what it began with and adds what it goes on
    with under `resumed`.

    Returns:
        What there is to warn of: the run had another number of threads or processes before, which
            round otherwise.
    """
    file = folder / ENVIRONMENT
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


def environment() -> dict[str, Any]:
    """Versions, command, commit and hardware of this process, for `environment.json`; secrets of
    the command are left out."""
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
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
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


@cache
def _git(*arguments: str) -> str | None:
    """The output of a git command in this project's folder; None without git or outside a
    repository.

    Each command is run once: what is committed while a run lasts is not what it has computed with.
    """
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
    return result.stdout.strip() if result.returncode == 0 else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
