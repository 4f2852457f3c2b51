"""Pictures of runs: a metric against the epoch, or its final value against a config key; means and
spreads over seeds."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from base.errors import ConfigError
from base.run_folder.environment import PROVENANCE
from base.text import one_line
from reports.groups import Group, as_text, differing_keys, mean_and_std
from reports.panels import (
    Curve,
    line_and_band,
    line_with_markers,
    panels_figure,
    points_and_bars,
    unit_of,
)
from reports.runs import Run, refuse_unknown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

LOGGED, MEASURED = ("val_top1", "val_robust_top1"), ("test_top1", "test_robust_top1")
"""What curves, and final values, show unless they are told otherwise, of what the runs have."""
AXIS_LABELS = {
    "trainer.percent": "rate of label noise (trainer.percent)",
    "trainer.subset_percent": "fraction of the training set (trainer.subset_percent)",
    "seed": "seed",
}
NOISE_KEY = "trainer.percent"
REALISED_LABEL = "realised rate of label noise (asked for by trainer.percent)"
MOST_BANDS = 6
"""More of them would be one gray area."""
EPSILON_UNITS = {"linf": "1/255 of the pixel range, l-inf", "l2": "units of the pixel range, l2"}


def curves_figure(groups: Sequence[Group], metrics: Sequence[str] | None = None) -> "Figure":
    """Training curves: a panel for every metric, a line and a band for every group.

    The line is the mean over the group's seeds, the band one sample standard deviation to either
    side; a single seed is a line only, and so are all of more than `MOST_BANDS` groups. Epochs in
    which a metric was not measured are skipped, and a line ends where not all seeds of its group go
    on.

    Args:
        groups: of runs, at least one.
        metrics: names in `metrics.jsonl`; robust ones are drawn on the right of the others.
            Accuracies are shown in per cent. None for `LOGGED`.

    Raises:
        ConfigError: a metric that no run logs.
    """
    metrics = _known_metrics([run for group in groups for run in group.runs], metrics)
    lines = {
        metric: [_against_epochs(group, metric) for group in groups]
        for metric in clean_first(metrics)
    }
    spread, each = (
        ("band", line_and_band) if len(groups) <= MOST_BANDS else (None, line_with_markers)
    )
    figure = panels_figure([group.name for group in groups], lines, spread, each)
    for axes in figure.axes:
        axes.set_xlabel("epoch")
        axes.locator_params("x", integer=True)
    return figure


def against_figure(
    cells: Sequence[Group], key: str, metrics: Sequence[str] | None = None
) -> "Figure":
    """Final values against a config key: a panel for every metric, points with error bars.

    A point is the mean over the seeds of a cell, its bar one sample standard deviation to either
    side. Cells that have equal values of all other keys that they are grouped by are joined by a
    line. If more of their configs differs than the key, a warning names it. Points against
    `trainer.percent` stand at the realised rate of label noise, the mean of a cell's runs, where
    all runs have recorded it; the axis says which of the two is shown.

    Args:
        cells: groups of finished runs, the last of whose keys is `key`.
        key: a dotted config key with numbers as its values, such as `trainer.percent`.
        metrics: names in `metrics.jsonl`, whose last measured value is taken, or in `result.json`;
            None for `MEASURED`.

    Raises:
        ConfigError: a metric that no run measured, or a value of the key that is no number.
    """
    runs = [run for cell in cells for run in cell.runs]
    metrics = _known_final_metrics(runs, metrics)
    series: dict[str, list[Group]] = {}
    for cell in cells:
        value = cell.values[-1]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(
                f"--against {key}: {as_text(value)} in {cell.runs[0].folder} is not a number"
            )
        series.setdefault(cell.line, []).append(cell)
    for name, members in series.items():
        _warn_of_other_differences(name, members, key)
    realised = key == NOISE_KEY and all(run.noise_rate is not None for run in runs)
    lines = {
        metric: [_against_key(members, metric, realised) for members in series.values()]
        for metric in clean_first(metrics)
    }
    figure = panels_figure(list(series), lines, spread="error bars", each=points_and_bars)
    for axes in figure.axes:
        label = REALISED_LABEL if realised else one_line(_axis_label(key, runs))
        axes.set_xlabel(label, parse_math=False)
    return figure


def clean_first(metrics: Sequence[str]) -> list[str]:
    """Metrics in the order of their panels: clean ones left, robust ones right."""
    return sorted(dict.fromkeys(metrics), key=lambda metric: "robust" in metric)


def _known_metrics(runs: Sequence[Run], metrics: Sequence[str] | None) -> Sequence[str]:
    """The metrics asked for, all of which epochs log, or those of `LOGGED` that they do."""
    logged = dict.fromkeys(name for run in runs for name in _logged(run))
    metrics = metrics or [name for name in LOGGED if name in logged] or LOGGED
    for metric in metrics:
        if metric not in logged and any(metric in (run.result or {}) for run in runs):
            raise ConfigError(
                f"--metric {metric}: measured once, after training: it goes into a --table or --against a key"
            )
    refuse_unknown("--metric", metrics, logged, "no run logs it")
    return metrics


def _known_final_metrics(runs: Sequence[Run], metrics: Sequence[str] | None) -> Sequence[str]:
    """The metrics asked for, all of which epochs log or `result.json` holds, or those of `MEASURED`
    that are there."""
    known = dict.fromkeys(
        [
            *(name for run in runs for name in _logged(run)),
            *(name for run in runs for name in run.result or {} if name not in PROVENANCE),
        ]
    )
    metrics = metrics or [name for name in MEASURED if name in known] or MEASURED
    refuse_unknown("--metric", metrics, known, "no run measured it")
    return metrics


def _logged(run: Run) -> list[str]:
    return [
        name
        for log in run.log
        for name, value in log.items()
        if name != "epoch" and value is not None
    ]


def _against_epochs(group: Group, metric: str) -> Curve | None:
    """The curve of a group, over the epochs that all its seeds have measured; None where there are
    none."""
    measured = [run.measured(metric) for run in group.runs]
    epochs = sorted(set.intersection(*(set(values) for values in measured)))
    longest = max(measured, key=len)
    if len(epochs) < len(longest):
        shortest = min(group.runs, key=lambda run: len(run.measured(metric)))
        logger.warning(
            "%s: %s is drawn for %d of %d epochs, those that %s measured, too",
            group.name, metric, len(epochs), len(longest), shortest.folder,
        )  # fmt: skip
    return (
        _curve(epochs, [[values[epoch] for values in measured] for epoch in epochs], metric)
        if epochs
        else None
    )


def _against_key(cells: Sequence[Group], metric: str, realised: bool) -> Curve | None:
    """The curve of a line of cells; `realised` puts them at their runs' rates of label noise."""
    points = []
    for cell in cells:
        place = cell.values[-1]
        if realised:
            place = float(np.mean([run.noise_rate for run in cell.runs]))
        values = [value for run in cell.runs if (value := final_value(run, metric)) is not None]
        if values:
            points.append((place, values))
    points.sort(key=lambda point: point[0])
    return _curve(*zip(*points, strict=True), metric) if points else None


