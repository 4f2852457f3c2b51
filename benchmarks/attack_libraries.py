"""Attacks on a robustly trained network: this project against torchattacks and foolbox, in time and in robust accuracy."""

from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from base.config_files import Override, load_config
from benchmarks.attackers import Attacker, attackers
from benchmarks.rows import Goal, Row, Settings, speed_row
from benchmarks.steps import ROOT
from benchmarks.timing import Paired, compare
from evaluation import Evaluation, evaluation_parser, load_evaluation
from experiment import Experiment

SMALL: list[Override] = [
    ("arch.args.conv_layer_type", "conv"),
    ("arch.args.norm_layer_type", "bn"),
    ("system.precision", "auto"),
    ("system.channels_last", "true"),
    ("adversarial.method", "pgd"),
    ("adversarial.steps", "5"),
    ("adversarial.step_size", "14"),
    ("adversarial.epsilon", "40"),
    ("adversarial.validate_every", "0"),
    ("adversarial.report", "false"),
    ("trainer.monitor", "off"),
    ("trainer.verbosity", "0"),
]
"""A robust simpleCNN on digits, whose robust accuracy under this epsilon is like that of CIFAR-10's networks under 8/255."""
ATTACKS = {  # setting -> PGD's steps (0 for FGSM), norm, epsilon and step of the small network and of others, goal
    "PGD-10, l-inf": (10, "linf", (40, 10), (8, 2), 2.5),
    "PGD-10, l2": (10, "l2", (2.0, 0.5), (0.5, 0.125), 2.5),
    "FGSM, l-inf": (0, "linf", (40, 40), (8, 8), 1.0),
    "FGSM, l2": (0, "l2", (2.0, 2.0), (0.5, 0.5), 1.0),
}
"""Sizes for l-inf in 1/255."""
POINTS, PASSES = 0.2, 12
"""How much weaker than theirs our attack may be, and passes over the images to tell. From one to the next random starts alone
change the verdicts of one to three images, of which each is 0.28 points."""
JUDGED, LIBRARIES = "attack_loader", ("torchattacks", "foolbox")
NOTE = (
    "attack_loader: PGD(..., early_stop=True) or FGSM, with a verdict for every image; direct call: the attack alone; script: "
    "as validate_pgd.py and fgsm.py call it, until the label has left the top five, to find out top-5 accuracy, too, which the "
    "libraries do not; fp32 but where bf16 is written, which is of the search alone, and the verdict on every side"
)


def measure(settings: Settings) -> list[Row]:
    """A small network that is trained for this, and the network of `--checkpoint`, if one is given."""
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    if missing:
        reason = f"{' and '.join(missing)} not installed: pip install -e '.[benchmarks]'"
        return [Row("attacks on a robust network", JUDGED, skipped=reason)]
    with TemporaryDirectory() as folder:
        rows = _rows(settings, _evaluation(_small_run(settings, Path(folder)), settings, None), "simpleCNN on digits", 0)
    if settings.checkpoint is None:
        return [*rows, Row("attacks on a robust ResNet-18", JUDGED, skipped="no --checkpoint RUN was given")]
    evaluation = _evaluation(settings.checkpoint, settings, settings.images)
    return [*rows, *_rows(settings, evaluation, evaluation.config.arch.type, 1)]


def _small_run(settings: Settings, folder: Path) -> str:
    machine = [("system.device", str(settings.device)), ("system.num_threads", str(settings.threads))]
    epochs = [("trainer.epochs", str(settings.size(8, 1))), ("data_loader.args.num_batches", str(settings.size(0, 2)))]
    config = load_config(ROOT / "configs" / "quickstart.json", [*SMALL, *machine, *epochs])
    Experiment.from_config(config).run(str(folder / "run"))
    return str(folder / "run")


def _evaluation(run: str, settings: Settings, images: int | None) -> Evaluation:
    """The run's model, and the first test images of every class."""
    arguments = evaluation_parser("").parse_args(["-s", run])
    machine = [("system.device", str(settings.device)), ("system.num_threads", str(settings.threads))]
    machine.append(("system.precision", "fp32"))  # as the scripts do
    return load_evaluation(arguments, machine, limit=settings.size(images or 0, 16) or None, batch_size=250)


def _rows(settings: Settings, evaluation: Evaluation, network: str, sizes: int) -> list[Row]:
    rows = []
    for attack, (steps, norm, *both, goal) in ATTACKS.items():
        epsilon, step = both[sizes]
        sides = attackers(evaluation, min(steps, settings.size(steps, 2)), norm, epsilon, step)
        times = compare(sides, settings.repeats, warmup=settings.warmup, device=settings.device)
        faster, n = times.smallest(LIBRARIES), evaluation.loader.n_samples
        setting = f"{attack}, {network}, {n} images"
        for name in _ours(sides):
            rows.append(speed_row(setting, times, name, faster, goal if name == JUDGED else None, images=n, note=NOTE))
        lowest = Paired({name: sides[name].accuracies for name in LIBRARIES}).smallest(LIBRARIES)
        if steps and sizes == 0:
            for side in (sides[name] for name in sides if name.startswith(JUDGED) or name == lowest):
                while len(side.accuracies) < settings.size(PASSES, 0):
                    side()
        rows += _accuracy_rows(setting, sides, lowest)
    return rows


def _ours(sides: dict[str, Attacker]) -> list[str]:
    return [name for name in sides if name not in LIBRARIES]


def _accuracy_rows(setting: str, sides: dict[str, Attacker], lowest: str) -> list[Row]:
    """Robust accuracy of our sides in points, and how far it lies above that of the library with the lowest."""
    rows = []
    for name in _ours(sides):
        passes = min(len(sides[name].accuracies), len(sides[lowest].accuracies))
        points = Paired({side: [100 * share for share in sides[side].accuracies[:passes]] for side in (name, lowest)})
        values = {"ours_value": points.spread(name), "other_value": points.spread(lowest)}
        goal = Goal(POINTS, at_least=False)
        above = points.difference(name, lowest)
        rows.append(Row(f"{setting}: robust accuracy", name, above, "points above", lowest, "%", **values, goal=goal))
    return rows
