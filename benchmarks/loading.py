"""Loading and augmentation: batches on the device against torchvision's transforms image by image,
and the share of a training step.
"""

from collections.abc import Callable, Iterable

import torch

from benchmarks.plain_loops import plain_loader
from benchmarks.rows import BenchmarkRow, Goal, Settings, speed_row
from benchmarks.steps import BATCH_NORM, LAYERS, build_trainer, precisions, step_config, step_of
from benchmarks.timing import Paired, compare
from data_loader.data_loaders import CIFAR10_MEAN, CIFAR10_STD
from data_loader.image_data_loader import ImageDataLoader
from data_loader.images import MemoryImages

IMAGES = 10_000
BATCH = 128
FASTER = 10
SHARE = 0.03
STEPS = 2
NOTE = (
    "random uint8 images in memory, seed 0; crop with padding 4, flip, float, normalize on all"
    " sides"
)


def measure(settings: Settings) -> list[BenchmarkRow]:
    """Rows against two workers and against none, and one of the share of a training step."""
    count, batch = settings.size(IMAGES, 64), settings.size(BATCH, 16)
    pixels = torch.randint(
        0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    labels = torch.arange(count) % 10
    plain = {f"torchvision, {workers} workers": workers for workers in (2, 0)}
    sides = {"batches": _ours(_our_loader(pixels, labels, batch, settings.device))}
    for name, workers in plain.items():
        sides[name] = _theirs(
            plain_loader(pixels, labels, CIFAR10_MEAN, CIFAR10_STD, batch, workers), settings.device
        )
    times = compare(sides, settings.repeats, warmup=settings.warmup, device=settings.device)
    title = f"epoch of {count} images"
    rows = [
        speed_row(title, times, "batches", name, FASTER, images=count, note=NOTE) for name in plain
    ]
    return [*rows, _share_of_step(settings, pixels, labels, batch)]


def _our_loader(
    pixels: torch.Tensor, labels: torch.Tensor, batch: int, device: torch.device
) -> ImageDataLoader:
    names = [str(label) for label in range(10)]
    return ImageDataLoader(
        MemoryImages(pixels),
        labels.numpy(),
        names,
        batch_size=batch,
        mean=CIFAR10_MEAN,
        std=CIFAR10_STD,
        crop_padding=4,
        flip=True,
        shuffle=True,
        device=device,
    )


def _ours(loader: ImageDataLoader) -> Callable[[], object]:
    mean, std = (
        torch.tensor(values, device=loader.device).reshape(1, 3, 1, 1)
        for values in (CIFAR10_MEAN, CIFAR10_STD)
    )

    def side() -> None:
        for images, _ in loader:
            # Our models normalize; on the other side the transform Normalize does.
            (images - mean) / std

    return side


def _theirs(loader: Iterable, device: torch.device) -> Callable[[], object]:
    def side() -> None:
        for images, labels in loader:
            images.to(device)
            labels.to(device)

    return side


def _share_of_step(
    settings: Settings, pixels: torch.Tensor, labels: torch.Tensor, batch: int
) -> BenchmarkRow:
    """The time of loading a batch over that of the training step on it, in the precision that
    `auto` picks.
    """
    precision, system = list(precisions(settings).items())[-1]
    size = [("data_loader.args.batch_size", str(batch))]
    trainer = build_trainer(step_config(settings, [*LAYERS[BATCH_NORM], *size, *system]))
    loader = _our_loader(pixels, labels, batch, settings.device)
    sides = {"epoch": _ours(loader), "step": step_of(trainer)}
    # A share that is 60 times smaller than its goal needs no more rounds.
    measured = compare(
        sides, min(STEPS, settings.repeats), warmup=settings.warmup, device=settings.device
    ).values
    times = Paired(
        {"loading": [epoch / len(loader) for epoch in measured["epoch"]], "step": measured["step"]}
    )
    values = {"ours_value": times.spread("loading"), "other_value": times.spread("step")}
    share = times.ratio("loading", "step")
    title = f"batch of {batch}, BatchNorm, {precision}"
    return BenchmarkRow(
        title,
        "loading",
        share,
        "of the step",
        "training step",
        **values,
        goal=Goal(SHARE, at_least=False),
        note=NOTE,
    )
