"""How the cost of one training step grows with batch, image size, width and PGD steps, and the
speed with processes."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from base.base_trainer import BaseTrainer
from base.config import Override
from benchmarks.processes import python
from benchmarks.rows import Settings, Table
from benchmarks.steps import (
    BATCH_NORM,
    CONV_NORM,
    LAYERS,
    ROOT,
    build_trainer,
    step_config,
    step_of,
    step_overrides,
    systems,
)
from benchmarks.table import number
from benchmarks.timing import seconds_of

COMPARED = (BATCH_NORM, CONV_NORM)
REPEATS = 2
SIDE_BATCH, WIDE_BATCH, ATTACK_BATCH = 2, 16, 8
SHARED_BATCH, SHARED_BATCHES = 64, 6

Step = Callable[[], object]


@dataclass(frozen=True)
class Axis:
    """Something that makes a step larger.

    Attributes:
        title: of its table.
        name: of its sizes.
        sizes: what is measured.
        batch: images in a step; None where the sizes are that.
        steps: `layers -> {size: training step}`.
    """

    title: str
    name: str
    sizes: tuple[int, ...]
    batch: int | None
    steps: Callable[[str], Mapping[int, Step]]


def measure(settings: Settings) -> list[Table]:
    """Tables of growth, of what dominates at both ends, and of processes, in the precision that
    `auto` picks."""
    precision, system = list(systems(settings).items())[-1]
    tables, dominant = [], []
    for axis in _axes(settings, system, precision):
        times: dict[str, list[float]] = {}
        for name in COMPARED:
            steps = axis.steps(name)
            times[name] = [_seconds(settings, step) for step in steps.values()]
            ends = (axis.sizes[0], axis.sizes[-1])
            dominant += [
                (f"{axis.name} {end}", name, *_dominant(settings, steps[end])) for end in ends
            ]
        tables.append(_table(axis, times))
    heads = ("at", "layers", "operator that takes longest itself", "share of the step")
    tables.append(Table(f"What dominates a training step, {precision}", heads, tuple(dominant)))
    return [*tables, _by_processes(settings, system, precision)]


def _axes(settings: Settings, system: list[Override], precision: str) -> list[Axis]:
    def trainer(layers: str, *overrides: Override, file: str = "cifar10.json") -> BaseTrainer:
        return build_trainer(step_config(settings, [*LAYERS[layers], *system, *overrides], file))

    def batch(size: int) -> Override:
        return "data_loader.args.batch_size", str(size)

    def by_batch(layers: str) -> dict[int, Step]:
        built = trainer(layers, batch(max(batches)))
        images, _ = next(iter(built.train_loader))
        return {size: step_of(built, images[:size]) for size in batches}

    def by_side(layers: str) -> dict[int, Step]:
        built = trainer(layers)
        return {side: step_of(built, random_images(settings, side_batch, side)) for side in sides}

    def by_width(layers: str) -> dict[int, Step]:
        network = [("arch.type", "wide_resnet"), ("arch.args.depth", "10"), batch(wide_batch)]
        return {
            width: step_of(trainer(layers, *network, ("arch.args.widen_factor", str(width))))
            for width in widths
        }

    def by_attack(layers: str) -> dict[int, Step]:
        none = [("adversarial.method", "none"), ("adversarial.steps", "null")]
        some = {
            steps: [("adversarial.steps", str(steps))] if steps else none for steps in attack_steps
        }
        small = [batch(attack_batch), ("trainer.ema_decay", "null")]
        return {
            steps: step_of(trainer(layers, *small, *keys, file="cifar10_pgd.json"))
            for steps, keys in some.items()
        }

    smoke = settings.smoke
    batches, sides = ((1, 4), (32, 48)) if smoke else ((1, 4, 16, 64, 256), (32, 64, 128, 224))
    widths, attack_steps = ((1, 2), (0, 1)) if smoke else ((1, 2, 4, 8), (0, 1, 5, 10))
    side_batch, wide_batch, attack_batch = (
        settings.size(full, 2) for full in (SIDE_BATCH, WIDE_BATCH, ATTACK_BATCH)
    )
    network = settings.network
    return [
        Axis(f"Batch ({network}, 32 x 32, {precision})", "batch", batches, None, by_batch),
        Axis(
            f"Side of the images ({network}, batch {side_batch}, {precision})",
            "side",
            sides,
            side_batch,
            by_side,
        ),
        Axis(
            f"Width (wide_resnet, depth 10, batch {wide_batch}, {precision})",
            "widen_factor",
            widths,
            wide_batch,
            by_width,
        ),
        Axis(
            f"PGD steps ({network}, batch {attack_batch}, {precision})",
            "PGD steps",
            attack_steps,
            attack_batch,
            by_attack,
        ),
    ]


def random_images(settings: Settings, batch: int, side: int) -> Tensor:
    """`(batch, 3, side, side)` in `[0, 1]`, always the same."""
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0)).to(
        settings.device
    )


def _seconds(settings: Settings, step: Step) -> float:
    return seconds_of(
        step, settings.size(REPEATS, 1), warmup=settings.warmup, device=settings.device
    ).median


def _table(axis: Axis, times: Mapping[str, list[float]]) -> Table:
    heads = [axis.name]
    for name in times:
        heads += [f"{name}: s/step", "ms/image"]
    lines = []
    for position, size in enumerate(axis.sizes):
        cells = [str(size)]
        for seconds in times.values():
            cells += [
                number(seconds[position]),
                number(1000 * seconds[position] / (axis.batch or size)),
            ]
        ratio = times[CONV_NORM][position] / times[BATCH_NORM][position]
        lines.append((*cells, number(ratio)))
    growth = "; ".join(f"{name}: {_fit(axis.sizes, seconds)}" for name, seconds in times.items())
    return Table(axis.title, (*heads, "ConvNorm / BatchNorm"), tuple(lines), growth)


def _fit(sizes: Iterable[int], seconds: Iterable[float]) -> str:
    """The exponents of power laws through the first two and the last two points; where sizes begin
    at 0, a straight line."""
    x, y = np.array(list(sizes), dtype=float), np.array(list(seconds))
    if x[0] == 0:
        slope, start = np.polyfit(x, y, 1)
        return f"{1000 * start:.0f} ms + {1000 * slope:.0f} ms for each"
    exponents = np.diff(np.log(y)) / np.diff(np.log(x))
    return f"seconds grow with the power {exponents[0]:.2f} at the small end and {exponents[-1]:.2f} at the large one"


def _dominant(settings: Settings, step: Step) -> tuple[str, str]:
    """The operator that itself takes longest in a step, and its share of all operators' time."""
    on_cuda = settings.device.type == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    # without it some versions warn of more than one cycle
    with profile(activities=kinds, acc_events=True) as profiled:
        step()
    events = profiled.key_averages()
    times = {
        event.key: event.self_device_time_total if on_cuda else event.self_cpu_time_total
        for event in events
    }
    longest = max(times, key=times.get)
    return longest.removeprefix("aten::"), f"{times[longest] / sum(times.values()):.0%}"


