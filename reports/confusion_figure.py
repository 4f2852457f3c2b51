"""A figure of a confusion matrix."""

from collections.abc import Sequence
from textwrap import fill
from typing import TYPE_CHECKING

import numpy as np

from base.text import one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# In inches
LEAST_SIDE = 3.5
LETTER = 0.085
"""The width of a letter of the title."""
NUMBERED = 20
"""The largest number of classes whose cells hold numbers."""
TICKS = (0, 1, 5, 10, 25, 50, 75, 100)


def confusion_figure(
    confusion: Sequence[Sequence[int]], class_names: Sequence[str], title: str
) -> "Figure":
    """Draw a cell for every pair of true class (rows) and prediction (columns).

    A cell shows its share of the class's images that have a prediction, in percent: by its
    darkness, and up to `NUMBERED` classes as a number.

    Args:
        confusion: `(C, C)` counts, a row for each true class.
        class_names: in label order.
        title: printed above.
    """
    # Matplotlib takes a second to import, and most commands draw nothing.
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    counts = np.asarray(confusion)
    # A class without images has a row of zeros
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    classes = len(class_names)
    numbered = classes <= NUMBERED
    # A number needs half an inch. Without numbers 11 inches are enough, unless the cells of many
    # classes would get too small to see.
    if numbered:
        side = max(LEAST_SIDE, 0.5 * classes)
        font_size = 9.0
    else:
        side = max(11.0, 0.125 * classes)
        font_size = min(9.0, 55 * side / classes)
    figure = Figure(figsize=(side + 2.6, side + 2.0), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    # The color shows the square root of the share, so that a confusion of a few percent can be seen
    # beside the diagonal.
    norm = PowerNorm(0.5, 0, 100)
    image = axes.imshow(shares, cmap="Blues", norm=norm, interpolation="nearest")
    names = {
        "labels": [one_line(name) for name in class_names],
        "fontsize": font_size,
        "parse_math": False,
    }
    if classes > 10:
        axes.set_xticks(range(classes), rotation=90, **names)
    else:
        axes.set_xticks(range(classes), rotation=45, ha="right", rotation_mode="anchor", **names)
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
            text = f"{share:.0f}"
            # A rounded 0 would look like a cell without images
            if share < 0.95:
                text = "<1"
            color = "black"
            if share > 40:
                # Black cannot be read on dark blue
                color = "white"
            axes.text(column, row, text, ha="center", va="center", size=8, color=color)
    bar = figure.colorbar(image, ax=axes, shrink=0.7, aspect=25, ticks=TICKS)
    bar.set_label("share of the true class in %")
    return figure
