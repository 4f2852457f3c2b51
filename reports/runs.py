"""Run folders as reports see them: found and read."""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from base.checkpoint.resume import IMPORTS, digests
from base.config import Config
from base.config.arguments import OpenSection
from base.config.section import Section
from base.errors import ConfigError
from base.registry import did_you_mean
from base.run_folder.files import RunFolder
from base.run_folder.names import CONFIG, METRICS, RESULT
from base.run_folder.study_index import read_study_index

logger = logging.getLogger(__name__)

LAST_EPOCH, REPORT = "last_epoch.", "eval."
"""Before names of `metrics.jsonl` and of reports, where they stand beside names of
`result.json`."""
ATTACK = ("attack", "description", "norm", "epsilon", "loss", "step_size", "steps", "restarts", "n")


@dataclass(frozen=True)
class Run:
    """One run folder.

    Attributes:
        folder: as it was found.
        labels: `variant` and the axes of its study, with their values for this run; empty where no
            study made it.
        settings: dotted config key -> value, of every key there is; a null that stands for a value
            of another key is that value (`adversarial.method` is `"free"` where only
            `trainer.do_adv` says so).
        log: the lines of `metrics.jsonl`, one per epoch.
        result: what `result.json` holds; None while the run is not finished.
    """

    folder: Path
    settings: Mapping[str, Any]
    log: Sequence[Mapping[str, Any]]
    result: Mapping[str, Any] | None
    labels: Mapping[str, str] = field(default_factory=dict)

    def value(self, key: str) -> Any:
        """The value of a config key, or the label of a study's axis."""
        return self.settings[key] if key in self.settings else self.labels.get(key)

    @property
    def seed(self) -> int:
        """The seed of everything random."""
        return self.settings["seed"]

    def measured(self, metric: str) -> dict[int, float]:
        """Epoch -> value of a name in `metrics.jsonl`, of the epochs in which it was measured."""
        file = self.folder / METRICS
        return {
            log["epoch"]: _number(log[metric], metric, file)
            for log in self.log
            if log.get(metric) is not None
        }

    def outcome(self, metric: str) -> float | None:
        """What a run came to; None where it is not finished or did not measure it.

        Args:
            metric: a name in `result.json`; `last_epoch.NAME`, a name in the last line of
                `metrics.jsonl`; or `eval.KIND.NAME`, a name in the reports of that kind, the mean
                over their attack seeds.
        """
        if metric.startswith(LAST_EPOCH):
            name, values, file = (
                metric.removeprefix(LAST_EPOCH),
                self.log[-1],
                self.folder / METRICS,
            )
            return None if values.get(name) is None else _number(values[name], name, file)
        if metric.startswith(REPORT):
            kind, _, name = metric.removeprefix(REPORT).rpartition(".")
            reports = [
                report
                for report in self.reports.get(kind, [])
                if report.values.get(name) is not None
            ]
            values = [_number(report.values[name], name, report.file) for report in reports]
            return sum(values) / len(values) if values else None
        value = (self.result or {}).get(metric)
        return None if value is None else _number(value, metric, self.folder / RESULT)

    @property
    def noise_rate(self) -> float | None:
        """The share of training labels that label noise has changed, in `[0, 1]`.

        None where the folder does not say it. It stands in `result.json`; older runs have it in
        their `labels.npz` only.
        """
        if not self.settings["trainer.percent"] and self.settings["trainer.noise_file"] is None:
            return 0.0
        recorded = self.outcome("noise_rate")
        if recorded is not None:
            return recorded
        try:
            noisy, clean = RunFolder(self.folder).labels(["train_label", "train_clean_label"])
        except ConfigError:
            return None
        return float(np.mean(noisy != clean))

    def labels_of_images(self) -> dict[int, tuple[int, ...]]:
        """Position of an image in the training set -> its true label, and behind it the given one
        where that comes from a noise file; nothing where there is no `labels.npz`."""
        files = RunFolder(self.folder)
        if not files.has_labels():
            return {}
        names = ["clean_label", *(["label"] if self.settings.get("trainer.noise_file") else [])]
        columns = [
            np.concatenate(files.labels([f"train_{name}", f"val_{name}"]))
            for name in ("index", *names)
        ]
        return {
            int(image): tuple(map(int, labels)) for image, *labels in zip(*columns, strict=True)
        }

    @cached_property
    def reports(self) -> dict[str, list["AttackReport"]]:
        """Kind -> reports in `eval/`, which differ in the attack's seed only.

        The kind is the name of their files without the seed.

        Raises:
            ConfigError: one of them is broken.
        """
        found: dict[str, list[AttackReport]] = {}
        for file, values in RunFolder(self.folder).evaluations().items():
            found.setdefault(re.sub(r"_seed\d+$", "", file.stem), []).append(
                AttackReport(file, values)
            )
        return found


