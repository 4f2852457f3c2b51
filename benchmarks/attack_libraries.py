"""Attacks on robustly trained networks: time and robust accuracy of this project against
torchattacks and foolbox.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from base.config import Override, load_config
from base.rooms import ROOT
from benchmarks.attackers import (
    DIRECT,
    DIRECT_NCHW,
    LIBRARIES,
    LOADER,
    LOADER_BF16,
    Attacker,
    attackers,
    direct_flops,
)
from benchmarks.machine import PRODUCT, PRODUCT_FLOPS, matrix_products
from benchmarks.rows import BenchmarkRow, Goal, Settings, speed_row
from benchmarks.timing import Paired, Spread, compare
from experiment.evaluation import Evaluation
from experiment.evaluation_flags import evaluation_parser
from experiment.experiment import Experiment
from experiment.loading import load_evaluation


@dataclass(frozen=True)
class Network:
    """A network that is made robust for the comparison.

    Attributes:
        name: what the table calls it.
        overrides: changes to `configs/quickstart.json`.
        epochs: epochs of its training.
        images: how many test images are attacked, the first of every class; None for all.
        sizes: epsilon and step size for each norm (l-inf in 1/255), at which the network is about
            half as accurate as without an attack.
        passes: PGD's passes over the images for the comparison of robust accuracies. From one pass
            to the next, random starts alone change the verdicts of one to three images.
        peak: whether the rate of PGD's direct call is compared with that of a matrix product.
        nchw: whether direct calls are also timed on the network in NCHW.
    """

    name: str
    overrides: tuple[Override, ...]
    epochs: int
    images: int | None
    sizes: Mapping[str, tuple[float, float]]
    passes: int = 0
    peak: bool = False
    nchw: bool = False


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
    nchw=True,
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
    images=48,
    sizes={"linf": (24, 6), "l2": (1.0, 0.25)},
    peak=True,
)
CIFAR_SIZES = {"linf": (8.0, 2.0), "l2": (0.5, 0.125)}
"""Epsilon and step size for the network of `--checkpoint`."""

# Setting -> PGD's steps (0 for FGSM), norm
ATTACKS = {
    "PGD-10, l-inf": (10, "linf"),
    "PGD-10, l2": (10, "l2"),
    "FGSM, l-inf": (0, "linf"),
    "FGSM, l2": (0, "l2"),
}
FASTER = 1.0
"""The goal for every side of ours: at least this many times as fast as the faster library."""
FASTER_BF16 = 1.9
"""The same for a search in bf16 where the hardware multiplies bf16 natively."""
SHARE = 85
"""The goal for PGD: at least this percentage of the rate of a matrix product."""
POINTS = 0.2
"""Percentage points by which our attack may be weaker than theirs."""

PRODUCT_RATE = "matrix product, fp32"
NOTE = (
    "attack_loader: PGD(..., early_stop=True) or FGSM, with a verdict for every image; direct call:"
    " PGD(...) or FGSM(...)(model, images, labels); NCHW: on the network in the memory format in"
    " which the libraries attack it, elsewhere channels last; all in fp32, except that the search"
    " is in bf16 where the row says so; every side includes the verdict; the library that was"
    " slower in a first pass is not timed again"
)
NOTE_PEAK = (
    "FLOPs of the convolutions and products of a direct call over its whole time; matrix product:"
    f" {PRODUCT} x {PRODUCT}, in each round the faster of torch.mm and a 1x1 convolution"
)
NO_BF16 = "this hardware does not multiply bf16 natively"


def measure(settings: Settings) -> list[BenchmarkRow]:
    """Rows for two networks that are trained here, and for the network of `--checkpoint`."""
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    if missing:
        reason = f"{' and '.join(missing)} not installed: pip install -e '.[benchmarks]'"
        return [BenchmarkRow("attacks on a robust network", LOADER, skipped=reason)]
    rows = []
    large = replace(LARGE, overrides=(*LARGE.overrides, ("arch.type", settings.network)))
    for network in (SMALL, large):
        with TemporaryDirectory() as folder:
            run = _robust_run(settings, network, Path(folder))
            evaluation = _evaluation(run, settings, network.images)
            rows += _rows(settings, evaluation, network)
    if settings.checkpoint is not None:
        evaluation = _evaluation(settings.checkpoint, settings, settings.images)
        network = Network(evaluation.config.arch.type, (), 0, settings.images, CIFAR_SIZES)
        rows += _rows(settings, evaluation, network)
    return rows


def _robust_run(settings: Settings, network: Network, folder: Path) -> str:
    overrides = [
        *ROBUST,
        *network.overrides,
        ("system.device", str(settings.device)),
        ("system.num_threads", str(settings.threads)),
        ("trainer.epochs", str(settings.size(network.epochs, 1))),
        ("data_loader.args.num_batches", str(settings.size(0, 2))),
    ]
    config = load_config(ROOT / "configs" / "quickstart.json", overrides)
    Experiment.from_config(config).run(str(folder / "run"))
    return str(folder / "run")


def _evaluation(run: str, settings: Settings, images: int | None) -> Evaluation:
    """The run's model, and the first test images of every class."""
    arguments = evaluation_parser("").parse_args(["-s", run])
    overrides = [
        ("system.device", str(settings.device)),
        ("system.num_threads", str(settings.threads)),
        # Like the commands, whatever precision the training had.
        ("system.precision", "fp32"),
    ]
    limit = 16 if settings.smoke else images
    return load_evaluation(arguments, overrides, limit=limit, batch_size=250)


