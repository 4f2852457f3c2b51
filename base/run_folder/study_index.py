"""`study.json`, beside the run folders of a study: which variant each run is.

Studies write it and reports read it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from base.errors import ConfigError
from base.output import replace_json
from base.run_folder.locks import lock_descriptor
from base.run_folder.names import STUDY_INDEX, STUDY_LOCK
from base.text import first_line


@dataclass(frozen=True)
class StudyEntry:
    """The place of a run in its study.

    Attributes:
        variant: name of its variant.
        position: position of that variant in the grid, from 0.
        labels: the variant's label on each axis of the grid.
    """

    variant: str
    position: int
    labels: Mapping[str, str] = field(default_factory=dict)


def write_study_index(folder: Path, entries: Mapping[str, StudyEntry]) -> None:
    """Add entries (run folder's name -> entry) to the study index in `folder`, atomically.

    Processes that add entries at the same time wait for one another. A file that has them all is
    left alone.

    Raises:
        OSError: the folder cannot be written, or the index cannot be read.
        ConfigError: the index is damaged; its entries are not overwritten.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / STUDY_INDEX
    with (folder / STUDY_LOCK).open("a") as lock:
        lock_descriptor(lock.fileno(), wait=True)
        try:
            known = _read(file) if file.exists() else {}
        except ValueError as error:
            raise ConfigError(
                f"{file}: is not a study index ({first_line(error)}); repair or remove it"
            ) from None
        merged = {**known, **entries}
        if merged != known:
            replace_json(file, {name: asdict(entry) for name, entry in merged.items()})


def read_study_index(folder: Path) -> dict[str, StudyEntry]:
    """Return run folder's name -> entry; empty if `folder` has no readable study index."""
    # Reports work without an index, so a damaged one is not worth an error
    try:
        return _read(folder / STUDY_INDEX)
    except (OSError, ValueError):
        return {}


def _read(file: Path) -> dict[str, StudyEntry]:
    entries = json.loads(file.read_text())
    if not isinstance(entries, dict):
        raise ValueError("not an object")
    return {name: _entry(name, values) for name, values in entries.items()}


def _entry(name: str, values: Any) -> StudyEntry:
    match values:
        case {"variant": str(variant), "position": int(position), "labels": dict(labels)}:
            if all(isinstance(label, str) for label in labels.values()):
                return StudyEntry(variant, position, labels)
    raise ValueError(f"{name}: not a variant with its position and labels")
