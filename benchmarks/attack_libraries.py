"""Attacks on a robustly trained network: this project against torchattacks and foolbox, in time and
in robust accuracy."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from base.config import Override, load_config
from benchmarks.attackers import Attacker, attackers
from benchmarks.rows import Goal, Row, Settings, speed_row
from benchmarks.steps import ROOT
from benchmarks.timing import Paired, compare
from experiment.evaluation_flags import evaluation_parser
from experiment.experiment import Experiment
from experiment.loading import Evaluation, load_evaluation


@dataclass(frozen=True)
class Network:
    """A network that is made robust for the comparison.

    Attributes:
        name: what the table calls it.
        overrides: of `configs/quickstart.json`.
        epochs: of its training.
        images: how many test images are attacked, the first of every class; None for all.
        sizes: epsilon and step under l-inf in 1/255, and under l2, at which it is about half as
            accurate as without an attack.
        passes: over the images to tell robust accuracies apart, of PGD. From one to the next random
            starts alone change the verdicts of one to three images.
        direct: whether the attack alone is timed, too.
    """

    name: str
    overrides: tuple[Override, ...]
    epochs: int
    images: int | None
    sizes: Mapping[str, tuple[float, float]]
    passes: int = 0
    direct: bool = False


ROBUST: list[Override] = [
    ("arch.args.conv_layer_type", "conv"),
    ("arch.args.norm_layer_type", "bn"),
    ("system.precision", "auto"),
    ("system.channels_last", "true"),
    ("adversarial.validate_every", "0"),
    ("adversarial.report", "false"),
    ("trainer.monitor", "off"),
    ("trainer.verbosity", "0"),
]
SMALL = Network(
    "simpleCNN on digits",
    (
        ("adversarial.method", "pgd"),
        ("adversarial.steps", "5"),
        ("adversarial.epsilon", "40"),
        ("adversarial.step_size", "14"),
    ),
    epochs=8,
    images=None,
    sizes={"linf": (40, 10), "l2": (2.0, 0.5)},
    passes=12,
    direct=True,
)
LARGE = Network(
    "ResNet-18 on digits",
    (
        ("data_loader.args.batch_size", "32"),
        ("optimizer.args.lr", "0.01"),
        ("adversarial.method", "fgsm"),
        ("adversarial.epsilon", "24"),
        ("adversarial.step_size", "30"),
    ),
    epochs=2,
    images=64,
    sizes={"linf": (24, 6), "l2": (1.0, 0.25)},
)
CIFAR_SIZES = {"linf": (8.0, 2.0), "l2": (0.5, 0.125)}
"""Of the network of `--checkpoint`."""

ATTACKS = {  # setting -> PGD's steps (0 for FGSM), norm, goal
    "PGD-10, l-inf": (10, "linf", 2.5),
    "PGD-10, l2": (10, "l2", 2.5),
    "FGSM, l-inf": (0, "linf", 1.0),
    "FGSM, l2": (0, "l2", 1.0),
}
POINTS = 0.2
"""How much weaker than theirs our attack may be."""

JUDGED, LIBRARIES = "attack_loader", ("torchattacks", "foolbox")
NOTE = (
    "attack_loader: PGD(..., early_stop=True) or FGSM, with a verdict for every image; direct call: the attack alone; fp32 but "
    "where bf16 is written, which is of the search alone, and the verdict on every side; the library that was slower in a "
    "first pass is not timed again"
)


def measure(settings: Settings) -> list[Row]:
    """Two networks that are trained for this, and the network of `--checkpoint`, if one is
    given."""
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    if missing:
        reason = f"{' and '.join(missing)} not installed: pip install -e '.[benchmarks]'"
        return [Row("attacks on a robust network", JUDGED, skipped=reason)]
    rows = []
    for network in (
        SMALL,
        replace(LARGE, overrides=(*LARGE.overrides, ("arch.type", settings.network))),
    ):
        with TemporaryDirectory() as folder:
            evaluation = _evaluation(
                _robust_run(settings, network, Path(folder)), settings, network.images
            )
            rows += _rows(settings, evaluation, network)
    if settings.checkpoint is not None:
        evaluation = _evaluation(settings.checkpoint, settings, settings.images)
        rows += _rows(
            settings,
            evaluation,
            Network(evaluation.config.arch.type, (), 0, settings.images, CIFAR_SIZES),
        )
    return rows


def _robust_run(settings: Settings, network: Network, folder: Path) -> str:
    machine = [
        ("system.device", str(settings.device)),
        ("system.num_threads", str(settings.threads)),
    ]
    epochs = [
        ("trainer.epochs", str(settings.size(network.epochs, 1))),
        ("data_loader.args.num_batches", str(settings.size(0, 2))),
    ]
    config = load_config(
        ROOT / "configs" / "quickstart.json", [*ROBUST, *network.overrides, *machine, *epochs]
    )
    Experiment.from_config(config).run(str(folder / "run"))
    return str(folder / "run")


def _evaluation(run: str, settings: Settings, images: int | None) -> Evaluation:
    """The run's model, and the first test images of every class."""
    arguments = evaluation_parser("").parse_args(["-s", run])
    machine = [
        ("system.device", str(settings.device)),
        ("system.num_threads", str(settings.threads)),
    ]
    machine.append(("system.precision", "fp32"))  # as the scripts do
    return load_evaluation(
        arguments, machine, limit=settings.size(images or 0, 16) or None, batch_size=250
    )


