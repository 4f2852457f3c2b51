"""What several processes make sure of before their first step: that they work on the same thing."""

import hashlib
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from base.base_data_loader import BaseDataLoader
from base.checkpoint.resume import IMPORTS, WHERE_AND_HOW, digests
from base.config import Config
from base.config.section import lies_in
from base.distributed.collectives import all_gather_object, exit_unless_primary
from base.distributed.process_group import world_size
from base.errors import CheckpointError, ConfigError, DataError, NonFiniteError, ProjectError
from base.rooms import ROOT
from base.run_folder.environment import package_versions, project_version
from base.text import one_line

T = TypeVar("T")
Facts = Mapping[str, tuple[type[ProjectError], Any]]
"""What has to be alike -> the error that a difference is, and a plain value to compare. The first
difference is told, so what explains others comes first."""

ROUNDED_ALIKE = ("system.device", "system.compile", "system.channels_last", "system.deterministic")
"""Config keys that change no result but for rounding, which processes of one job share."""
MAY_DIFFER = tuple(key for key in WHERE_AND_HOW if key not in ROUNDED_ALIKE)
"""Config keys that say where a machine has its files, or what only rank 0 asks for."""
LONGEST = 60
"""Characters of a value that is shown."""


def agreed(prepare: Callable[[], T], facts: Callable[[T], Facts]) -> T:
    """What `prepare` returns, when all processes have prepared the same, which they tell each other
    in one gather.

    Raises:
        ProjectError: what they have prepared differs, or `prepare` has raised it on any of them.
            Rank 0 says so, the others leave with the same exit code.
    """
    if world_size() == 1:
        return prepare()
    failure, own = None, {}
    try:
        prepared = prepare()
        own = dict(facts(prepared))
    except ProjectError as error:
        failure = error
    told = all_gather_object((failure and (failure.exit_code, str(failure)), own))
    failures = [(number, failed) for number, (failed, _) in enumerate(told) if failed]
    if failures:
        number, (code, message) = failures[0]
        exit_unless_primary(code)
        raise failure or _error_of(code)(f"rank {number}: {message}")
    difference = first_difference([facts_of_rank for _, facts_of_rank in told])
    if difference is not None:
        exit_unless_primary(difference.exit_code)
        raise difference
    return prepared


def first_difference(told: Sequence[Facts]) -> ProjectError | None:
    """The error that the first fact in which a process differs from rank 0 amounts to; None where
    there is none. `told` has one entry per rank."""
    for name, (error, ours) in told[0].items():
        others = [
            number for number, facts in enumerate(told) if facts.get(name, (error, None))[1] != ours
        ]
        if others:
            theirs = told[others[0]].get(name, (error, None))[1]
            ranks = f"rank{'s' * (len(others) > 1)} {', '.join(map(str, others))}"
            return error(
                f"{ranks} and rank 0 have different {_described(name, theirs, ours, others[0])}"
            )
    return None


def config_facts(config: Config) -> Facts:
    """The config, but for what may differ, and the code that is run with it."""
    tree = dict(_leaves(config.dump()))
    compared = {key: value for key, value in tree.items() if not lies_in(key, MAY_DIFFER)}
    return {
        # what the names in a config mean depends on the user's code
        "your own code (imports)": (ConfigError, digests(tree.get(IMPORTS, []))),
        "config": (ConfigError, compared),
        "code": (ConfigError, code_digest()),
        "versions": (ConfigError, {"python": platform.python_version(), **package_versions()}),
    }


def data_facts(**parts: BaseDataLoader | None) -> Facts:
    """Classes, number, labels, pixels and normalization of each part of a data set that is
    there."""
    facts: dict[str, tuple[type[ProjectError], Any]] = {}
    for part, loader in parts.items():
        if loader is None:
            continue
        facts |= {
            f"class names of the {part} images": (DataError, list(loader.class_names)),
            f"numbers of {part} images": (DataError, len(loader.labels)),
            f"{part} labels": (DataError, loader.fingerprint()),
            f"{part} images": (DataError, loader.image_digest()),
            f"mean of the {part} images": (DataError, list(loader.mean)),
            f"std of the {part} images": (DataError, list(loader.std)),
        }
    return facts


def code_digest() -> str:
    """SHA-256 of this project's code: the modules at its root and those of its rooms, tests aside.
    Where it is installed, its version: other projects' modules lie beside its own there."""
    if not (ROOT / "pyproject.toml").is_file():
        return f"version {project_version()}"
    rooms = [
        folder
        for folder in sorted(ROOT.iterdir())
        if (folder / "__init__.py").is_file() and folder.name != "tests"
    ]
    digest = hashlib.sha256()
    for file in [
        *sorted(ROOT.glob("*.py")),
        *(file for room in rooms for file in sorted(room.rglob("*.py"))),
    ]:
        digest.update(f"{file.relative_to(ROOT).as_posix()}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def _described(name: str, theirs: Any, ours: Any, number: int) -> str:
    """What differs, with both values where they can be read."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        key = next(
            key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)
        )
        return f"{name}: {key} is {_shown(theirs.get(key))} on rank {number} and {_shown(ours.get(key))} on rank 0"
    is_digest = isinstance(ours, str)
    return (
        name
        if is_digest
        else f"{name}: {_shown(theirs)} on rank {number} and {_shown(ours)} on rank 0"
    )


def _shown(value: Any) -> str:
    return one_line(repr(value), LONGEST)


def _leaves(tree: Mapping[str, Any], path: str = "") -> list[tuple[str, Any]]:
    """Dotted keys and values of a config tree."""
    leaves = []
    for key, value in tree.items():
        leaves += (
            _leaves(value, f"{path}{key}.")
            if isinstance(value, Mapping)
            else [(f"{path}{key}", value)]
        )
    return leaves


def _error_of(exit_code: int) -> type[ProjectError]:
    kinds = (ConfigError, CheckpointError, DataError, NonFiniteError)
    return next((kind for kind in kinds if kind.exit_code == exit_code), ProjectError)
