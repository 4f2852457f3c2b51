"""Runs in groups, so that only seeds of one experiment are ever averaged."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from base.checkpoint.resume import DATA_DIR, FILLED_FROM_DATA, IMPORTS, NOISE_FILE, WHERE_AND_HOW
from base.config.section import lies_in
from base.errors import ConfigError
from base.registry import did_you_mean
from base.run_folder.environment import PROVENANCE
from reports.runs import Run, only_finished

logger = logging.getLogger(__name__)

MOVED = (DATA_DIR, NOISE_FILE)
MAY_DIFFER = (
    "seed",
    *(key for key in WHERE_AND_HOW if key != IMPORTS),
    *FILLED_FROM_DATA,
)
"""Config keys in which runs that are averaged may differ: none of them changes results, but for the
seed and for rounding. Where one of `MOVED` differs, labels are compared. A run's settings hold
digests of the user's code, which have to be equal."""
MAY_VARY = ("train_seconds", "images_per_second", *PROVENANCE)
"""What two runs of one config and seed may have different values of in `result.json`."""


@dataclass(frozen=True)
class Group:
    """Runs of one experiment that differ in their seeds.

    Attributes:
        name: the values of the keys, for legends and table rows.
        keys: dotted config keys that all of them have equal values of.
        values: in the order of the keys.
        runs: in the order of their seeds.
    """

    name: str
    keys: tuple[str, ...]
    values: tuple[Any, ...]
    runs: tuple[Run, ...]

    @property
    def line(self) -> str:
        """The name without the last key, whose values are the points of a line."""
        return (
            _name(self.keys[:-1], self.values[:-1], self.runs[0]) if self.keys[1:] else "all runs"
        )


def group_runs(runs: Sequence[Run], keys: Sequence[str]) -> list[Group]:
    """Runs in groups of equal values of some config keys, by the first key, then the next: numbers
    ascend, words as they come.

    Args:
        runs: at least one.
        keys: dotted config keys, `variant`, or axes of a study; without any, all runs are one
            group.

    Raises:
        ConfigError: an unknown key; runs of one group that differ in more than the seed and
            `MAY_DIFFER`, with the key and both values; or two runs of one seed in a group.
    """
    keys = list(dict.fromkeys(keys))
    known = list(dict.fromkeys(key for run in runs for key in (*run.labels, *run.settings)))
    for key in keys:
        if key not in known:
            raise ConfigError(
                f"--group-by {key}: no such key in the runs' configs{_like(key, known)}"
            )
    together: dict[str, list[Run]] = {}
    for run in runs:
        together.setdefault(json.dumps([run.value(key) for key in keys]), []).append(run)
    groups = [_group(members, keys) for members in together.values()]
    places = [
        list(dict.fromkeys(as_text(group.values[index]) for group in groups))
        for index in range(len(keys))
    ]
    return sorted(
        groups, key=lambda group: [_place(*each) for each in zip(group.values, places, strict=True)]
    )


def finished_groups(groups: Sequence[Group]) -> list[Group]:
    """The groups with their finished runs only, and without those that have none; a warning names
    each run that is left out.

    Raises:
        ConfigError: no run is finished.
    """
    only_finished([run for group in groups for run in group.runs])
    kept = [
        replace(group, runs=tuple(run for run in group.runs if run.result is not None))
        for group in groups
    ]
    return [group for group in kept if group.runs]


