"""How the cost of one training step grows with batch, image size, width and PGD steps, for ConvNorm
and for BatchNorm.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from base.base_trainer import BaseTrainer
from base.config import Override
from benchmarks.rows import BenchmarkTable, Settings
from benchmarks.steps import (
    BATCH_NORM,
    CONV_NORM,
    LAYERS,
    build_trainer,
    precisions,
    random_images,
    step_config,
    step_of,
)
from benchmarks.table import format_number
from benchmarks.timing import seconds_of

COMPARED = (BATCH_NORM, CONV_NORM)
REPEATS = 2
SIDE_BATCH = 1
WIDE_BATCH = 16
ATTACK_BATCH = 4
ENOUGH_SECONDS = 2.0
"""A step that takes longer is measured once: tables show how steps grow, by factors."""

Step = Callable[[], object]


@dataclass(frozen=True)
class Growth:
    """A size of a training step, and what is measured of it.

    Attributes:
        title: the title of its table.
        name: what its first column is called.
        sizes: the sizes that are measured.
        batch: images in a step; None where the sizes are batches.
        steps: `layers -> {size: training step}`.
    """

    title: str
    name: str
    sizes: tuple[int, ...]
    batch: int | None
    steps: Callable[[str], Mapping[int, Step]]


def measure(settings: Settings) -> list[BenchmarkTable]:
    """A table for each size, in the precision that `auto` picks."""
    precision, system = list(precisions(settings).items())[-1]
    return [_table(settings, growth) for growth in _growths(settings, system, precision)]


def _growths(settings: Settings, system: list[Override], precision: str) -> list[Growth]:
    network = settings.network
    batches = (1, 4) if settings.smoke else (1, 4, 16, 64, 128)
    sides = (32, 48) if settings.smoke else (32, 64, 128, 224)
    widths = (1, 2) if settings.smoke else (1, 2, 4, 8)
    attack_steps = (0, 1) if settings.smoke else (0, 1, 5, 10)
    side_batch = settings.size(SIDE_BATCH, 2)
    wide_batch = settings.size(WIDE_BATCH, 2)
    attack_batch = settings.size(ATTACK_BATCH, 2)

    def trainer(layers: str, *overrides: Override, file: str = "cifar10.json") -> BaseTrainer:
        return build_trainer(step_config(settings, [*LAYERS[layers], *system, *overrides], file))

    def batch_override(size: int) -> Override:
        return "data_loader.args.batch_size", str(size)

    def by_batch(layers: str) -> dict[int, Step]:
        built = trainer(layers, batch_override(max(batches)))
        images, _ = next(iter(built.train_loader))
        return {size: step_of(built, images[:size]) for size in batches}

    def by_side(layers: str) -> dict[int, Step]:
        built = trainer(layers)
        return {side: step_of(built, random_images(settings, side_batch, side)) for side in sides}

    def by_width(layers: str) -> dict[int, Step]:
        wide = [("arch.type", "wide_resnet"), ("arch.args.depth", "10"), batch_override(wide_batch)]
        return {
            width: step_of(trainer(layers, *wide, ("arch.args.widen_factor", str(width))))
            for width in widths
        }

    def by_attack(layers: str) -> dict[int, Step]:
        found = {}
        for steps in attack_steps:
            attack = [("adversarial.steps", str(steps))]
            if steps == 0:
                attack = [("adversarial.method", "none"), ("adversarial.steps", "null")]
            small = [batch_override(attack_batch), ("trainer.ema_decay", "null")]
            found[steps] = step_of(trainer(layers, *small, *attack, file="cifar10_pgd.json"))
        return found

    side_title = f"Side of the images ({network}, batch {side_batch}, {precision})"
    width_title = f"Width (wide_resnet, depth 10, batch {wide_batch}, {precision})"
    attack_title = f"PGD steps ({network}, batch {attack_batch}, {precision})"
    return [
        Growth(f"Batch ({network}, 32 x 32, {precision})", "batch", batches, None, by_batch),
        Growth(side_title, "side", sides, side_batch, by_side),
        Growth(width_title, "widen_factor", widths, wide_batch, by_width),
        Growth(attack_title, "PGD steps", attack_steps, attack_batch, by_attack),
    ]


def _table(settings: Settings, growth: Growth) -> BenchmarkTable:
    seconds: dict[str, list[float]] = {}
    for layers in COMPARED:
        steps = growth.steps(layers)
        seconds[layers] = [_seconds(settings, steps[size]) for size in growth.sizes]
    heads = [growth.name]
    for layers in COMPARED:
        heads += [f"{layers}: s/step", "ms/image"]
    lines = []
    for position, size in enumerate(growth.sizes):
        images = growth.batch or size
        cells = [str(size)]
        for layers in COMPARED:
            taken = seconds[layers][position]
            cells += [format_number(taken), format_number(1000 * taken / images)]
        ratio = seconds[CONV_NORM][position] / seconds[BATCH_NORM][position]
        lines.append((*cells, format_number(ratio)))
    return BenchmarkTable(growth.title, (*heads, "ConvNorm / BatchNorm"), tuple(lines))


def _seconds(settings: Settings, step: Step) -> float:
    repeats = settings.size(REPEATS, 1)
    return seconds_of(
        step,
        repeats,
        warmup=settings.warmup,
        device=settings.device,
        at_least=1,
        enough=ENOUGH_SECONDS,
    ).median
