"""Pictures of an attack: examples, and accuracy against epsilon.

Matplotlib is imported when the first picture is drawn, as it takes a second.
"""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill, shorten
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attacks.threat_model import format_size
from base.output import save_figure
from base.text import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_ROWS = 8

# The side of an image, the gap between two, the height of a caption, and a generous width of a
# letter, in inches. At `base.output.DPI` all are whole numbers of pixels: an image has 192, and the
# pixels of 32 x 32 (and 8, 16, 24, 48, 64) are squares of one size.
SIDE = 1.2
GAP = 0.15
CAPTION = 0.325
CHARACTER = 0.0875

# Dark enough to read as text on white. Many people cannot tell the first two apart, so a sign
# stands before the word.
RIGHT = "#1a6e3a"
WRONG = "#b2182b"
GRAY = "#555555"
BLUE = "#0b4f8a"


def draw_examples(
    path: str | Path,
    images: Tensor,
    adversarial: Tensor,
    predictions: Sequence[int] | Tensor,
    adversarial_predictions: Sequence[int] | Tensor,
    labels: Sequence[int] | Tensor,
    class_names: Sequence[str],
    title: str,
) -> None:
    """Write a picture with a row for each of the first `MAX_ROWS` images: its label, the image, the
    adversarial image, and the change, magnified around gray so that the largest change of all rows
    fills the range.

    Below an image stands its prediction: "✓" and green if it is the label, "✗" and red if not;
    below the change stands its largest absolute value.

    Args:
        path: the suffix, `.png`, `.pdf` or `.svg`, decides the format; missing folders are made.
        images: `(B, C, H, W)` in `[0, 1]`, B at least 1; shown in color if C is 3, otherwise as the
            gray mean of the channels.
        adversarial: `(B, C, H, W)` in `[0, 1]`.
        predictions: `(B,)`, the class predicted for every image; negative if the model returns NaN.
        adversarial_predictions: `(B,)`, the class predicted for every adversarial image, likewise.
        labels: `(B,)`, the true classes.
        class_names: in label order.
        title: printed above, in as many lines as it needs.

    Raises:
        ConfigError: the suffix is not one of these.
        ValueError: there are no images.
    """
    if len(images) == 0:
        raise ValueError("images: expected at least one")
    images = images[:MAX_ROWS].detach().float().cpu().nan_to_num()
    adversarial = adversarial[:MAX_ROWS].detach().float().cpu().nan_to_num()
    true_names = _names_of(labels[:MAX_ROWS], class_names)
    names = _names_of(predictions[:MAX_ROWS], class_names)
    adversarial_names = _names_of(adversarial_predictions[:MAX_ROWS], class_names)
    change = adversarial - images
    factor = _magnification(float(change.abs().max()))
    magnified = (0.5 + factor * change).clamp(0, 1)
    room = CHARACTER * max(len(_short(name)) for name in ("label", *true_names))
    left = GAP + room + GAP
    width = left + 3 * (SIDE + GAP)
    lines = _wrapped(title, width)
    below_title = len(images) * (SIDE + CAPTION)
    title_height = 0.4 + 0.2 * len(lines.splitlines())
    figure = _figure(width, below_title + title_height, lines)

    for column, head in enumerate(("image", "adversarial", f"change × {factor:.3g}")):
        middle = left + column * (SIDE + GAP) + SIDE / 2
        _write(figure, middle, below_title + 0.1, head, color=GRAY)
    _write(figure, left - GAP, below_title + 0.1, "label", color=GRAY, ha="right")
    for row in range(len(images)):
        bottom = below_title - row * (SIDE + CAPTION) - SIDE
        name = _short(true_names[row])
        _write(figure, left - GAP, bottom + SIDE / 2, name, room=room, ha="right")
        largest = 255 * float(change[row].abs().max())
        size = "no change"
        if largest > 0:
            size = f"up to {largest:.3g}/255"
        cells = (
            (images[row], *_caption(names[row], true_names[row])),
            (adversarial[row], *_caption(adversarial_names[row], true_names[row])),
            (magnified[row], size, GRAY),
        )
        for column, (pixels, text, color) in enumerate(cells):
            x = left + column * (SIDE + GAP)
            _show(figure, x, bottom, pixels)
            _write(figure, x + SIDE / 2, bottom - 0.12, text, room=SIDE + GAP / 2, color=color)
    save_figure(figure, path)


def _names_of(classes: Sequence[int] | Tensor, class_names: Sequence[str]) -> list[str]:
    # Negative numbers are the predictions of a model that returns NaN.
    return ["NaN" if number < 0 else class_names[int(number)] for number in classes]


def draw_epsilon_curve(
    path: str | Path,
    curve: Sequence[tuple[float, float]],
    norm: str,
    clean: float,
    chance: float,
    epsilon: float,
    title: str,
) -> None:
    """Write a picture of accuracy under attack against epsilon, with the attack's epsilon, clean
    accuracy and chance marked.

    Args:
        path: the suffix, `.png`, `.pdf` or `.svg`, decides the format; missing folders are made.
        curve: (epsilon in units of the pixel range, accuracy as a fraction), as
            `DoctorReport.curve` holds it.
        norm: `"linf"`, then the axis is in 1/255, or `"l2"`, then in units of the pixel range.
        clean: accuracy without an attack, in `[0, 1]`.
        chance: accuracy of guessing, in `[0, 1]`.
        epsilon: the epsilon of the attack, in units of the pixel range.
        title: printed above, in as many lines as it needs.

    Raises:
        ConfigError: the suffix is not one of these.
        ValueError: the curve has no points.
    """
    save_figure(epsilon_figure(curve, norm, clean, chance, epsilon, title), path)


