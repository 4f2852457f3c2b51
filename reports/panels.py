"""Panels side by side, in lines that are told apart in color, by color-blind people and in gray."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from base import output
from base.meters import is_accuracy
from base.text import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL_WIDTH, PANEL_HEIGHT, LEGEND_LINE, LETTER = 4.6, 3.4, 0.22, 0.09
"""In inches; the last is a generous width of a letter in the legend."""
COLORS = ("#0072B2", "#E69F00", "#000000", "#CC79A7", "#009E73", "#56B4E9", "#D55E00")
"""Okabe and Ito's, which color-blind people tell apart; neighbors differ in gray, too."""
LINES = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))
MARKERS = ("o", "s", "^", "D", "v", "X", "<", "p")
"""The first 28 groups each have a color and line of their own."""


@dataclass(frozen=True)
class Curve:
    """What one line of a picture shows.

    Attributes:
        x: float64 `(P,)`, ascending: epochs, or values of a config key.
        mean: `(P,)`, over seeds.
        std: `(P,)`, sample standard deviation over seeds; NaN where there is one seed.
        n: how many seeds each point is the mean of.
    """

    x: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    n: tuple[int, ...]


def unit_of(metric: str) -> tuple[float, str]:
    """By what values of a metric are multiplied to be shown, and the unit behind its name:
    accuracies are in per cent."""
    return (100.0, " in %") if is_accuracy(metric) else (1.0, "")


def panels_figure(
    names: Sequence[str],
    lines: dict[str, list[Curve | None]],
    spread: str | None,
    each: "Callable[[Axes, Curve, int], None]",
) -> "Figure":
    """A panel for every metric, side by side, over one legend; no global state of pyplot knows of
    it.

    Args:
        names: of the groups, at least one.
        lines: metric -> a curve for every group, None where it has none.
        spread: what shows the standard deviation, for the caption; None where nothing does.
        each: draws one line: `(axes, curve, index of the group)`.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    width = PANEL_WIDTH * len(lines)
    labels = [
        f"{one_line(name)}  ({_seeds([line[index] for line in lines.values()])})"
        for index, name in enumerate(names)
    ]
    columns = int(min(len(labels), max(1, width // (0.8 + LETTER * max(map(len, labels))))))
    height = PANEL_HEIGHT + LEGEND_LINE * (1 + -(-len(labels) // columns))
    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.03, hspace=0)
    panels = figure.subplots(1, len(lines), sharex=True, squeeze=False)[0]
    for axes, (metric, curves) in zip(panels, lines.items(), strict=True):
        for index, curve in enumerate(curves):
            if curve is not None:
                each(axes, curve, index)
        _dress(axes, metric)
    several = any(
        max(curve.n) > 1 for curves in lines.values() for curve in curves if curve is not None
    )
    shown = (
        "mean over seeds"
        if spread is None
        else f"mean over seeds, {spread}: one standard deviation to either side"
    )
    caption = shown if several else None
    legend = figure.legend(
        [Line2D([], [], **_style(index)) for index in range(len(names))],
        labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9, handlelength=4.5,
        title=caption, title_fontsize=8, borderaxespad=0.2,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)  # a dollar sign in a name does not begin a formula
    return figure


def _dress(axes: "Axes", metric: str) -> None:
    axes.set_ylabel(f"{one_line(metric)}{unit_of(metric)[1]}", parse_math=False)
    if is_accuracy(metric):  # not beyond what accuracies can be
        bottom, top = axes.get_ylim()
        axes.set_ylim(max(bottom, -1), min(top, 101))
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def line_with_markers(axes: "Axes", curve: Curve, index: int) -> None:
    # markers at some of many epochs, at other ones than those of the next line
    step = max(1, len(curve.x) // 8)
    axes.plot(curve.x, curve.mean, **_style(index), markevery=(index % step, step))


def line_and_band(axes: "Axes", curve: Curve, index: int) -> None:
    line_with_markers(axes, curve, index)
    if max(curve.n) > 1:
        low, high = curve.mean - curve.std, curve.mean + curve.std
        color, line = COLORS[index % len(COLORS)], LINES[index % len(LINES)]
        # tells overlapping bands apart in gray
        edge = {"edgecolor": (color, 0.45), "linewidth": 0.6, "linestyle": line}
        axes.fill_between(curve.x, low, high, facecolor=(color, 0.15), **edge)


def points_and_bars(axes: "Axes", curve: Curve, index: int) -> None:
    axes.plot(curve.x, curve.mean, **_style(index))
    bars = ~np.isnan(curve.std)
    color = COLORS[index % len(COLORS)]
    axes.errorbar(
        curve.x[bars],
        curve.mean[bars],
        curve.std[bars],
        fmt="none",
        ecolor=color,
        elinewidth=1.2,
        capsize=4,
    )


def _style(index: int) -> dict[str, object]:
    look = {
        "color": COLORS[index % len(COLORS)],
        "linestyle": LINES[index % len(LINES)],
        "marker": MARKERS[index % len(MARKERS)],
    }
    return {
        **look,
        "linewidth": 1.7,
        "markersize": 6,
        "markeredgecolor": "white",
        "markeredgewidth": 0.6,
    }


def _seeds(curves: Sequence[Curve | None]) -> str:
    """How many seeds the lines of a group are means of."""
    counts = sorted({n for curve in curves if curve is not None for n in curve.n})
    return f"n = {counts[0]} to {counts[-1]}" if counts[1:] else f"n = {counts[0] if counts else 0}"


def save_figure(figure: "Figure", path: str | Path) -> None:
    """Write a figure in the format of the path's suffix.

    Raises:
        ConfigError: it cannot be written.
    """
    from matplotlib import rc_context

    # TrueType: publishers refuse Type 3
    with rc_context({"pdf.fonttype": 42}):
        output.save_figure(figure, path)
