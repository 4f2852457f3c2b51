"""Draw `rooms.png`: the rooms of the project and which of them import which.

python docs/figures/rooms.py
"""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

BOXES = {
    "commands": (0, 5, 12, "train.py  train_robust.py  validate_pgd.py  fgsm.py  ..."),
    "experiment": (0, 4, 6.9, "config -> run, checkpoint -> model"),
    "studies": (7.2, 4, 2.3, "grids of runs"),
    "reports": (9.8, 4, 2.2, "tables, curves"),
    "trainer": (0, 3, 6.9, "training methods"),
    "evaluation": (0, 2, 6.9, "accuracy, robust accuracy, the doctor"),
    "data_loader": (0, 1, 2.1, "images, labels"),
    "attacks": (2.4, 1, 2.1, "PGD, APGD, ..."),
    "models": (4.8, 1, 2.1, "networks, layers"),
    "base": (0, 0, 12, "contracts, config, checkpoint, run_folder, distributed, optim, tracking"),
}
"""Room -> left edge, floor, width, contents."""
HEIGHT = 0.72


def draw_box(axes: Axes, name: str) -> None:
    left, floor, width, contents = BOXES[name]
    box = FancyBboxPatch(
        (left, floor), width, HEIGHT, boxstyle="round,pad=0.04", fc="#e8f0f7", ec="#0072b2"
    )
    axes.add_patch(box)
    center = left + width / 2
    axes.text(center, floor + 0.5, name, ha="center", va="center", weight="bold", size=11)
    axes.text(center, floor + 0.2, contents, ha="center", va="center", size=7.5, color="#444444")


def main() -> None:
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for name in BOXES:
        draw_box(axes, name)
    axes.text(9.6, 2.5, "A room imports only from rooms below it.", ha="center", size=9)
    axes.text(9.6, 2.16, "Rooms side by side do not import each other.", ha="center", size=9)
    axes.text(9.6, 1.82, "Only experiment may import every other room.", ha="center", size=9)
    axes.set(xlim=(-0.2, 12.2), ylim=(-0.2, 5.9))
    axes.axis("off")
    figure.savefig(Path(__file__).with_name("rooms.png"), dpi=140)


if __name__ == "__main__":
    main()
