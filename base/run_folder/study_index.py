"""`study.json`, beside the run folders of a study: which variant each of them is. Studies write it,
reports read it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from base.atomic import replacing
from base.output import as_json
from base.run_folder.names import STUDY_INDEX


@dataclass(frozen=True)
class Place:
    """Where a run stands in its study.

    Attributes:
        variant: name of its variant.
        position: place of that variant in the grid.
        labels: axis of the grid -> the variant's label on it.
    """

    variant: str
    position: int
    labels: Mapping[str, str] = field(default_factory=dict)


def write_places(folder: Path, places: Mapping[str, Place]) -> None:
    """Add `name of a run folder -> place` to the study file of `folder`, which is replaced in one
    go."""
    entries = {name: asdict(place) for name, place in {**read_places(folder), **places}.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / STUDY_INDEX) as file:
        file.write(as_json(entries))


def read_places(folder: Path) -> dict[str, Place]:
    """Name of a run folder -> its place; nothing where there is no study file, or one that cannot
    be read."""
    try:
        entries = json.loads((folder / STUDY_INDEX).read_text())
        return {name: Place(**entry) for name, entry in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
