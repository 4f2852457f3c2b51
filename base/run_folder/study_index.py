"""`study.json`, beside the run folders of a study: which variant each run is.

Studies write it and reports read it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from base.run_folder.files import write_json
from base.run_folder.names import STUDY_INDEX


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
    """Add entries (run folder's name -> entry) to the study index in `folder`, atomically."""
    merged = {**read_study_index(folder), **entries}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / STUDY_INDEX, {name: asdict(entry) for name, entry in merged.items()})


def read_study_index(folder: Path) -> dict[str, StudyEntry]:
    """Return run folder's name -> entry; empty if `folder` has no readable study index."""
    # Reports work without an index, so a damaged one is not worth an error
    try:
        entries = json.loads((folder / STUDY_INDEX).read_text())
        return {name: StudyEntry(**entry) for name, entry in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