def epsilon_figure(
    curve: Sequence[tuple[float, float]],
    norm: str,
    clean: float,
    chance: float,
    epsilon: float,
    title: str,
) -> "Figure":
    """Return the figure of `draw_epsilon_curve`."""
    if not curve:
        raise ValueError("there are no points to draw")
    unit = 255 if norm == "linf" else 1
    points = sorted((size * unit, 100 * accuracy) for size, accuracy in curve)
    sizes, accuracies = zip(*points, strict=True)
    lines = _wrapped(title, 6.0)
    height = 3.6 + 0.2 * len(lines.splitlines())
    figure = _figure(6.0, height, lines)
    axes = figure.add_axes((0.65 / 6.0, 0.65 / height, 5.0 / 6.0, 2.75 / height))
    _epsilon_axis(axes, sizes, norm)
    axes.set_ylim(0, 105)
    axes.set_ylabel("accuracy in %")
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.axhline(
        100 * clean, color=GRAY, linestyle="-.", linewidth=1, label=f"clean: {100 * clean:.1f} %"
    )
    axes.plot(
        sizes,
        accuracies,
        color=BLUE,
        marker="o",
        markersize=5,
        linewidth=2,
        label="under attack",
        clip_on=False,
        zorder=3,
    )
    # The attack's own epsilon may have been left out of the curve.
    own = [accuracy for size, accuracy in points if abs(size - epsilon * unit) < 1e-6 * unit]
    label = f"the attack's epsilon, {format_size(epsilon, norm)}"
    if own:
        label += f": {own[0]:.1f} %"
    axes.axvline(epsilon * unit, color="black", linestyle="--", linewidth=1, label=label)
    axes.plot(
        [epsilon * unit] * len(own),
        own,
        color="white",
        markeredgecolor="black",
        marker="D",
        markersize=8,
        linestyle="",
        zorder=4,
        clip_on=False,
    )
    axes.axhline(
        100 * chance,
        color="black",
        linestyle=":",
        linewidth=1.5,
        label=f"chance: {100 * chance:.1f} %",
    )
    axes.legend(loc="best", fontsize=8, framealpha=0.95)
    return figure


def _epsilon_axis(axes: "Axes", sizes: Sequence[float], norm: str) -> None:
    """Draw the axis of epsilons: sizes that double from point to point lie at equal distances, and
    so does 0 before the first of them."""
    smallest = min((size for size in sizes if size > 0), default=1.0)
    # A logarithmic axis has no 0; this one is linear up to the smallest size
    axes.set_xscale("symlog", base=2, linthresh=smallest, linscale=0.5)
    axes.set_xticks(sizes, [f"{size:.4g}" for size in sizes])
    axes.set_xticks([], minor=True)
    axes.set_xlim(0, max(*sizes, smallest))
    if norm == "linf":
        axes.set_xlabel("epsilon in 1/255 of the pixel range (l-inf)")
    else:
        axes.set_xlabel("epsilon in pixel-range units (l2)")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _figure(width: float, height: float, title: str) -> "Figure":
    """Return a figure of a size in inches that holds its title only."""
    # Not by pyplot, whose global state would keep it in memory
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor="white")
    _write(figure, width / 2, height - 0.1, title, va="top", size=10)
    return figure


def _write(
    figure: "Figure",
    x: float,
    y: float,
    text: str,
    *,
    size: float = 8.5,
    room: float = 0,
    **style: str,
) -> None:
    """Write text at a place in inches, smaller if it is wider than `room`."""
    written = figure.text(
        x / figure.get_figwidth(),
        y / figure.get_figheight(),
        text,
        **{"ha": "center", "va": "center", **style},
        size=size,
        # The name of a class may hold a dollar sign, which would begin a formula
        parse_math=False,
    )
    width = written.get_window_extent().width / figure.dpi
    if room > 0 and width > room:
        written.set_size(size * room / width)


def _show(figure: "Figure", x: float, y: float, pixels: Tensor) -> None:
    """Show one image `(C, H, W)` in `[0, 1]`, its lower left corner at a place in inches."""
    width = figure.get_figwidth()
    height = figure.get_figheight()
    axes = figure.add_axes((x / width, y / height, SIDE / width, SIDE / height))
    shown = pixels.permute(1, 2, 0) if len(pixels) == 3 else pixels.mean(dim=0)
    # Nearest: a blurred pixel would hide the change of an adversarial image
    axes.imshow(
        torch.clamp(shown, 0, 1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest"
    )
    axes.set_axis_off()


def _caption(prediction: str, label: str) -> tuple[str, str]:
    """Return text and color for a prediction."""
    if prediction == label:
        return f"✓ {_short(prediction)}", RIGHT
    return f"✗ {_short(prediction)}", WRONG


def _magnification(largest: float) -> float:
    """Return the largest factor by which a change can be magnified around gray without being cut
    off: a whole number, unless it is below 2."""
    if largest == 0:
        return 1.0
    factor = 0.5 / largest
    if factor < 2:
        return factor
    # 1e-3, as rounding may have made 3.9999 of 4
    return float(int(factor + 1e-3))


def _short(name: str) -> str:
    """Return a name in the length that fits below an image."""
    name = one_line(name)
    if len(name) <= 15:
        return name
    return name[:14] + "…"


def _wrapped(title: str, width: float) -> str:
    return fill(shorten(one_line(title), 600), int(width / 0.095))
