"""A figure of a network's layers as linear operators, in depth order."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from base.text import one_line
from reports.spectrum_table import LayerRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# In inches
PER_LAYER = 0.2
LEAST_WIDTH = 6.5
MOST_NAMES = 150
"""The largest number of layers that are all named. With more, only every n-th is."""

# Far apart in gray, too
BLUE = "#0b4f8a"
ORANGE = "#d55e00"


def spectrum_figure(layers: Sequence[LayerRow], title: str) -> "Figure":
    """Draw two panels that share their axis of layers.

    The upper one shows spectral norms, alone and times the scale of the batch norm that follows, on
    a logarithmic axis. The lower one shows distances from an orthogonal operator, and from the
    nearest multiple of one.

    The depthwise convolutions of ConvNorm, `bpconv`, are open marks after the layer that they
    belong to. All other layers are filled marks.

    Args:
        layers: in depth order, at least one.
        title: printed above.
    """
    # Matplotlib takes a second to import, and most commands draw nothing.
    from matplotlib.figure import Figure

    width = max(LEAST_WIDTH, 1.6 + PER_LAYER * min(len(layers), MOST_NAMES))
    figure = Figure(figsize=(width, 6.4), facecolor="white", layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    figure.suptitle(one_line(title), fontsize=10, parse_math=False)
    norms = {place: layer["norm"] for place, layer in enumerate(layers)}
    scaled = {
        place: layer["norm"] * layer["batch_norm_scale"]
        for place, layer in enumerate(layers)
        if layer["batch_norm_scale"] is not None
    }
    errors = {place: layer["orthogonality_error"] for place, layer in enumerate(layers)}
    spreads = {place: layer["spread"] for place, layer in enumerate(layers)}
    _series(upper, layers, norms, BLUE, "o", "-", "spectral norm")
    _series(upper, layers, scaled, ORANGE, "^", "", "times the scale of its batch norm")
    # A layer on this line neither expands nor shrinks any input
    upper.axhline(1, color="black", linestyle=":", linewidth=1)
    upper.set_yscale("log", base=2)
    upper.set_ylabel("spectral norm")
    _series(lower, layers, errors, BLUE, "s", "-", "distance from orthogonal")
    _series(lower, layers, spreads, ORANGE, "D", "", "from a multiple of orthogonal")
    # Logarithmic, but linear near 0, which an orthogonal layer has exactly
    lower.set_yscale("symlog", base=2, linthresh=0.25, linscale=0.7)
    lower.set_ylim(bottom=0)
    lower.set_ylabel("orthogonality error")
    for axes in (upper, lower):
        _finish_panel(axes)
    step = -(-len(layers) // MOST_NAMES)
    names = [one_line(_short(layer["name"])) for layer in layers][::step]
    lower.set_xticks(range(0, len(layers), step), names, rotation=90, fontsize=7, parse_math=False)
    lower.set_xlim(-0.7, len(layers) - 0.3)
    return figure


def _series(
    axes: "Axes",
    layers: Sequence[LayerRow],
    values: Mapping[int, float],
    color: str,
    marker: str,
    line: str,
    label: str,
) -> None:
    """Draw `values` (position of a layer -> value), with open marks for `bpconv`."""
    style = {"color": color, "marker": marker, "markersize": 5, "linewidth": 1}
    filled = {}
    opened = {}
    for place, value in values.items():
        if layers[place]["name"].endswith("bpconv"):
            opened[place] = value
        else:
            filled[place] = value
    if filled:
        axes.plot(list(filled), list(filled.values()), linestyle=line, label=label, **style)
    if opened:
        style |= {"linestyle": "", "markerfacecolor": "white"}
        axes.plot(list(opened), list(opened.values()), label=f"{label}, bpconv", **style)


def _short(name: str) -> str:
    # A `bpconv` stands after the layer that it belongs to, so the rest of its name adds nothing.
    if name.endswith(".bpconv"):
        return "bpconv"
    return name


def _finish_panel(axes: "Axes") -> None:
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(
        fontsize=8,
        frameon=False,
        ncols=2,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0.2,
    )
