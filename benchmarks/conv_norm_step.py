"""ConvNorm against conv + BatchNorm, and against the original's algorithm: training step, evaluation, attack."""

from collections.abc import Callable

import torch

from assembly import evaluator
from attacks import PGD
from base.base_trainer import BaseTrainer
from base.config_files import Override
from benchmarks.rows import Row, Settings, cost_row, speed_row
from benchmarks.steps import BATCH_NORM, CONV_NORM, LAYERS, ORIGINAL, build_trainer, step_config, step_of, systems
from benchmarks.timing import compare

BATCH, EVALUATED, ATTACK_STEPS = 32, 64, 2


def measure(settings: Settings) -> list[Row]:
    """For each precision, training step, evaluation and attack, against BatchNorm and against the original's algorithm."""
    return [row for precision, system in systems(settings).items() for row in _rows(settings, precision, system)]


def _rows(settings: Settings, precision: str, system: list[Override]) -> list[Row]:
    batch, evaluated = settings.size(BATCH, 4), settings.size(EVALUATED, 4)
    size = [("data_loader.args.batch_size", str(batch))]
    trainers = {name: build_trainer(step_config(settings, [*layers, *size, *system]), name) for name, layers in LAYERS.items()}
    cost, speed = (1.5, None) if settings.device.type == "cuda" else (1.6, 2.3) if precision == "fp32" else (None, None)
    rows = []
    for setting, side, at_most, at_least in (  # the goals against BatchNorm, against the original
        (f"training step, batch {batch}", step_of, cost, speed),
        (f"evaluation, {evaluated} images", lambda trainer: _evaluation(trainer, evaluated), None, None),
        (f"PGD-{ATTACK_STEPS} in evaluation mode, batch {batch}", _attack, None, None),
    ):
        sides = {name: side(trainer) for name, trainer in trainers.items()}
        times = compare(sides, settings.repeats, warmup=settings.warmup, device=settings.device)
        rows.append(cost_row(f"{setting}, {precision}", times, CONV_NORM, BATCH_NORM, at_most))
        rows.append(speed_row(f"{setting}, {precision}", times, CONV_NORM, ORIGINAL, at_least))
    return rows


def _evaluation(trainer: BaseTrainer, images: int) -> Callable[[], object]:
    """What validation does after an epoch."""
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
