"""Groups of runs: only seeds of one experiment are ever averaged."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from base.config.same_experiment import (
    DATA_DIR,
    FILLED_FROM_DATA,
    IMPORTS,
    NOISE_FILE,
    WHERE_AND_HOW,
)
from base.config.section import lies_in
from base.errors import ConfigError
from base.registry import did_you_mean
from base.run_folder.environment import PROVENANCE
from reports.runs import Run, only_finished

logger = logging.getLogger(__name__)

MOVED = (DATA_DIR, NOISE_FILE)
"""Config keys that name a place. Runs with different places are averaged only if their labels are
equal."""

# A run's settings hold digests of the user's code under `imports`, and these have to be equal.
MAY_DIFFER = ("seed", *(key for key in WHERE_AND_HOW if key != IMPORTS), *FILLED_FROM_DATA)
"""Config keys in which averaged runs may differ. Apart from the seed, they change results by
rounding at most."""

MAY_VARY = ("train_seconds", "images_per_second", *PROVENANCE)
"""Names in `result.json` that may differ between two runs of one config and seed."""


@dataclass(frozen=True)
class Group:
    """Runs of one experiment that differ in their seeds.

    Attributes:
        name: the values of the keys, for legends and table rows.
        keys: dotted config keys; all runs have equal values of them.
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
        if len(self.keys) < 2:
            return "all runs"
        return _name(self.keys[:-1], self.values[:-1], self.runs[0])


def group_runs(runs: Sequence[Run], keys: Sequence[str]) -> list[Group]:
    """Group runs that have equal values of some config keys.

    Groups are sorted by the first key, then by the next one. Numbers are sorted in ascending order;
    words keep the order in which they first appear.

    Args:
        runs: at least one.
        keys: dotted config keys, `variant`, or axes of a study; if empty, all runs are one group.

    Raises:
        ConfigError: a key is unknown, runs of one group differ in more than `MAY_DIFFER` (the
            message names the key and both values), or two different runs of a group have the same
            seed.
    """
    keys = list(dict.fromkeys(keys))
    known = list(dict.fromkeys(key for run in runs for key in (*run.labels, *run.settings)))
    for key in keys:
        if key not in known:
            raise ConfigError(
                f"--group-by {key}: no such key in the runs' configs{_like(key, known)}"
            )
    members: dict[str, list[Run]] = {}
    for run in runs:
        # As JSON, because values may be lists and dicts, which cannot be keys
        values = json.dumps([run.value(key) for key in keys])
        members.setdefault(values, []).append(run)
    groups = [_group(runs, keys) for runs in members.values()]
    words = [
        list(dict.fromkeys(format_setting(group.values[index]) for group in groups))
        for index in range(len(keys))
    ]

    def order(group: Group) -> list[tuple[bool, float]]:
        return [_order(*pair) for pair in zip(group.values, words, strict=True)]

    return sorted(groups, key=order)


def finished_groups(groups: Sequence[Group]) -> list[Group]:
    """Drop unfinished runs, and groups without a finished one; a warning names each dropped run.

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
    """Return the dotted config keys that matter for results and in which two runs differ."""
    keys = dict.fromkeys([*first.settings, *second.settings])
    relevant = [key for key in keys if not lies_in(key, MAY_DIFFER)]
    return [key for key in relevant if first.settings.get(key) != second.settings.get(key)]


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and sample standard deviation over seeds.

    The mean of no value is NaN, and so is the standard deviation of fewer than two.
    """
    mean = np.nan
    std = np.nan
    # A loss may be infinite, and its standard deviation is then NaN
    with np.errstate(invalid="ignore"):
        if len(values) > 0:
            mean = float(np.mean(values))
        if len(values) > 1:
            std = float(np.std(values, ddof=1))
    return mean, std


