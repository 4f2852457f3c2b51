"""PGD-10 adversarial training: this project's trainer against the loop of robust_overfitting (Rice
et al.).
"""

from collections.abc import Callable

import torch

from base.base_trainer import BaseTrainer
from base.config import Override
from benchmarks.plain_loops import adversarial_step
from benchmarks.rows import BenchmarkRow, Settings, speed_row
from benchmarks.steps import BATCH_NORM, LAYERS, build_trainer, precisions, step_config, step_of
from benchmarks.timing import compare

BATCH = 16
GOAL = 1.5
OURS = "AdversarialTrainer"
THEIRS = "loop of Rice et al."
NOTE = (
    "same network, precision and memory format on both sides; the attack in training mode, as in"
    " their code"
)


def measure(settings: Settings) -> list[BenchmarkRow]:
    """A row for each precision."""
    return [
        _row(settings, precision, [*LAYERS[BATCH_NORM], *system])
        for precision, system in precisions(settings).items()
    ]


def _row(settings: Settings, precision: str, overrides: list[Override]) -> BenchmarkRow:
    batch, steps = settings.size(BATCH, 4), settings.size(10, 2)
    size = [("data_loader.args.batch_size", str(batch)), ("adversarial.steps", str(steps))]
    # Their loop averages no weights.
    no_average = ("trainer.ema_decay", "null")
    config = step_config(settings, [*overrides, *size, no_average], "cifar10_pgd.json")
    sides = {OURS: step_of(build_trainer(config)), THEIRS: _their_step(build_trainer(config))}
    times = compare(sides, settings.repeats, warmup=settings.warmup, device=settings.device)
    title = f"PGD-{steps} training step, {BATCH_NORM}, batch {batch}, {precision}"
    return speed_row(title, times, OURS, THEIRS, GOAL, note=NOTE)


def _their_step(trainer: BaseTrainer) -> Callable[[], object]:
    """A step of their loop, on a network, an optimizer and a minibatch like those of our side."""
    images, labels = next(iter(trainer.train_loader))
    optimizer = torch.optim.SGD(
        trainer.model.parameters(), lr=0.001, momentum=0.9, weight_decay=1e-4
    )
    attack = trainer.attack
    epsilon, step_size, steps = attack.epsilon, attack.step_size, attack.steps
    return lambda: adversarial_step(
        trainer.model, optimizer, images, labels, epsilon, step_size, steps, trainer.autocast
    )