@dataclass(frozen=True)
class AttackReport:
    """One report on a run's model under attack.

    Attributes:
        file: where it lies.
        values: what it holds.
    """

    file: Path
    values: Mapping[str, Any]

    @property
    def attack(self) -> dict[str, Any]:
        """What has to be equal in reports whose numbers are compared: the attack, the model's name,
        the number of images."""
        return {key: self.values.get(key) for key in ATTACK} | {
            "checkpoint": Path(str(self.values.get("checkpoint"))).name
        }


def find_runs(paths: Iterable[str | Path]) -> list[Run]:
    """The runs at and below the given paths, finished or not, every folder once. Run folders below
    a path that have not logged an epoch yet are left out with a warning. Runs of a study come in
    the order of its grid.

    Raises:
        ConfigError: a path at and below which there is no run, a run folder without logs, or a file
            of it that is broken.
    """
    folders: dict[Path, Path] = {}
    for path in map(Path, paths):
        for folder in _run_folders(path):
            folders.setdefault(folder.resolve(), folder)
    places = {
        parent: read_study_index(parent)
        for parent in dict.fromkeys(folder.resolve().parent for folder in folders.values())
    }
    studies, runs = list(places), []
    for real, folder in folders.items():
        place = places[real.parent].get(real.name)
        labels = {} if place is None else {"variant": place.variant, **place.labels}
        order = (studies.index(real.parent), 0 if place is None else place.position)
        runs.append((order, replace(read_run(folder), labels=labels)))
    return [run for _, run in sorted(runs, key=lambda pair: pair[0])]


def read_run(folder: Path) -> Run:
    """One run folder.

    Raises:
        ConfigError: one of its files is broken, or it has logged no epoch.
    """
    files = RunFolder(folder)
    # the user's own code is not imported, so the names of its parts are not known here
    settings = resolved_settings(files.config(check_names=False))
    log = files.metrics()
    if not log:
        raise ConfigError(
            f"{folder}: a run folder without logs: its metrics.jsonl holds no epoch yet"
        )
    return Run(folder, settings, log, files.result())


def resolved_settings(config: Config) -> dict[str, Any]:
    """Dotted key -> value of every value of a config; see `Run.settings`."""
    given = _flat(config.model_dump(mode="json"))
    return {
        **given,
        **{key: None for key in _open_keys(config) if key not in given},
        IMPORTS: digests(config.dump()[IMPORTS]),
        "adversarial.method": config.adversarial_method,
        "adversarial.epsilon": config.attack_epsilon,
        "adversarial.bn_mode": config.attack_bn_mode,
        "adversarial.validate_every": config.robust_validation_period,
        "adversarial.report": config.reports_robustness,
    }


def _open_keys(section: Section, path: str = "") -> Iterator[str]:
    """The dotted keys of all arguments that parts take, most of which a config leaves out."""
    if isinstance(section, OpenSection):
        yield from (path + key for key in type(section).known_fields())
    for name in type(section).model_fields:
        below = getattr(section, name)
        if isinstance(below, Section):
            yield from _open_keys(below, f"{path}{name}.")


def only_finished(runs: Sequence[Run]) -> list[Run]:
    """The runs that have a `result.json`, with a warning about each of the others.

    Raises:
        ConfigError: there are none.
    """
    finished = [run for run in runs if run.result is not None]
    if not finished:
        raise ConfigError(
            f"{runs[0].folder}: not finished: no result.json, nor in any other of the {len(runs)} runs"
        )
    for run in runs:
        if run.result is None:
            logger.warning(
                "%s: not finished after epoch %d: its results are left out",
                run.folder,
                run.log[-1]["epoch"],
            )
    return finished


def refuse_unknown(flag: str, names: Iterable[str], known: Iterable[str], what: str) -> None:
    """Refuse a name that is not among the known ones, which the error lists.

    Raises:
        ConfigError: `what` is what no run does, such as `"no run logs it"`.
    """
    known = list(dict.fromkeys(known))
    for name in names:
        if name not in known:
            raise ConfigError(
                f"{flag} {name}: {what}; there are: {', '.join(known) or 'none'}{did_you_mean(name, known)}"
            )


def _run_folders(path: Path) -> list[Path]:
    if not path.is_dir():
        raise ConfigError(
            f"{path}: {'a file, not a run folder' if path.exists() else 'no such folder'}"
        )
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
            f"{empty[0]}: a run folder without logs: it has a config.json, but no epoch in a metrics.jsonl"
        )
    for folder in empty:
        logger.warning("%s: has a config.json, but no epoch in a metrics.jsonl: left out", folder)
    return found


def _number(value: Any, name: str, file: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{file}: {name}: {value!r} is not a number")
    return float(value)


def _flat(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Dotted key -> value of every leaf of a tree."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= (
            _flat(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
        )
    return leaves