def _by_processes(settings: Settings, system: list[Override], precision: str) -> Table:
    """train.py itself under torchrun: images per second of its one epoch."""
    batch, batches = settings.size(SHARED_BATCH, 8), settings.size(SHARED_BATCHES, 2)
    lines = []
    for processes in (1, 2):
        rates = [
            _images_per_second(settings, [*LAYERS[name], *system], processes, batch, batches)
            for name in COMPARED
        ]
        lines.append(
            (
                str(processes),
                str(max(1, settings.threads // processes)),
                *(number(rate) for rate in rates),
            )
        )
    heads = ("processes", "threads of each", *(f"{name}: images/s" for name in COMPARED))
    title = f"Processes ({settings.network}, {batches} minibatches of {batch} shared out, gloo, CPU, {precision})"
    return Table(
        title,
        heads,
        tuple(lines),
        "the first epoch of train.py under torchrun, with its first minibatch",
    )


def _images_per_second(
    settings: Settings, overrides: list[Override], processes: int, batch: int, batches: int
) -> float:
    threads = max(1, settings.threads // processes)
    sizes = [
        ("data_loader.args.batch_size", batch),
        ("data_loader.args.num_batches", batches),
        ("trainer.epochs", 1),
    ]
    machine = [("system.device", "cpu"), ("system.num_threads", threads), ("trainer.verbosity", 0)]
    settings_given = [*step_overrides(settings, overrides), *sizes, *machine]
    words = [word for key, value in settings_given for word in ("--set", f"{key}={value}")]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    with TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        python(
            [
                *launcher,
                str(ROOT / "train.py"),
                "-c",
                "configs/cifar10.json",
                "--run_dir",
                str(run),
                *words,
            ],
            threads,
        )
        return json.loads((run / "result.json").read_text())["images_per_second"]
