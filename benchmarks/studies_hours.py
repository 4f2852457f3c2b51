"""How many hours every shipped study and recipe would take on this hardware, computed from measured
training steps."""

import json
from pathlib import Path

from base.config import Config, Override, load_config, validate
from base.config.files import override
from base.registry import CONV_LAYERS
from benchmarks.growth import random_images
from benchmarks.rows import Settings, Table
from benchmarks.steps import NO_DOWNLOAD, ROOT, build_trainer, step_of
from benchmarks.table import number
from benchmarks.timing import seconds_of
from models.layers.conv_norm.layer import FOURIER_BATCH, ConvNorm2d
from studies.grid import plan

FEW, SECONDS = 4, 0.5
TRAINING_IMAGES = {"DigitsDataLoader": 1437}
OTHERWISE = 50_000
"""Training images of CIFAR, and of the image files that the small studies are made for."""

WITHOUT_DATA: list[Override] = [
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


def measure(settings: Settings) -> list[Table]:
    """One line for each grid of `configs/ablations`, and one for each config that trains a network
    by itself."""
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
    known: dict[str, float] = {}
    lines = [_line(settings, name, runs, known) for name, runs in studies.items()]
    heads = (
        "study",
        "runs",
        "networks",
        "updates of all runs",
        "s per update",
        "hours on this hardware",
    )
    return [Table("Hours of every shipped study", heads, tuple(lines), _note(settings, len(known)))]


def _few(settings: Settings, files: list[Path]) -> list[Path]:
    """All files; where it is only to be shown that everything runs, one."""
    return files[: settings.size(len(files), 1)]


def _note(settings: Settings, measured: int) -> str:
    line = f" (or the line through its times on as many images as take {SECONDS:g} s, and on half of them)"
    return (
        f"runs x epochs x minibatches x seconds of a training step with its attack, of which {measured} different ones were "
        f"measured once after a warm-up{'' if settings.device.type == 'cuda' else line}; no validation, no attack report, "
        "nothing scaled to other hardware"
    )


def _line(
    settings: Settings, name: str, runs: list[Config], known: dict[str, float]
) -> tuple[str, ...]:
    updates, seconds = 0, 0.0
    for config in runs:
        minibatches = config.trainer.epochs * _minibatches(config)
        updates += minibatches
        seconds += minibatches * _seconds_per_step(settings, config, known)
    networks = ", ".join(dict.fromkeys(config.arch.type for config in runs))
    return (
        name,
        str(len(runs)),
        networks,
        f"{updates:,}",
        number(seconds / updates),
        number(seconds / 3600),
    )


def _minibatches(config: Config) -> int:
    """Of one epoch."""
    args = config.data_loader.args
    share = min(config.trainer.subset_percent, 1 - args.validation_split)
    images = round(share * TRAINING_IMAGES.get(config.data_loader.type, OTHERWISE))
    return min(-(-images // args.batch_size), args.num_batches or images)


def _seconds_per_step(settings: Settings, config: Config, known: dict[str, float]) -> float:
    """Of a whole minibatch; a step that costs the same as a known one is not measured again."""
    batch, side = (
        config.data_loader.args.batch_size,
        config.data_loader.args.get("image_size") or 32,
    )
    machine = [
        ("system.device", str(settings.device)),
        ("system.num_threads", str(settings.threads)),
    ]
    smoke = [("arch", '{"type": "simpleCNN", "args": null}')] if settings.smoke else []
    measured = validate(override(config.dump(), [*WITHOUT_DATA, *machine, *smoke]), config.name)
    key = json.dumps([_costs(measured), batch, side], sort_keys=True)
    if key not in known:
        known[key] = _measured(settings, measured, batch, side)
    return known[key]


def _measured(settings: Settings, config: Config, batch: int, side: int) -> float:
    """Of a whole minibatch where that takes no longer than `SECONDS`, or the device is a GPU.

    Otherwise a line through the times of as many images as take so long and of half as many: what a
    step costs whatever its minibatch, such as OCNN's penalty or the spectra of ConvNorm's kernels,
    is counted once."""
    trainer = build_trainer(config)

    def seconds(images: int) -> float:
        step = step_of(trainer, random_images(settings, images, side))
        return seconds_of(step, 1, warmup=0, device=settings.device).median

    conv_norm = CONV_LAYERS[config.arch.args.conv_layer_type] is ConvNorm2d
    # half as many take the way of a whole minibatch, too
    few = min(2 * FOURIER_BATCH if conv_norm else FEW, batch)
    seconds(few)  # the warm-up
    if settings.device.type == "cuda":
        seconds(batch)
        return seconds(batch)
    of_few = seconds(few)
    fit = max(few, min(batch, int(few * settings.size(1, 0) * SECONDS / of_few)))
    whole = of_few if fit == few else seconds(fit)
    if fit == batch:
        return whole
    half = seconds(fit // 2)
    return whole + (batch - fit) * max(0.0, whole - half) / (fit - fit // 2)


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
