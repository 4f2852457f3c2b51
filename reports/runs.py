"""Find and read the run folders that reports are made of."""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import nan
from pathlib import Path
from typing import Any

import numpy as np

from base.config import Config
from base.config.arguments import OpenSection
from base.config.same_experiment import IMPORTS, digests
from base.config.section import Section
from base.config.tree import leaves
from base.errors import ConfigError
from base.registry import did_you_mean
from base.run_folder.names import CONFIG, METRICS, RESULT
from base.run_folder.reader import RunFolder
from base.run_folder.study_index import read_study_index

logger = logging.getLogger(__name__)

LAST_EPOCH = "last_epoch."
REPORT = "eval."
"""Prefixes that distinguish names in `metrics.jsonl` and in reports from those in `result.json`."""

NULL_IF_NOT_MEASURED = ("val_top1", "best_epoch")
"""The names that `result.json` always has. Any other null in it, and in `metrics.jsonl`, was
infinite or NaN; what was not measured has no name there."""

NOT_THE_ATTACK = (
    "seed", "clean_top1", "robust_top1", "robust_top5", "interval", "seconds", "images_per_second",
    "max_perturbation", "reliable", "images_needed", "warnings", "versions", "checks",
    "checked_attack", "curve", "curve_attack", "checkpoint", "weights_digest", "normalization",
    "assumed", "data", "model", "model_args",
)  # fmt: skip
"""The keys of a report that may differ in a column: results, and the model. All others say which
attack was run, in which precision and on which images."""


@dataclass(frozen=True)
class Run:
    """One run folder.

    Attributes:
        folder: as it was found.
        labels: `variant` and the axes of the run's study, with their values for this run; empty if
            no study made it.
        settings: dotted config key -> value, for every key. A null that stands for the value of
            another key is replaced by that value (`adversarial.method` is `"free"` if only
            `trainer.do_adv` asks for it).
        log: the lines of `metrics.jsonl`, one per epoch.
        result: the content of `result.json`; None for an unfinished run.
    """

    folder: Path
    settings: Mapping[str, Any]
    log: Sequence[Mapping[str, Any]]
    result: Mapping[str, Any] | None
    labels: Mapping[str, str] = field(default_factory=dict)

    def value(self, key: str) -> Any:
        """Return the value of a config key, or of an axis of the run's study."""
        return self.settings.get(key, self.labels.get(key))

    @property
    def seed(self) -> int:
        """The seed of everything random."""
        return self.settings["seed"]

    def measured(self, metric: str) -> dict[int, float]:
        """Return epoch -> value of a name in `metrics.jsonl`, without epochs that did not measure
        it; NaN for a value that was not finite."""
        file = self.folder / METRICS
        return {
            log["epoch"]: _number(log[metric], metric, file) for log in self.log if metric in log
        }

    def outcome(self, metric: str) -> float | None:
        """Return a final value of the run; None if it is unfinished or did not measure it, NaN if
        the value was not finite.

        Args:
            metric: a name in `result.json`; `last_epoch.NAME`, a name in the last line of
                `metrics.jsonl`; or `eval.KIND.NAME`, a name in the reports of that kind, averaged
                over the seeds of the attack.
        """
        if metric.startswith(REPORT):
            return self._reported(*metric.removeprefix(REPORT).rpartition(".")[::2])
        if metric.startswith(LAST_EPOCH):
            name = metric.removeprefix(LAST_EPOCH)
            return self.measured(name).get(self.log[-1]["epoch"])
        result = self.result or {}
        if metric not in result or (metric in NULL_IF_NOT_MEASURED and result[metric] is None):
            return None
        return _number(result[metric], metric, self.folder / RESULT)

    def _reported(self, kind: str, name: str) -> float | None:
        """Return the mean of a value over the reports of a kind; None if none of them has it."""
        # Null here: not measured, such as the top 5 by an attack on the top 1
        values = [
            _number(report.values[name], name, report.file)
            for report in self.reports.get(kind, [])
            if report.values.get(name) is not None
        ]
        if not values:
            return None
        return sum(values) / len(values)

    @property
    def noise_rate(self) -> float | None:
        """The fraction of training labels that label noise changed; None if unknown."""
        if not self.settings["trainer.percent"] and self.settings["trainer.noise_file"] is None:
            return 0.0
        recorded = self.outcome("noise_rate")
        if recorded is not None:
            return recorded
        # Runs of older versions have it in `labels.npz` only.
        try:
            noisy, clean = RunFolder(self.folder).labels(["train_label", "train_clean_label"])
        except ConfigError:
            return None
        return float(np.mean(noisy != clean))

    def labels_of_images(self) -> dict[int, tuple[int, ...]]:
        """Return position of an image in the training set -> its labels.

        These are the clean label, and the noisy one if it comes from a noise file. Empty without a
        `labels.npz`.
        """
        files = RunFolder(self.folder)
        if not files.has_labels():
            return {}
        names = ["clean_label"]
        # Drawn noise depends on the seed, so only labels from a file can be compared between runs
        if self.settings.get("trainer.noise_file"):
            names.append("label")
        columns = [
            np.concatenate(files.labels([f"train_{name}", f"val_{name}"]))
            for name in ("index", *names)
        ]
        return {
            int(image): tuple(map(int, labels)) for image, *labels in zip(*columns, strict=True)
        }

    @cached_property
    def reports(self) -> dict[str, list["AttackReport"]]:
        """Kind -> the reports in `eval/` of this kind, which differ only in the attack's seed.

        The kind is the name of the file without the seed.

        Raises:
            ConfigError: a report is broken.
        """
        found: dict[str, list[AttackReport]] = {}
        for file, values in RunFolder(self.folder).evaluations().items():
            kind = re.sub(r"_seed\d+$", "", file.stem)
            found.setdefault(kind, []).append(AttackReport(file, values))
        return found


