"""ConvNorm against convolution with BatchNorm, and against the original's algorithm: training step,
evaluation, attack.
"""

from collections.abc import Callable, Mapping

import torch

from attacks import PGD
from base.base_trainer import BaseTrainer
from base.config import Override
from benchmarks.rows import BenchmarkRow, Settings, cost_row, speed_row
from benchmarks.steps import (
    BATCH_NORM,
    CONV_NORM,
    LAYERS,
    ORIGINAL,
    build_trainer,
    precisions,
    step_config,
    step_of,
)
from benchmarks.timing import Paired, compare
from experiment.build import evaluator

BATCHES = (128, 32)
"""The shipped configs' minibatch, and a small one, in which costs that do not grow with it weigh
more.
"""

COST = {
    (128, "fp32"): 1.2,
    (32, "fp32"): 1.5,
    (128, "bf16"): 1.3,
    (32, "bf16"): 1.6,
}
"""The most that a ResNet-18's training step on the CPU may cost, next to BatchNorm's."""

NARROW: dict[str, list[Override]] = {
    "WRN-16-2": [
        ("arch.type", "wide_resnet"),
        ("arch.args.depth", "16"),
        ("arch.args.widen_factor", "2"),
    ],
    "WRN-16-1": [
        ("arch.type", "wide_resnet"),
        ("arch.args.depth", "16"),
        ("arch.args.widen_factor", "1"),
    ],
    "simpleCNN": [("arch.type", "simpleCNN")],
}
"""Networks of few channels, in which the transforms of ConvNorm weigh more than its products."""

NARROW_COST = {
    ("WRN-16-2", "fp32"): 1.6,
    ("WRN-16-2", "bf16"): 1.7,
    ("WRN-16-1", "fp32"): 1.9,
    ("WRN-16-1", "bf16"): 2.2,
    ("simpleCNN", "fp32"): 2.5,
}
"""The most that a training step on the CPU may cost, next to BatchNorm's."""

ROUNDS = 25
WARMUP = 3
SECONDS = 15.0
"""Most rounds of a comparison, rounds before them that do not count, and the seconds after which no
further one begins.

A step of a narrow network takes a quarter of a second, so five rounds would be over within the same
second of a shared machine. The memory that a process keeps grows during the first three.
"""

EVALUATED = 64
ATTACKED = 32
ATTACK_STEPS = 2


def measure(settings: Settings) -> list[BenchmarkRow]:
    """For each precision, training steps, evaluation and attack, against BatchNorm and against the
    original's algorithm.
    """
    return [
        row
        for precision, system in precisions(settings).items()
        for row in _rows(settings, precision, system)
    ]


def _rows(settings: Settings, precision: str, system: list[Override]) -> list[BenchmarkRow]:
    evaluated = settings.size(EVALUATED, 4)
    attacked = settings.size(ATTACKED, 4)
    rows = []
    for batch in [settings.size(batch, 4) for batch in BATCHES]:
        size = [("data_loader.args.batch_size", str(batch))]
        # The original's algorithm is timed in fp32 only, because no other precision has a goal.
        names = LAYERS if precision == "fp32" else (CONV_NORM, BATCH_NORM)
        trainers = {
            name: build_trainer(step_config(settings, [*LAYERS[name], *size, *system]), name)
            for name in names
        }
        cost = None
        speed = None
        if settings.device.type == "cuda":
            cost = 1.5
        else:
            cost = COST.get((batch, precision))
            # The original is among the trainers in fp32 only.
            speed = 2.3
        rows += _compared(
            settings, f"training step, batch {batch}, {precision}", trainers, step_of, cost, speed
        )

    narrow = list(NARROW)[: settings.size(len(NARROW), 1)]
    for network in narrow:
        rows.append(_narrow_row(settings, network, precision, system))

    def evaluation(trainer: BaseTrainer) -> Callable[[], object]:
        return _evaluation(trainer, evaluated)

    # Evaluation and attack use the last trainers, those with the small minibatch. They have no goal
    # against the original.
    trainers.pop(ORIGINAL, None)
    rows += _compared(
        settings, f"evaluation, {evaluated} images, {precision}", trainers, evaluation
    )
    rows += _compared(
        settings,
        f"PGD-{ATTACK_STEPS} in evaluation mode, batch {attacked}, {precision}",
        trainers,
        _attack,
    )
    return rows


def _narrow_row(
    settings: Settings, network: str, precision: str, system: list[Override]
) -> BenchmarkRow:
    """A training step of a narrow network against BatchNorm, with the shipped configs' batch."""
    batch = settings.size(BATCHES[0], 4)
    common = [*NARROW[network], ("data_loader.args.batch_size", str(batch)), *system]
    trainers = {
        name: build_trainer(step_config(settings, [*common, *LAYERS[name]]), name)
        for name in (CONV_NORM, BATCH_NORM)
    }
    cost = None
    if settings.device.type == "cpu":
        cost = NARROW_COST.get((network, precision))
    setting = f"training step, {network}, batch {batch}, {precision}"
    (row,) = _compared(settings, setting, trainers, step_of, cost)
    return row


def _compared(
    settings: Settings,
    name: str,
    trainers: Mapping[str, BaseTrainer],
    side: Callable[[BaseTrainer], Callable[[], object]],
    at_most: float | None = None,
    at_least: float | None = None,
) -> list[BenchmarkRow]:
    """A row against BatchNorm with the goal `at_most`, and, where the original is among the
    trainers, one against it with the goal `at_least`.
    """
    sides = {layers: side(trainer) for layers, trainer in trainers.items()}

    # Each pair takes turns by itself, without a slow third side between two turns.
    def times(other: str) -> Paired:
        pair = {CONV_NORM: sides[CONV_NORM], other: sides[other]}
        return compare(
            pair,
            settings.size(ROUNDS, 1),
            warmup=settings.size(WARMUP, 0),
            device=settings.device,
            enough=SECONDS,
        )

    rows = [cost_row(name, times(BATCH_NORM), CONV_NORM, BATCH_NORM, at_most)]
    if ORIGINAL in sides:
        rows.append(speed_row(name, times(ORIGINAL), CONV_NORM, ORIGINAL, at_least))
    return rows


def _evaluation(trainer: BaseTrainer, images: int) -> Callable[[], object]:
    """The evaluation that validates after an epoch."""
    loader = trainer.train_loader.test_loader().subset(torch.arange(images))
    evaluate = evaluator(trainer.config, trainer.autocast)
    return lambda: evaluate(trainer.model, loader)


def _attack(trainer: BaseTrainer) -> Callable[[], object]:
    images, labels = next(iter(trainer.train_loader))
    attack = PGD(8 / 255, 2 / 255, ATTACK_STEPS)

    def side() -> None:
        with trainer.autocast():
            attack(trainer.model, images, labels)

    return side