def final_value(run: Run, metric: str) -> float | None:
    """The last value of a metric that epochs log, or that of `result.json`; None where a run has
    neither."""
    measured = run.measured(metric)
    return measured[max(measured)] if measured else run.outcome(metric)


def _curve(x: Sequence[float], values: Sequence[Sequence[float]], metric: str) -> Curve:
    factor, _ = unit_of(metric)
    means, stds = np.array([mean_and_std(seeds) for seeds in values]).T
    return Curve(
        np.array(x, float), factor * means, factor * stds, tuple(len(seeds) for seeds in values)
    )


def _warn_of_other_differences(name: str, cells: Sequence[Group], key: str) -> None:
    """A line through points that differ in two things shows neither of them alone."""
    first = cells[0].runs[0]
    differing = {
        other: cell.runs[0]
        for cell in cells[1:]
        for other in differing_keys(first, cell.runs[0])
        if other != key
    }
    for other, run in differing.items():
        values = " and ".join(as_text(one.settings.get(other)) for one in (first, run))
        logger.warning("%s: %s differs along the line, too: %s", name, other, values)


def _axis_label(key: str, runs: Sequence[Run]) -> str:
    if key != "adversarial.epsilon":
        return AXIS_LABELS.get(key, key)
    norms = {run.settings["adversarial.norm"] for run in runs}
    if len(norms) > 1:
        raise ConfigError(
            "--against adversarial.epsilon: l-inf and l2 runs have different units; plot them separately"
        )
    return f"epsilon of training and of the attack ({EPSILON_UNITS[norms.pop()]})"