def _rows(settings: Settings, evaluation: Evaluation, network: Network) -> list[Row]:
    rows = []
    for attack, (steps, norm, goal) in ATTACKS.items():
        epsilon, step = network.sizes[norm]
        sides = attackers(
            evaluation,
            min(steps, settings.size(steps, 2)),
            norm,
            epsilon,
            step if steps else epsilon,
        )
        if not network.direct:
            del sides["direct call"]
        faster = compare(
            {name: sides[name] for name in LIBRARIES}, 1, warmup=0, device=settings.device
        ).smallest(LIBRARIES)
        timed = {
            name: side for name, side in sides.items() if name not in LIBRARIES or name == faster
        }
        times = compare(timed, settings.repeats, warmup=settings.warmup, device=settings.device)
        setting = f"{attack}, {network.name}, {evaluation.loader.n_samples} images"
        for name in _ours(sides):
            judged = goal if name.startswith(JUDGED) else None
            rows.append(
                speed_row(
                    setting,
                    times,
                    name,
                    faster,
                    judged,
                    images=evaluation.loader.n_samples,
                    note=NOTE,
                )
            )
        lowest = min(LIBRARIES, key=lambda name: (median(sides[name].accuracies), name != faster))
        if steps:
            for side in (
                sides[name] for name in sides if name.startswith(JUDGED) or name == lowest
            ):
                while len(side.accuracies) < settings.size(network.passes, 0):
                    side()
        rows += _accuracy_rows(setting, sides, lowest)
    return rows


def _ours(sides: dict[str, Attacker]) -> list[str]:
    return [name for name in sides if name not in LIBRARIES]


def _accuracy_rows(setting: str, sides: dict[str, Attacker], lowest: str) -> list[Row]:
    """Robust accuracy of our sides in points, and how far it lies above that of the library with
    the lowest."""
    rows = []
    for name in _ours(sides):
        passes = min(len(sides[name].accuracies), len(sides[lowest].accuracies))
        points = Paired(
            {
                side: [100 * share for share in sides[side].accuracies[:passes]]
                for side in (name, lowest)
            }
        )
        values = {"ours_value": points.spread(name), "other_value": points.spread(lowest)}
        goal = Goal(POINTS, at_least=False)
        above = points.difference(name, lowest)
        rows.append(
            Row(
                f"{setting}: robust accuracy",
                name,
                above,
                "points above",
                lowest,
                "%",
                **values,
                goal=goal,
            )
        )
    return rows
