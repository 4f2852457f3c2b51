"""The check, before the first step, that all processes work on the same config, code and data."""

import hashlib
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from base.base_data_loader import BaseDataLoader
from base.config import Config
from base.config.same_experiment import IMPORTS, WHERE_AND_HOW, digests
from base.config.section import lies_in
from base.config.tree import leaves
from base.distributed.collectives import all_gather_object, exit_unless_primary
from base.distributed.process_group import world_size
from base.errors import ConfigError, DataError, ProjectError
from base.rooms import ROOT
from base.run_folder.environment import package_versions, project_version
from base.text import one_line

T = TypeVar("T")

Facts = Mapping[str, tuple[type[ProjectError], Any]]
"""What all processes must have in common -> the error for a difference, and a plain value to
compare. Only the first difference is reported, so causes come before their effects."""

ROUNDED_ALIKE = ("system.device", "system.compile", "system.channels_last", "system.deterministic")
"""Config keys that only change how results are rounded. All processes of a job share them."""

MAY_DIFFER = tuple(key for key in WHERE_AND_HOW if key not in ROUNDED_ALIKE)
"""Config keys that say where a machine has its files, or that only rank 0 uses."""

LONGEST = 60
"""Characters of a value in a message."""


def prepare_on_all_ranks(prepare: Callable[[], T], facts: Callable[[T], Facts]) -> T:
    """Return `prepare()`, after checking that its `facts` are the same on all ranks.

    Raises:
        ProjectError: the facts differ, or `prepare` raised an error on any rank. Rank 0 raises it,
            and the other ranks end silently with the same exit code.
    """
    if world_size() == 1:
        return prepare()
    failure = None
    failed = None
    own_facts: dict[str, tuple[type[ProjectError], Any]] = {}
    try:
        prepared = prepare()
        own_facts = dict(facts(prepared))
    except ProjectError as error:
        failure = error
        failed = (type(error), str(error))
    # One message for failures and facts: a rank that failed would not reach a second one.
    gathered = all_gather_object((failed, own_facts))
    for number, (failed, _) in enumerate(gathered):
        if failed is None:
            continue
        kind, message = failed
        exit_unless_primary(kind.exit_code)
        if failure is not None:
            raise failure
        raise kind(f"rank {number}: {message}")
    difference = first_difference([facts_of_rank for _, facts_of_rank in gathered])
    if difference is not None:
        exit_unless_primary(difference.exit_code)
        raise difference
    return prepared


def first_difference(facts: Sequence[Facts]) -> ProjectError | None:
    """Return the error for the first fact in which a rank differs from rank 0, or None.

    Args:
        facts: of every rank, in their order.
    """
    for name, (error, expected) in facts[0].items():
        values = [facts_of_rank.get(name, (error, None))[1] for facts_of_rank in facts]
        others = [number for number, value in enumerate(values) if value != expected]
        if not others:
            continue
        first = others[0]
        ranks = "rank" if len(others) == 1 else "ranks"
        ranks = f"{ranks} {', '.join(map(str, others))}"
        different = _describe_difference(name, values[first], expected, first)
        return error(f"{ranks} and rank 0 have different {different}")
    return None


def config_facts(config: Config) -> Facts:
    """Return the config, without the keys that may differ, and the code that it runs with."""
    tree = leaves(config.dump())
    compared = {key: value for key, value in tree.items() if not lies_in(key, MAY_DIFFER)}
    return {
        # The user's code decides what the names in a config mean, so it comes first.
        "your own code (imports)": (ConfigError, digests(tree.get(IMPORTS, []))),
        "config": (ConfigError, compared),
        "code": (ConfigError, code_digest()),
        "versions": (ConfigError, {"python": platform.python_version(), **package_versions()}),
    }


def data_facts(**parts: BaseDataLoader | None) -> Facts:
    """Return classes, counts, labels, pixels, mean and std of each part of a data set.

    Parts that are None are left out.
    """
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
    """Return the SHA-256 of this project's code, without tests: the files at its root and those of
    its packages. If the project is installed, return its version instead."""
    if not (ROOT / "pyproject.toml").is_file():
        # In site-packages, the modules of other projects are beside ours.
        return f"version {project_version()}"
    files = sorted(ROOT.glob("*.py"))
    for folder in sorted(ROOT.iterdir()):
        if (folder / "__init__.py").is_file() and folder.name != "tests":
            files += sorted(folder.rglob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(ROOT).as_posix()}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def _describe_difference(name: str, value: Any, expected: Any, number: int) -> str:
    """Describe the difference between rank `number` and rank 0, with both values if a person can
    read them."""
    if isinstance(expected, str):
        # A digest.
        return name
    if isinstance(expected, Mapping) and isinstance(value, Mapping):
        keys = sorted(expected.keys() | value.keys())
        key = next(key for key in keys if expected.get(key) != value.get(key))
        name = f"{name}: {key} is"
        value = value.get(key)
        expected = expected.get(key)
    else:
        name = f"{name}:"
    return f"{name} {_shorten(value)} on rank {number} and {_shorten(expected)} on rank 0"


def _shorten(value: Any) -> str:
    return one_line(repr(value), LONGEST)
