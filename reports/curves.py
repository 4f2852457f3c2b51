"""Figures of runs: a metric against the epoch, or its final value against a config key.

Lines are means over seeds, bands and bars standard deviations.
"""

import logging
from collections.abc import Sequence
from math import isfinite
from typing import TYPE_CHECKING

import numpy as np

from base.errors import ConfigError
from base.run_folder.environment import PROVENANCE
from base.text import one_line
from reports.groups import Group, differing_keys, format_setting, mean_and_std
from reports.panels import (
    Curve,
    line_and_band,
    line_with_markers,
    panels_figure,
    points_and_bars,
    unit_of,
)
from reports.runs import Run, check_known

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

LOGGED = ("val_top1", "val_robust_top1")
MEASURED = ("test_top1", "test_robust_top1")
"""The default metrics of curves and of final values. Metrics that no run has are left out."""

AXIS_LABELS = {
    "trainer.percent": "rate of label noise (trainer.percent)",
    "trainer.subset_percent": "fraction of the training set (trainer.subset_percent)",
    "seed": "seed",
}

# More bands would overlap to one gray area
MOST_BANDS = 6
EPSILON_UNITS = {"linf": "1/255 of the pixel range, l-inf", "l2": "units of the pixel range, l2"}


def curves_figure(groups: Sequence[Group], metrics: Sequence[str] | None = None) -> "Figure":
    """Draw training curves: a panel for every metric, a line and a band for every group.

    The line is the mean over the group's seeds, the band one sample standard deviation to either
    side. A single seed has no band, and with more than `MOST_BANDS` groups there are only lines.
    A line skips the epochs that a seed of its group did not measure, and has a gap where the value
    of one was not finite.

    Args:
        groups: groups of runs, at least one.
        metrics: names in `metrics.jsonl`; panels of robust ones stand on the right. Accuracies are
            shown in percent. None for `LOGGED`.

    Raises:
        ConfigError: no run logs a metric.
    """
    metrics = _known_metrics([run for group in groups for run in group.runs], metrics)
    lines = {
        metric: [_against_epochs(group, metric) for group in groups]
        for metric in clean_first(metrics)
    }
    names = [group.name for group in groups]
    if len(groups) <= MOST_BANDS:
        figure = panels_figure(names, lines, "band", line_and_band)
    else:
        figure = panels_figure(names, lines, None, line_with_markers)
    for axes in figure.axes:
        axes.set_xlabel("epoch")
        axes.locator_params("x", integer=True)
    return figure


def against_figure(
    groups: Sequence[Group], key: str, metrics: Sequence[str] | None = None
) -> "Figure":
    """Draw final values against a config key: a panel for every metric, points with error bars.

    A point is the mean over the seeds of a group, its bar one sample standard deviation to either
    side. A line joins the groups that have equal values of all other keys. If their configs differ
    in more than the key, a warning names the difference. Against `trainer.percent`, points stand at
    the realized rate of label noise, averaged over a group's runs, if all runs have recorded it;
    the label of the axis says which rate is shown.

    Args:
        groups: groups of finished runs; the last of their keys is `key`.
        key: a dotted config key whose values are numbers, such as `trainer.percent`.
        metrics: names in `metrics.jsonl`, whose last measured value is taken, or in `result.json`;
            None for `MEASURED`.

    Raises:
        ConfigError: no run measured a metric, or a value of the key is not a number.
    """
    runs = [run for group in groups for run in group.runs]
    metrics = _known_final_metrics(runs, metrics)
    series: dict[str, list[Group]] = {}
    for group in groups:
        value = group.values[-1]
        # Python counts True among the integers
        if isinstance(value, bool) or not isinstance(value, int | float):
            where = group.runs[0].folder
            raise ConfigError(
                f"--against {key}: {format_setting(value)} in {where} is not a number"
            )
        series.setdefault(group.line, []).append(group)
    for name, members in series.items():
        _warn_of_other_differences(name, members, key)
    # Symmetric noise changes fewer labels than requested: a new label may be the true one.
    realized = key == "trainer.percent" and all(run.noise_rate is not None for run in runs)
    label = one_line(_axis_label(key, runs))
    if realized:
        label = "realized rate of label noise (requested by trainer.percent)"
    lines = {
        metric: [_against_key(members, metric, realized) for members in series.values()]
        for metric in clean_first(metrics)
    }
    figure = panels_figure(list(series), lines, "error bars", points_and_bars)
    for axes in figure.axes:
        axes.set_xlabel(label, parse_math=False)
    return figure


def clean_first(metrics: Sequence[str]) -> list[str]:
    """Sort metrics for their panels: clean ones on the left, robust ones on the right."""
    return sorted(dict.fromkeys(metrics), key=lambda metric: "robust" in metric)