def differing_keys(first: Run, second: Run) -> list[str]:
    """Dotted config keys that matter for results and in which two runs differ."""
    keys = dict.fromkeys([*first.settings, *second.settings])
    relevant = [key for key in keys if not lies_in(key, MAY_DIFFER)]
    return [key for key in relevant if first.settings.get(key) != second.settings.get(key)]


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation over seeds; NaN of none, and for the second of fewer than
    two."""
    with np.errstate(invalid="ignore"):  # a loss may be infinite
        mean = np.mean(values) if len(values) else np.nan
        return float(mean), float(np.std(values, ddof=1)) if len(values) > 1 else np.nan


def as_text(value: Any) -> str:
    """A config value as legends and table rows show it."""
    if isinstance(value, float):
        return f"{value:.12g}"
    return value if isinstance(value, str) else json.dumps(value)


def _group(runs: Sequence[Run], keys: Sequence[str]) -> Group:
    """One group of runs that have equal values of the keys."""
    first = runs[0]
    values = tuple(first.value(key) for key in keys)
    name = (
        _name(keys, values, first)
        if keys
        else " / ".join(dict.fromkeys(run.settings["name"] for run in runs))
    )
    for run in runs[1:]:
        different = differing_keys(first, run)
        if different:
            key, more = different[0], f" (and {len(different) - 1} more)" if different[1:] else ""
            was, now = (as_text(one.settings.get(key)) for one in (first, run))
            raise ConfigError(
                f"{key}: {was} in {first.folder}, but {now} in {run.folder}{more}: runs that are averaged may differ in their"
                f" seeds only; add {key} to --group-by, or leave one out"
            )
    by_seed: dict[int, Run] = {}
    for run in runs:
        other = by_seed.setdefault(run.seed, run)
        if other is run:
            continue
        if run.result is None or _numbers(run) != _numbers(other):
            raise ConfigError(
                f"seed: {run.seed} in both {other.folder} and {run.folder} of {name}; leave one out"
            )
        logger.warning(
            "%s: has the numbers of the run in %s: counted once", run.folder, other.folder
        )
    _check_moved_data([*by_seed.values()])
    return Group(name, tuple(keys), values, tuple(by_seed[seed] for seed in sorted(by_seed)))


def _numbers(run: Run) -> tuple[Any, ...]:
    """Everything that a run measured, but for how long it took."""
    result = {name: value for name, value in (run.result or {}).items() if name not in MAY_VARY}
    return result, run.log


def _check_moved_data(runs: Sequence[Run]) -> None:
    """Warn where runs that are averaged found their data in different places, and refuse them where
    that holds other labels."""
    first = runs[0]
    for key in MOVED:
        other = next(
            (run for run in runs if run.settings.get(key) != first.settings.get(key)), None
        )
        if other is None:
            continue
        was, now = (as_text(run.settings.get(key)) for run in (first, other))
        without = key == NOISE_FILE and not all(run.settings.get(key) for run in runs)
        if without or not all(_same_labels(first, run) for run in runs[1:]):
            raise ConfigError(
                f"{key}: {was} in {first.folder}, but {now} in {other.folder}: not the same labels"
                f" in the two places; add {key} to --group-by, or leave one out"
            )
        logger.warning(
            "%s: %s in %s, %s in %s: taken for one data set that has moved",
            key, was, first.folder, now, other.folder,
        )  # fmt: skip


def _same_labels(first: Run, second: Run) -> bool:
    """Whether two runs have equal numbers of images, and equal labels where `labels.npz` of both
    knows an image."""
    counts = ("n_train", "n_val", "n_test")
    if (
        first.result
        and second.result
        and any(first.result.get(name) != second.result.get(name) for name in counts)
    ):
        return False
    known = [run.labels_of_images() for run in (first, second)]
    return all(known[1].get(image, labels) == labels for image, labels in known[0].items())


def _place(value: Any, words: Sequence[str]) -> tuple[bool, float]:
    """Where a value of a key stands: numbers first, in ascending order, then words, in the order in
    which they came."""
    number = isinstance(value, int | float)
    return not number, value if number else words.index(as_text(value))


def _name(keys: Sequence[str], values: Sequence[Any], run: Run) -> str:
    """The value of a single key; of several, a study's labels as they are and `last part of the
    key=value` of config keys, with more parts where the last are the same."""
    if len(keys) == 1:
        return as_text(values[0])
    pairs = zip(keys, values, strict=True)
    return ", ".join(
        as_text(value) if key in run.labels else f"{_short(key, keys)}={as_text(value)}"
        for key, value in pairs
    )


def _short(key: str, keys: Sequence[str]) -> str:
    parts = key.split(".")
    for length in range(1, len(parts)):
        if sum(other.split(".")[-length:] == parts[-length:] for other in keys) == 1:
            return ".".join(parts[-length:])
    return key


def _like(key: str, known: Sequence[str]) -> str:
    """The keys that end alike, or else the nearest one."""
    last = key.rpartition(".")[2]
    alike = [name for name in known if name.rpartition(".")[2] == last]
    return f"; did you mean {' or '.join(map(repr, alike))}?" if alike else did_you_mean(key, known)
