"""Draw docs/figures/overview.png, the figure of the README, from the runs in results/.

Run it in the clone's root: `python docs/figures/overview.py`.
"""

import json
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
# Okabe and Ito's colors, as in the project's other figures
STYLES = {
    "BatchNorm": {"color": "#0072b2", "marker": "o", "linestyle": "-"},
    "ConvNorm": {"color": "#d55e00", "marker": "s", "linestyle": "--"},
}


def test_accuracies(study: str, norm: str, setting: str) -> np.ndarray:
    """Test top-1 accuracy in percent of the best model of every seed."""
    files = sorted((RESULTS / study).glob(f"{norm}_{setting}_seed*.json"))
    return np.array([100 * json.loads(file.read_text())["test_top1"] for file in files])


def draw_study(axes: Axes, study: str, positions: dict[str, float]) -> None:
    """Draw mean and sample standard deviation over the seeds of a study, one line a norm."""
    for norm, style in STYLES.items():
        runs = [test_accuracies(study, norm, setting) for setting in positions]
        means = [accuracies.mean() for accuracies in runs]
        spreads = [accuracies.std(ddof=1) for accuracies in runs]
        axes.errorbar(list(positions.values()), means, yerr=spreads, label=norm, capsize=3, **style)


def draw_attacks(axes: Axes) -> None:
    """Draw clean and robust accuracy of each training method as a pair of bars a norm."""
    methods = {"none": "standard", "free": "free", "pgd": "PGD-10"}
    for offset, (norm, suffix) in enumerate({"BatchNorm": "bn", "ConvNorm": "conv_norm"}.items()):
        for place, method in enumerate(methods):
            file = RESULTS / "cifar10_jpeg_robust" / f"{method}_{suffix}.json"
            result = json.loads(file.read_text())
            x = place + 0.4 * offset - 0.2
            color = STYLES[norm]["color"]
            axes.bar(x, 100 * result["last_test_top1"], 0.36, color=color, alpha=0.3)
            axes.bar(x, 100 * result["last_test_robust_top1"], 0.36, color=color)
    axes.set_xticks(range(len(methods)), list(methods.values()))
    # Leave room for the legend above the bars
    axes.set_ylim(0, 80)
    axes.legend(
        [Patch(color="0.5", alpha=0.3), Patch(color="0.5")],
        ["clean images", "under PGD-20, l-inf 8/255"],
        frameon=False,
    )


def main() -> None:
    """Write the figure beside this file."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, (noise, size, attack) = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
    draw_study(noise, "label_noise", {"none": 0, "20": 20, "40": 40, "60": 60, "80": 80})
    noise.set_title("Wrong labels")
    noise.set_xlabel("label noise asked for (%)")
    noise.set_ylabel("test accuracy (%)")
    noise.legend(frameon=False)
    draw_study(size, "subsets", {"2": 1000, "5": 2500, "10": 5000, "20": 10000})
    size.set_xscale("log")
    size.set_xticks([1000, 2500, 5000, 10000], ["1,000", "2,500", "5,000", "10,000"])
    size.minorticks_off()
    size.set_title("Few images")
    size.set_xlabel("training images")
    draw_attacks(attack)
    attack.set_title("Under attack")
    attack.set_xlabel("training method")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    main()
