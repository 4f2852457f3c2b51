"""Standard training of a ResNet-18, loading included: this project's trainer against a plain
loop.
"""

from collections.abc import Callable

import torch

from base.base_trainer import BaseTrainer
from base.meters import Meters
from benchmarks.plain_loops import plain_loader, train_epoch
from benchmarks.rows import BenchmarkRow, Settings, speed_row
from benchmarks.steps import BATCH_NORM, LAYERS, build_trainer, precisions, step_config
from benchmarks.timing import compare
from models import build_model

BATCH = 128
BATCHES = 2
WORKERS = 2
GOAL = 1.8
PLAIN = f"plain loop, fp32, {WORKERS} workers"
NOTE = (
    "the same images, uint8 in memory, on both sides; the time of a step does not depend on their"
    " content"
)


def measure(settings: Settings) -> list[BenchmarkRow]:
    """One row for each precision of our side; the plain loop is always fp32, NCHW."""
    batch, batches = settings.size(BATCH, 8), settings.size(BATCHES, 1)
    size = [
        ("data_loader.args.batch_size", str(batch)),
        ("data_loader.args.num_batches", str(batches)),
    ]
    trainers = {
        f"Trainer, {precision}": build_trainer(
            step_config(settings, [*LAYERS[BATCH_NORM], *size, *system])
        )
        for precision, system in precisions(settings).items()
    }
    # The goal is for the precision that `auto` picks, the last one.
    *others, picked = trainers
    goals = {**dict.fromkeys(others), picked: GOAL}
    sides = {name: _our_epoch(trainer) for name, trainer in trainers.items()}
    sides[PLAIN] = _plain_epoch(trainers[picked], batch, batches)
    times = compare(sides, settings.repeats, warmup=settings.warmup, device=settings.device)
    title = f"BatchNorm, {batches} batches of {batch}"
    return [
        speed_row(title, times, name, PLAIN, goal, images=batch * batches, note=NOTE)
        for name, goal in goals.items()
    ]


def _our_epoch(trainer: BaseTrainer) -> Callable[[], object]:
    """The trainer's loop over its loader, without the run folder that `train` writes."""
    loader = trainer.train_loader
    epoch = 0

    def side() -> None:
        nonlocal epoch
        epoch += 1
        loader.set_epoch(epoch)
        meters = Meters()
        for images, labels in loader:
            meters.add(trainer.train_batch(images, labels))
            trainer.schedule.step_batch()
        # Reading the means waits for the device.
        meters.means()

    return side


def _plain_epoch(trainer: BaseTrainer, batch: int, batches: int) -> Callable[[], object]:
    """The same network, images and optimizer in the plain loop."""
    data = trainer.train_loader
    pixels = data.images.pixels[: batch * batches].cpu()
    labels = data.labels[: batch * batches].cpu()
    loader = plain_loader(pixels, labels, data.mean, data.std, batch, WORKERS)
    # Without mean and std: the loader's transform normalizes.
    arch = trainer.config.arch.model_dump(exclude_none=True)
    model = build_model(arch).to(trainer.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9, weight_decay=1e-4)
    return lambda: train_epoch(model, loader, optimizer, trainer.device)