def _rows(settings: Settings, evaluation: Evaluation, network: Network) -> list[BenchmarkRow]:
    rows = []
    images = evaluation.loader.n_samples
    for attack, (steps, norm) in ATTACKS.items():
        epsilon, step = network.sizes[norm]
        # FGSM is one step of epsilon.
        step_size = step if steps else epsilon
        arguments = (min(steps, settings.size(steps, 2)), norm, epsilon, step_size)
        sides = attackers(evaluation, *arguments, nchw_too=network.nchw)
        libraries = {name: sides[name] for name in LIBRARIES}
        first_pass = compare(libraries, 1, warmup=0, device=settings.device)
        faster = first_pass.smallest(LIBRARIES)
        timed: dict[str, Callable[[], object]] = {
            name: side for name, side in sides.items() if name not in LIBRARIES or name == faster
        }
        products = {}
        if network.peak and steps:
            products = matrix_products(settings.device)
        times = compare(
            {**timed, **products},
            settings.repeats,
            warmup=settings.warmup,
            device=settings.device,
        )
        setting = f"{attack}, {network.name}, {images} images"
        for name in _ours(sides):
            goal = FASTER_BF16 if name == LOADER_BF16 else FASTER
            rows.append(speed_row(setting, times, name, faster, goal, images=images, note=NOTE))
        if steps and LOADER_BF16 not in sides:
            rows.append(BenchmarkRow(setting, LOADER_BF16, skipped=NO_BF16))
        if products:
            flops = direct_flops(evaluation, *arguments)
            rows.append(_share_row(setting, times, flops, list(products)))
        # If both are equally strong, the faster one: it has made more passes.
        lowest = min(LIBRARIES, key=lambda name: (median(sides[name].accuracies), name != faster))
        if steps:
            for name, side in sides.items():
                if name in (DIRECT, DIRECT_NCHW) or (name in LIBRARIES and name != lowest):
                    continue
                while len(side.accuracies) < settings.size(network.passes, 0):
                    side()
        # The memory format does not change what an attack finds
        sides.pop(DIRECT_NCHW, None)
        rows += _accuracy_rows(setting, sides, lowest)
    return rows


def _share_row(setting: str, times: Paired, flops: int, products: Sequence[str]) -> BenchmarkRow:
    """The rate of the direct call in percent of that of a matrix product, round by round.

    Args:
        setting: what is measured, in a few words.
        times: seconds of the direct call and of `products`.
        flops: of one direct call.
        products: the sides of `matrix_products`, of which the faster one counts in each round.
    """
    of_products = [times.values[name] for name in products]
    fastest = [min(seconds) for seconds in zip(*of_products, strict=True)]
    rates = Paired(
        {
            DIRECT: [flops / seconds / 1e9 for seconds in times.values[DIRECT]],
            PRODUCT_RATE: [PRODUCT_FLOPS / seconds / 1e9 for seconds in fastest],
        }
    )
    rounds = zip(rates.values[DIRECT], rates.values[PRODUCT_RATE], strict=True)
    return BenchmarkRow(
        f"{setting}: share of the peak",
        DIRECT,
        Spread.of([100 * ours / peak for ours, peak in rounds]),
        "% of the rate",
        PRODUCT_RATE,
        "GFLOP/s",
        ours_value=rates.spread(DIRECT),
        other_value=rates.spread(PRODUCT_RATE),
        goal=Goal(SHARE, at_least=True),
        note=NOTE_PEAK,
    )


def _ours(sides: dict[str, Attacker]) -> list[str]:
    return [name for name in sides if name not in LIBRARIES]


def _accuracy_rows(setting: str, sides: dict[str, Attacker], lowest: str) -> list[BenchmarkRow]:
    """The robust accuracies of our sides in percentage points, and how far they are above that of
    the library with the lowest.
    """
    rows = []
    for name in _ours(sides):
        passes = min(len(sides[name].accuracies), len(sides[lowest].accuracies))
        values = {
            side: [100 * accuracy for accuracy in sides[side].accuracies[:passes]]
            for side in (name, lowest)
        }
        points = Paired(values)
        rows.append(
            BenchmarkRow(
                f"{setting}: robust accuracy",
                name,
                points.difference(name, lowest),
                "points above",
                lowest,
                "%",
                ours_value=points.spread(name),
                other_value=points.spread(lowest),
                goal=Goal(POINTS, at_least=False),
            )
        )
    return rows