def format_setting(value: Any) -> str:
    """Format a config value as legends and table rows show it."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        # 12 digits hide the rounding of sums such as 0.1 + 0.2
        return f"{value:.12g}"
    return json.dumps(value)


def _group(runs: Sequence[Run], keys: Sequence[str]) -> Group:
    """Make a group of runs that have equal values of the keys."""
    first = runs[0]
    values = tuple(first.value(key) for key in keys)
    if keys:
        name = _name(keys, values, first)
    else:
        name = " / ".join(dict.fromkeys(run.settings["name"] for run in runs))
    for run in runs[1:]:
        _check_same_experiment(first, run)
    by_seed: dict[int, Run] = {}
    for run in runs:
        other = by_seed.setdefault(run.seed, run)
        if other is run:
            continue
        if run.result is None or _numbers(run) != _numbers(other):
            raise ConfigError(
                f"seed: {run.seed} in both {other.folder} and {run.folder} of {name}; leave one out"
            )
        # A copied run folder must not count as a second seed
        logger.warning(
            "%s: has the same numbers as the run in %s: counted once", run.folder, other.folder
        )
    _check_moved_data([*by_seed.values()])
    return Group(name, tuple(keys), values, tuple(by_seed[seed] for seed in sorted(by_seed)))


def _check_same_experiment(first: Run, second: Run) -> None:
    different = differing_keys(first, second)
    if not different:
        return
    key = different[0]
    more = ""
    if len(different) > 1:
        more = f" (and {len(different) - 1} more)"
    raise ConfigError(
        f"{key}: {format_setting(first.settings.get(key))} in {first.folder}, but"
        f" {format_setting(second.settings.get(key))} in {second.folder}{more}: runs that are"
        f" averaged may differ in their seeds only; add {key} to --group-by, or leave one out"
    )


def _numbers(run: Run) -> tuple[Any, ...]:
    """Return everything that a run measured, except how long it took."""
    result = {name: value for name, value in (run.result or {}).items() if name not in MAY_VARY}
    return result, run.log


def _check_moved_data(runs: Sequence[Run]) -> None:
    """Warn if averaged runs found their data in different places.

    Raises:
        ConfigError: the labels in these places differ.
    """
    first = runs[0]
    for key in MOVED:
        other = next(
            (run for run in runs if run.settings.get(key) != first.settings.get(key)), None
        )
        if other is None:
            continue
        was, now = (format_setting(run.settings.get(key)) for run in (first, other))
        same = all(_same_labels(first, run) for run in runs[1:])
        # A run without a noise file has clean labels, however few images it shares with the others.
        if key == NOISE_FILE and not all(run.settings.get(key) for run in runs):
            same = False
        if not same:
            raise ConfigError(
                f"{key}: {was} in {first.folder}, but {now} in {other.folder}: the labels in these"
                f" two places differ; add {key} to --group-by, or leave one out"
            )
        logger.warning(
            "%s: %s in %s, %s in %s: taken for one data set that was moved",
            key, was, first.folder, now, other.folder,
        )  # fmt: skip


def _same_labels(first: Run, second: Run) -> bool:
    """Whether two runs have equal numbers of images, and equal labels of every image that both
    `labels.npz` hold."""
    if first.result and second.result:
        for name in ("n_train", "n_val", "n_test"):
            if first.result.get(name) != second.result.get(name):
                return False
    # Runs with other seeds may hold out other images, so only common images are compared.
    known = first.labels_of_images()
    others = second.labels_of_images()
    return all(others.get(image, labels) == labels for image, labels in known.items())


def _order(value: Any, words: Sequence[str]) -> tuple[bool, float]:
    """Return the sort key of a value: numbers come first, then words in the order of `words`."""
    if isinstance(value, int | float):
        return False, value
    return True, words.index(format_setting(value))


def _name(keys: Sequence[str], values: Sequence[Any], run: Run) -> str:
    """Name a group by its values.

    A single value stands alone. Otherwise, a study's labels stand alone, and the values of config
    keys follow the end of their key, as in `norm_layer_type=bn`.
    """
    if len(keys) == 1:
        return format_setting(values[0])
    parts = []
    for key, value in zip(keys, values, strict=True):
        text = format_setting(value)
        if key not in run.labels:
            text = f"{_short(key, keys)}={text}"
        parts.append(text)
    return ", ".join(parts)


def _short(key: str, keys: Sequence[str]) -> str:
    """Return the shortest end of a dotted key that no other key ends with."""
    parts = key.split(".")
    for length in range(1, len(parts)):
        if sum(other.split(".")[-length:] == parts[-length:] for other in keys) == 1:
            return ".".join(parts[-length:])
    return key


def _like(key: str, known: Sequence[str]) -> str:
    """Suggest the keys with the same last part, or else the nearest key."""
    last = key.rpartition(".")[2]
    alike = [name for name in known if name.rpartition(".")[2] == last]
    if alike:
        return f"; did you mean {' or '.join(map(repr, alike))}?"
    return did_you_mean(key, known)
