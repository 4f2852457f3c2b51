"""Training steps to be measured: a shipped config's own trainer, on images that need no
download.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from base.base_trainer import BaseTrainer
from base.config import Config, Override, load_config
from base.machine import set_machine
from base.precision import choose_precision
from base.rooms import ROOT
from benchmarks.original_conv_norm import use_original_conv_norm
from benchmarks.rows import Settings
from experiment.experiment import Experiment

BATCH_NORM, CONV_NORM, ORIGINAL = "BatchNorm", "ConvNorm", "ConvNorm as published"
LAYERS: dict[str, list[Override]] = {
    BATCH_NORM: [("arch.args.conv_layer_type", "conv"), ("arch.args.norm_layer_type", "bn")],
    CONV_NORM: [("arch.args.conv_layer_type", "prec_conv"), ("arch.args.norm_layer_type", "no")],
    ORIGINAL: [("arch.args.conv_layer_type", "prec_conv"), ("arch.args.norm_layer_type", "no")],
}
"""The layers that are compared, as config values."""

NO_DOWNLOAD: list[Override] = [
    ("data_loader.type", "DigitsDataLoader"),
    ("data_loader.args.validation_split", "0"),
    ("trainer.monitor", "off"),
    ("adversarial.validate_every", "0"),
    ("lr_scheduler.type", "none"),
    ("lr_scheduler.args", "null"),
    # The same few images come again and again, which must not make the weights diverge.
    ("optimizer.args.lr", "0.001"),
]
"""scikit-learn's digits at 32 x 32 RGB in place of CIFAR-10's images: the time of a step does not
depend on their content.
"""


def precisions(settings: Settings) -> dict[str, list[Override]]:
    """Precision -> config values, for fp32 and then for what `auto` picks, if that differs."""
    automatic = choose_precision("auto", settings.device)
    return {
        precision: [("system.precision", precision)]
        for precision in dict.fromkeys(("fp32", automatic))
    }


def step_config(
    settings: Settings, overrides: Iterable[Override] = (), file: str = "cifar10.json"
) -> Config:
    """A shipped config on digits, with the device, threads and network of the settings."""
    base = [
        *NO_DOWNLOAD,
        ("system.device", str(settings.device)),
        ("system.num_threads", str(settings.threads)),
        ("arch.type", settings.network),
    ]
    return load_config(ROOT / "configs" / file, [*base, *overrides])


def build_trainer(config: Config, layers: str = "") -> BaseTrainer:
    """The trainer that the config asks for, in training mode.

    It has no run folder, so methods that write files must not be called.
    """
    set_machine(config.system)
    experiment = Experiment.from_config(config)
    if layers == ORIGINAL:
        # The parameters stay the same objects, so the optimizer updates them.
        use_original_conv_norm(experiment.model)
    trainer = experiment.build_trainer(Path())
    trainer.model.train()
    return trainer


def step_of(trainer: BaseTrainer, images: Tensor | None = None) -> Callable[[], object]:
    """One training step, on the first minibatch of the trainer's loader, or on `images` with the
    label 0.
    """
    if images is None:
        images, labels = next(iter(trainer.train_loader))
    else:
        labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    return lambda: trainer.train_batch(*trainer.mixup(images, labels))


def random_images(settings: Settings, batch: int, side: int) -> Tensor:
    """`(batch, 3, side, side)` in `[0, 1]`, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, 3, side, side, generator=generator).to(settings.device)
