"""A picture of a confusion matrix. Matplotlib is imported when one is drawn."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

import numpy as np

from base.output import save_figure
from base.text import one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAST_SIDE, LETTER = 3.5, 0.085
"""The side of the square of all classes, and the width of a letter of the title, in inches."""
NUMBERED = 20
"""Up to so many classes the cells hold numbers."""
TICKS = (0, 1, 5, 10, 25, 50, 75, 100)


def draw_confusion(
    path: str | Path, confusion: Sequence[Sequence[int]], class_names: Sequence[str], title: str
) -> None:
    """Write the picture of `confusion_figure`; the suffix decides the format, missing folders are
    made."""
    save_figure(confusion_figure(confusion, class_names, title), path)


def confusion_figure(
    confusion: Sequence[Sequence[int]], class_names: Sequence[str], title: str
) -> "Figure":
    """A square for every pair of true class (rows) and prediction (columns), the darker, the larger
    its share of the class.

    Shares are in per cent of the class's images that have an answer; up to `NUMBERED` classes each
    square says its own. The darkness goes with the square root of the share, so that a confusion of
    a few per cent can be seen beside the diagonal.

    Args:
        confusion: `(C, C)` counts, a row for each true class.
        class_names: in label order.
        title: printed above.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    counts = np.asarray(confusion)
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    classes = len(class_names)
    numbered = classes <= NUMBERED
    side = max(LEAST_SIDE, classes * (0.5 if numbered else max(0.125, 11 / classes)))
    figure = Figure(figsize=(side + 2.6, side + 2.0), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    picture = axes.imshow(
        shares, cmap="Blues", norm=PowerNorm(0.5, 0, 100), interpolation="nearest"
    )
    size = 9 if numbered else min(9.0, 55 * side / classes)
    names = {
        "labels": [one_line(name) for name in class_names],
        "fontsize": size,
        "parse_math": False,
    }
    axes.set_xticks(range(classes), rotation=90 if classes > 10 else 45, ha="center" if classes > 10 else "right",
                    rotation_mode="default" if classes > 10 else "anchor", **names)  # fmt: skip
    axes.set_yticks(range(classes), **names)
    axes.tick_params(length=2)
    axes.set_xlabel("prediction")
    axes.set_ylabel("true class")
    axes.set_title(fill(one_line(title), int((side + 2.6) / LETTER)), fontsize=10, parse_math=False)
    for place in np.arange(classes - 1) + 0.5:
        axes.axhline(place, color="#cccccc", linewidth=0.5)
        axes.axvline(place, color="#cccccc", linewidth=0.5)
    if numbered:
        for row, column in np.argwhere(counts > 0):
            share = shares[row, column]
            color = "white" if share > 40 else "black"
            axes.text(
                column,
                row,
                f"{share:.0f}" if share >= 0.95 else "<1",
                ha="center",
                va="center",
                size=8,
                color=color,
            )
    bar = figure.colorbar(picture, ax=axes, shrink=0.7, aspect=25, ticks=TICKS)
    bar.set_label("share of the true class in %")
    return figure
