"""Panels side by side. Their lines can be told apart in color, in gray and by the color-blind."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from base.meters import is_accuracy
from base.text import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# In inches
PANEL_WIDTH, PANEL_HEIGHT = 4.6, 3.4
LEGEND_LINE = 0.22
LETTER = 0.09
"""A generous estimate of the width of a letter in the legend."""

COLORS = ("#0072B2", "#E69F00", "#000000", "#CC79A7", "#009E73", "#56B4E9", "#D55E00")
"""The palette of Okabe and Ito (2008), which color-blind readers can tell apart. It is sorted so
that neighbors also differ in gray."""

# 7 colors and 4 line styles have no common divisor: the first 28 groups all look different
LINES = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))
MARKERS = ("o", "s", "^", "D", "v", "X", "<", "p")


@dataclass(frozen=True)
class Curve:
    """One line of a figure.

    Attributes:
        x: float64 `(P,)`, ascending: epochs, or values of a config key.
        mean: `(P,)`, over seeds.
        std: `(P,)`, sample standard deviation over seeds; NaN for a single seed.
        n: the number of seeds behind each point.
    """

    x: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    n: tuple[int, ...]


def unit_of(metric: str) -> tuple[float, str]:
    """Return the factor and the unit in which a metric is shown: accuracies are in percent."""
    if is_accuracy(metric):
        return 100.0, " in %"
    return 1.0, ""


def panels_figure(
    names: Sequence[str],
    lines: dict[str, list[Curve | None]],
    spread: str | None,
    draw: "Callable[[Axes, Curve, int], None]",
) -> "Figure":
    """Draw a panel for every metric, side by side, over one legend.

    Args:
        names: the names of the groups, at least one.
        lines: metric -> a curve for every group; None for a group without one.
        spread: the mark of the standard deviation, for the caption; None if it is not shown.
        draw: draws one line: `(axes, curve, index of the group)`.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    width = PANEL_WIDTH * len(lines)
    labels = [
        f"{one_line(name)}  ({_seeds([line[index] for line in lines.values()])})"
        for index, name in enumerate(names)
    ]
    # 0.8 inches are taken by the line and the gap before a label
    fitting = width // (0.8 + LETTER * max(map(len, labels)))
    columns = int(min(len(labels), max(1, fitting)))
    legend_lines = -(-len(labels) // columns)
    # One line more for the caption
    height = PANEL_HEIGHT + LEGEND_LINE * (1 + legend_lines)
    # Figure instead of pyplot, which would keep the figure in its global state.
    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.03, hspace=0)
    panels = figure.subplots(1, len(lines), sharex=True, squeeze=False)[0]
    for axes, (metric, curves) in zip(panels, lines.items(), strict=True):
        for index, curve in enumerate(curves):
            if curve is not None:
                draw(axes, curve, index)
        _finish_panel(axes, metric)
    several = any(
        max(curve.n) > 1 for curves in lines.values() for curve in curves if curve is not None
    )
    caption = None
    if several:
        caption = "mean over seeds"
        if spread is not None:
            caption += f", {spread}: one standard deviation to either side"
    legend = figure.legend(
        [Line2D([], [], **_style(index)) for index in range(len(names))],
        labels,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=9,
        # Long enough to show a whole period of each line style
        handlelength=4.5,
        title=caption,
        title_fontsize=8,
        borderaxespad=0.2,
    )
    for text in legend.get_texts():
        # A dollar sign in a name does not start a formula
        text.set_parse_math(False)
    return figure


def _finish_panel(axes: "Axes", metric: str) -> None:
    axes.set_ylabel(f"{one_line(metric)}{unit_of(metric)[1]}", parse_math=False)
    if is_accuracy(metric):
        # matplotlib's margins would go beyond 0 and 100 %
        bottom, top = axes.get_ylim()
        axes.set_ylim(max(bottom, -1), min(top, 101))
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def line_with_markers(axes: "Axes", curve: Curve, index: int) -> None:
    # About eight markers a line, at other epochs than those of the next line
    step = max(1, len(curve.x) // 8)
    axes.plot(curve.x, curve.mean, **_style(index), markevery=(index % step, step))


def line_and_band(axes: "Axes", curve: Curve, index: int) -> None:
    line_with_markers(axes, curve, index)
    if max(curve.n) > 1:
        low = curve.mean - curve.std
        high = curve.mean + curve.std
        color = COLORS[index % len(COLORS)]
        line = LINES[index % len(LINES)]
        # The edge distinguishes overlapping bands in gray
        edge = {"edgecolor": (color, 0.45), "linewidth": 0.6, "linestyle": line}
        axes.fill_between(curve.x, low, high, facecolor=(color, 0.15), **edge)


def points_and_bars(axes: "Axes", curve: Curve, index: int) -> None:
    axes.plot(curve.x, curve.mean, **_style(index))
    # A single seed has no bar, and NaN would still draw its caps
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
    return {
        "color": COLORS[index % len(COLORS)],
        "linestyle": LINES[index % len(LINES)],
        "marker": MARKERS[index % len(MARKERS)],
        "linewidth": 1.7,
        "markersize": 6,
        "markeredgecolor": "white",
        "markeredgewidth": 0.6,
    }


def _seeds(curves: Sequence[Curve | None]) -> str:
    """Format the number of seeds behind the lines of a group."""
    counts = sorted({n for curve in curves if curve is not None for n in curve.n})
    if not counts:
        return "n = 0"
    if len(counts) == 1:
        return f"n = {counts[0]}"
    return f"n = {counts[0]} to {counts[-1]}"