@dataclass(frozen=True)
class AttackReport:
    """One report on a run's model under attack.

    Attributes:
        file: its path.
        values: its content.
    """

    file: Path
    values: Mapping[str, Any]

    @property
    def attack(self) -> dict[str, Any]:
        """The values that comparable reports have in common: the attack with all its arguments, the
        precision, the images and the name of the model's file."""
        attack = {key: value for key, value in self.values.items() if key not in NOT_THE_ATTACK}
        # The folder may have been moved since
        attack["checkpoint"] = Path(str(self.values.get("checkpoint"))).name
        return attack


def find_runs(paths: Iterable[str | Path]) -> list[Run]:
    """Find the runs at and below the given paths, finished or not, each folder once.

    Run folders below a path that have not logged an epoch yet are left out with a warning. Runs of
    a study are in the order of its grid.

    Raises:
        ConfigError: a path is neither a run folder nor above one, a run folder has no logs, or a
            file in it is broken.
    """
    folders: dict[Path, Path] = {}
    for path in map(Path, paths):
        for folder in _run_folders(path):
            folders.setdefault(folder.resolve(), folder)
    places = {
        parent: read_study_index(parent)
        for parent in dict.fromkeys(folder.resolve().parent for folder in folders.values())
    }
    studies = list(places)
    runs = []
    for real, folder in folders.items():
        run = read_run(folder)
        position = 0
        place = places[real.parent].get(real.name)
        if place is not None:
            run = replace(run, labels={"variant": place.variant, **place.labels})
            position = place.position
        runs.append(((studies.index(real.parent), position), run))
    # Runs without a study keep the order in which they were found: the sort is stable.
    runs.sort(key=lambda pair: pair[0])
    return [run for _, run in runs]


