"""A picture of a network's layers as operators, in depth order. Matplotlib is imported when one is
drawn."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from base.output import save_figure
from base.text import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PER_LAYER, LEAST_WIDTH, MOST_NAMES = 0.2, 6.5, 150
BLUE, ORANGE = "#0b4f8a", "#d55e00"
"""Far apart in gray, too; and every series has a marker of its own."""


def draw_spectrum(path: str | Path, layers: Sequence[Mapping[str, Any]], title: str) -> None:
    """Write the picture of `spectrum_figure`; the suffix decides the format, missing folders are
    made."""
    save_figure(spectrum_figure(layers, title), path)


def spectrum_figure(layers: Sequence[Mapping[str, Any]], title: str) -> "Figure":
    """Two panels over one row of layers: spectral norms, alone and times the scale of the batch
    norm behind, on a logarithmic axis; and distances from an orthogonal operator, as they are and
    up to a scale.

    The depthwise convolutions of ConvNorm, `bpconv`, are open marks behind the layer that they
    belong to; all other layers are filled marks.

    Args:
        layers: in depth order, at least one; of each `name`, `norm`, `batch_norm_scale` (None where
            there is none), `orthogonality_error` and `spread`, as
            `evaluation.spectral_norm.Spectrum` explains them.
        title: printed above.
    """
    from matplotlib.figure import Figure

    width = max(LEAST_WIDTH, 1.6 + PER_LAYER * min(len(layers), MOST_NAMES))
    figure = Figure(figsize=(width, 6.4), facecolor="white", layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    figure.suptitle(one_line(title), fontsize=10, parse_math=False)
    norms = [layer["norm"] for layer in layers]
    scaled = [
        None if layer["batch_norm_scale"] is None else layer["norm"] * layer["batch_norm_scale"]
        for layer in layers
    ]
    _series(upper, layers, norms, BLUE, "o", "-", "spectral norm")
    _series(upper, layers, scaled, ORANGE, "^", "", "times the scale of its batch norm")
    upper.axhline(1, color="black", linestyle=":", linewidth=1)
    upper.set_yscale("log", base=2)
    upper.set_ylabel("spectral norm")
    _series(
        lower,
        layers,
        [layer["orthogonality_error"] for layer in layers],
        BLUE,
        "s",
        "-",
        "distance from orthogonal",
    )
    _series(
        lower,
        layers,
        [layer["spread"] for layer in layers],
        ORANGE,
        "D",
        "",
        "from a multiple of orthogonal",
    )
    lower.set_yscale("symlog", base=2, linthresh=0.25, linscale=0.7)
    lower.set_ylim(bottom=0)
    lower.set_ylabel("orthogonality error")
    for axes in (upper, lower):
        _dress(axes)
    step = -(-len(layers) // MOST_NAMES)
    names = [one_line(_short(layer["name"])) for layer in layers][::step]
    lower.set_xticks(range(0, len(layers), step), names, rotation=90, fontsize=7, parse_math=False)
    lower.set_xlim(-0.7, len(layers) - 0.3)
    return figure


def _series(
    axes: "Axes",
    layers: Sequence[Mapping[str, Any]],
    values: Sequence[float | None],
    color: str,
    marker: str,
    line: str,
    label: str,
) -> None:
    """One mark for every layer that has a value: filled, but open for a `bpconv`."""
    known = [(place, value) for place, value in enumerate(values) if value is not None]
    for open_mark in (False, True):
        points = [
            point for point in known if layers[point[0]]["name"].endswith("bpconv") == open_mark
        ]
        if points:
            look = {
                "linestyle": "" if open_mark else line,
                "markerfacecolor": "white" if open_mark else color,
            }
            text = f"{label}, bpconv" if open_mark else label
            axes.plot(
                *zip(*points, strict=True),
                color=color,
                marker=marker,
                markersize=5,
                linewidth=1,
                label=text,
                **look,
            )


def _short(name: str) -> str:
    """A `bpconv` stands behind the layer that it belongs to."""
    return "bpconv" if name.endswith(".bpconv") else name


def _dress(axes: "Axes") -> None:
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