def _known_metrics(runs: Sequence[Run], metrics: Sequence[str] | None) -> Sequence[str]:
    """Check the requested metrics, or choose those of `LOGGED` that a run logs."""
    logged = dict.fromkeys(name for run in runs for name in _logged(run))
    metrics = metrics or [name for name in LOGGED if name in logged] or LOGGED
    for metric in metrics:
        if metric not in logged and any(metric in (run.result or {}) for run in runs):
            raise ConfigError(
                f"--metric {metric}: measured once, after training: use --table or --against"
            )
    check_known("--metric", metrics, logged, "no run logs it")
    return metrics


def _known_final_metrics(runs: Sequence[Run], metrics: Sequence[str] | None) -> Sequence[str]:
    """Check the requested metrics, or choose those of `MEASURED` that a run has."""
    known = dict.fromkeys(name for run in runs for name in _logged(run))
    known |= dict.fromkeys(
        name for run in runs for name in run.result or {} if name not in PROVENANCE
    )
    metrics = metrics or [name for name in MEASURED if name in known] or MEASURED
    check_known("--metric", metrics, known, "no run measured it")
    return metrics


def _logged(run: Run) -> list[str]:
    return [
        name
        for log in run.log
        for name, value in log.items()
        if name != "epoch" and value is not None
    ]


def _against_epochs(group: Group, metric: str) -> Curve | None:
    """Return a group's curve over the epochs that all its seeds measured; None without such an
    epoch."""
    measured = [run.measured(metric) for run in group.runs]
    epochs = sorted(set.intersection(*(set(values) for values in measured)))
    longest = max(measured, key=len)
    if len(epochs) < len(longest):
        shortest = min(group.runs, key=lambda run: len(run.measured(metric)))
        logger.warning(
            "%s: %s is drawn for %d of %d epochs, because %s has no value for the others",
            group.name, metric, len(epochs), len(longest), shortest.folder,
        )  # fmt: skip
    for run, values in zip(group.runs, measured, strict=True):
        bad = [epoch for epoch in epochs if not isfinite(values[epoch])]
        if bad:
            _warn_of_divergence(run, metric, f"first in epoch {bad[0]}")
    if not epochs:
        return None
    return _curve(epochs, [[values[epoch] for values in measured] for epoch in epochs], metric)


def _against_key(groups: Sequence[Group], metric: str, realized: bool) -> Curve | None:
    """Return the curve through groups, against the last of their keys.

    `realized` puts each group at the mean rate of label noise of its runs instead.
    """
    points = []
    for group in groups:
        x = group.values[-1]
        if realized:
            x = float(np.mean([run.noise_rate for run in group.runs]))
        finals = [final_value(run, metric) for run in group.runs]
        for run, value in zip(group.runs, finals, strict=True):
            if value is not None and not isfinite(value):
                _warn_of_divergence(run, metric, "at the end")
        values = [value for value in finals if value is not None]
        if values:
            points.append((x, values))
    if not points:
        return None
    # The realized rates need not have the order of the keys
    points.sort(key=lambda point: point[0])
    x, values = zip(*points, strict=True)
    return _curve(x, values, metric)


def final_value(run: Run, metric: str) -> float | None:
    """Return the last logged value of a metric, or else the one in `result.json`; None if a run has
    neither."""
    measured = run.measured(metric)
    if measured:
        return measured[max(measured)]
    return run.outcome(metric)


def _warn_of_divergence(run: Run, metric: str, when: str) -> None:
    logger.warning(
        "%s: %s is not finite (%s): the run has diverged; its group has no point there",
        run.folder, metric, when,
    )  # fmt: skip


def _curve(x: Sequence[float], values: Sequence[Sequence[float]], metric: str) -> Curve:
    factor, _ = unit_of(metric)
    means, stds = np.array([mean_and_std(seeds) for seeds in values]).T
    return Curve(
        np.array(x, float), factor * means, factor * stds, tuple(len(seeds) for seeds in values)
    )


def _warn_of_other_differences(name: str, groups: Sequence[Group], key: str) -> None:
    # A line through points that differ in two settings shows the effect of neither.
    first = groups[0].runs[0]
    differing = {
        other: group.runs[0]
        for group in groups[1:]
        for other in differing_keys(first, group.runs[0])
        if other != key
    }
    for other, run in differing.items():
        values = " and ".join(format_setting(one.settings.get(other)) for one in (first, run))
        logger.warning("%s: %s also differs along the line: %s", name, other, values)


def _axis_label(key: str, runs: Sequence[Run]) -> str:
    if key != "adversarial.epsilon":
        return AXIS_LABELS.get(key, key)
    norms = {run.settings["adversarial.norm"] for run in runs}
    if len(norms) > 1:
        raise ConfigError(
            "--against adversarial.epsilon: l-inf and l2 runs have different units;"
            " plot them separately"
        )
    return f"epsilon of training and of the attack ({EPSILON_UNITS[norms.pop()]})"