def read_run(folder: Path) -> Run:
    """Read one run folder.

    Raises:
        ConfigError: one of its files is broken, or it has logged no epoch.
    """
    files = RunFolder(folder)
    # Reports do not import a user's code, so they do not know the names that it would register.
    settings = resolved_settings(files.config(check_names=False))
    log = files.metrics()
    if not log:
        raise ConfigError(
            f"{folder}: a run folder without logs: its metrics.jsonl holds no epoch yet"
        )
    return Run(folder, settings, log, files.result())


def resolved_settings(config: Config) -> dict[str, Any]:
    """Return dotted key -> value, for every key of a config; see `Run.settings`."""
    given = leaves(config.model_dump(mode="json"))
    return {
        **given,
        # So that a run that gives an argument differs from one that leaves it out
        **{key: None for key in _open_keys(config) if key not in given},
        IMPORTS: digests(config.dump()[IMPORTS]),
        "adversarial.method": config.adversarial_method,
        "adversarial.epsilon": config.attack_epsilon,
        "adversarial.bn_mode": config.attack_bn_mode,
        "adversarial.validate_every": config.robust_validation_period,
        "adversarial.report": config.reports_robustness,
    }


def _open_keys(section: Section, path: str = "") -> Iterator[str]:
    """Yield the dotted keys of all arguments that parts take; configs omit most of them."""
    if isinstance(section, OpenSection):
        yield from (path + key for key in type(section).known_fields())
    for name in type(section).model_fields:
        below = getattr(section, name)
        if isinstance(below, Section):
            yield from _open_keys(below, f"{path}{name}.")


def only_finished(runs: Sequence[Run]) -> list[Run]:
    """Return the runs that have a `result.json`, and warn of each of the others.

    Raises:
        ConfigError: no run has one.
    """
    finished = [run for run in runs if run.result is not None]
    if not finished:
        raise ConfigError(
            f"{runs[0].folder}: not finished: it has no result.json, and none of the {len(runs)}"
            " runs has one"
        )
    for run in runs:
        if run.result is None:
            logger.warning(
                "%s: not finished after epoch %d: its results are left out",
                run.folder,
                run.log[-1]["epoch"],
            )
    return finished


def check_known(flag: str, names: Iterable[str], known: Iterable[str], what: str) -> None:
    """Check that all names are known.

    Args:
        flag: the beginning of the message.
        names: names that a user gave.
        known: the valid ones, which the message lists.
        what: why a name is wrong, such as `"no run logs it"`.

    Raises:
        ConfigError: a name is unknown.
    """
    known = list(dict.fromkeys(known))
    for name in names:
        if name not in known:
            listed = ", ".join(known) or "none"
            hint = did_you_mean(name, known)
            raise ConfigError(f"{flag} {name}: {what}; there are: {listed}{hint}")


def _run_folders(path: Path) -> list[Path]:
    """Return the run folders with logs at or below a path."""
    if not path.exists():
        raise ConfigError(f"{path}: no such folder")
    if not path.is_dir():
        raise ConfigError(f"{path}: a file, not a run folder")
    if RunFolder(path).has_metrics() and (path / CONFIG).is_file():
        return [path]
    candidates = sorted(file.parent for file in path.rglob(CONFIG))
    found = [folder for folder in candidates if RunFolder(folder).has_metrics()]
    empty = [folder for folder in candidates if folder not in found]
    if not candidates:
        raise ConfigError(
            f"{path}: no run folder (one with config.json and metrics.jsonl) here or below"
        )
    if not found:
        raise ConfigError(
            f"{empty[0]}: a run folder without logs: it has a config.json, but no epoch in a"
            " metrics.jsonl"
        )
    for folder in empty:
        logger.warning("%s: has a config.json, but no epoch in a metrics.jsonl: left out", folder)
    return found


def _number(value: Any, name: str, file: Path) -> float:
    """Return a value of a file of the run; its writer turns what is not finite into null."""
    if value is None:
        return nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{file}: {name}: {value!r} is not a number")
    return float(value)
