"""Hours that every shipped study and recipe would take on this hardware, computed from measured
training steps.
"""

import json
from pathlib import Path

from base.config import Config, Override, load_config, validate
from base.config.files import override
from base.registry import CONV_LAYERS
from base.rooms import ROOT
from benchmarks.rows import BenchmarkTable, Settings
from benchmarks.steps import NO_DOWNLOAD, build_trainer, random_images, step_of
from benchmarks.table import format_number
from benchmarks.timing import seconds_of
from models.layers.conv_norm.fourier_plan import FOURIER_BATCH
from models.layers.conv_norm.layer import ConvNorm2d
from studies.grid import plan

FEW_IMAGES = 2
MEASURED_SECONDS = 0.5
"""On a CPU a step is measured on as many images as take this long."""

TRAINING_IMAGES = {"DigitsDataLoader": 1437}
DEFAULT_TRAINING_IMAGES = 50_000
"""Training images of CIFAR, and of the image files that the small studies are made for."""

NO_DATA: list[Override] = [
    *NO_DOWNLOAD,
    ("data_loader.args.image_size", "null"),
    ("data_loader.args.in_memory", "null"),
    ("data_loader.args.mean", "null"),
    ("data_loader.args.std", "null"),
    ("num_classes", "null"),
    ("arch.args.num_classes", "null"),
    ("trainer.percent", "0"),
    ("trainer.sym", "false"),
    ("trainer.asym", "false"),
    ("trainer.noise_file", "null"),
    ("trainer.noise_key", "null"),
    ("trainer.subset_percent", "1"),
]


def measure(settings: Settings) -> list[BenchmarkTable]:
    """A line for each grid of `configs/ablations` and for each config of a single run."""
    configs = ROOT / "configs"
    grids = sorted((configs / "ablations").glob("*.json"))
    recipes = sorted(
        file for file in configs.glob("*.json") if not file.name.endswith("schema.json")
    )
    studies = {
        f"ablations/{file.name}": [run.config for run in plan(file)]
        for file in _few(settings, grids)
    }
    studies |= {file.name: [load_config(file)] for file in _few(settings, recipes)}
    seconds_per_step: dict[str, float] = {}
    lines = [_line(settings, name, runs, seconds_per_step) for name, runs in studies.items()]
    heads = (
        "study",
        "runs",
        "networks",
        "updates of all runs",
        "s per update",
        "hours on this hardware",
    )
    note = _note(settings, len(seconds_per_step))
    return [BenchmarkTable("Hours of every shipped study", heads, tuple(lines), note)]


def _few(settings: Settings, files: list[Path]) -> list[Path]:
    """All files; only one under --smoke."""
    return files[: settings.size(len(files), 1)]


def _note(settings: Settings, measured: int) -> str:
    how = "measured once after a warm-up"
    if settings.device.type != "cuda":
        how += (
            f" (or computed from a line through its times on as many images as take"
            f" {MEASURED_SECONDS:g} s and on half of them)"
        )
    return (
        "runs x epochs x minibatches x seconds of a training step with its attack, of which"
        f" {measured} different ones were {how}; no validation, no attack report, nothing scaled to"
        " other hardware"
    )


def _line(
    settings: Settings, name: str, runs: list[Config], seconds_per_step: dict[str, float]
) -> tuple[str, ...]:
    updates = 0
    seconds = 0.0
    for config in runs:
        minibatches = config.trainer.epochs * _minibatches(config)
        updates += minibatches
        seconds += minibatches * _seconds_per_step(settings, config, seconds_per_step)
    networks = ", ".join(dict.fromkeys(config.arch.type for config in runs))
    return (
        name,
        str(len(runs)),
        networks,
        f"{updates:,}",
        format_number(seconds / updates),
        format_number(seconds / 3600),
    )


def _minibatches(config: Config) -> int:
    """The number of minibatches in an epoch."""
    args = config.data_loader.args
    share = min(config.trainer.subset_percent, 1 - args.validation_split)
    images = round(share * TRAINING_IMAGES.get(config.data_loader.type, DEFAULT_TRAINING_IMAGES))
    return min(-(-images // args.batch_size), args.num_batches or images)


def _seconds_per_step(settings: Settings, config: Config, measured: dict[str, float]) -> float:
    """Seconds of a training step on a whole minibatch.

    `measured` holds the steps measured so far: one that costs the same as a known one is not
    measured again.
    """
    batch = config.data_loader.args.batch_size
    side = config.data_loader.args.get("image_size") or 32
    overrides = [
        *NO_DATA,
        ("system.device", str(settings.device)),
        ("system.num_threads", str(settings.threads)),
    ]
    if settings.smoke:
        overrides.append(("arch", '{"type": "simpleCNN", "args": null}'))
    config = validate(override(config.dump(), overrides), config.name)
    key = json.dumps([_costs(config), batch, side], sort_keys=True)
    if key not in measured:
        measured[key] = _measure_step(settings, config, batch, side)
    return measured[key]


def _measure_step(settings: Settings, config: Config, batch: int, side: int) -> float:
    """Seconds of a training step on a whole minibatch.

    On a CPU a step that takes longer than `MEASURED_SECONDS` is extrapolated from the times of as
    many images as take that long and of half as many.
    """
    trainer = build_trainer(config)

    def seconds(images: int) -> float:
        step = step_of(trainer, random_images(settings, images, side))
        return seconds_of(step, 1, warmup=0, device=settings.device).median

    few = FEW_IMAGES
    if CONV_LAYERS[config.arch.args.conv_layer_type] is ConvNorm2d:
        # From FOURIER_BATCH images on, ConvNorm computes in another way. Half of the images must
        # be enough for it, because whole minibatches are computed in that way.
        few = 2 * FOURIER_BATCH
    few = min(few, batch)
    # The warm-up.
    seconds(few)
    if settings.device.type == "cuda":
        seconds(batch)
        return seconds(batch)
    seconds_of_few = seconds(few)
    images = few
    if not settings.smoke:
        images = max(few, min(batch, int(few * MEASURED_SECONDS / seconds_of_few)))
    seconds_of_images = seconds_of_few
    if images != few:
        seconds_of_images = seconds(images)
    if images == batch:
        return seconds_of_images
    # A line, not a proportion: OCNN's penalty and the spectra of ConvNorm's kernels cost the same
    # for any minibatch.
    half = images // 2
    slope = max(0.0, seconds_of_images - seconds(half)) / (images - half)
    return seconds_of_images + (batch - images) * slope


def _costs(config: Config) -> list[object]:
    """Everything in a config that the time of a training step depends on."""
    adversarial, trainer = config.adversarial, config.trainer
    attack = (config.adversarial_method, adversarial.norm, adversarial.given, config.attack_bn_mode)
    extras = (
        trainer.OCNN,
        trainer.adv_repeats,
        trainer.ema_decay is not None,
        config.augmentation.mixup_alpha > 0,
    )
    arch = config.arch.model_dump(mode="json", exclude={"args": {"init", "zero_init_residual"}})
    return [arch, config.system.model_dump(mode="json"), attack, extras, config.optimizer.type]
