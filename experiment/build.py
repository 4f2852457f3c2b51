"""The parts that a config describes: data loader, model, trainer."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from functools import partial
from inspect import isabstract, signature
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from base.base_data_loader import BaseDataLoader
from base.base_model import BaseModel
from base.base_trainer import BaseTrainer, TrainerParts, Validate
from base.config import Config
from base.config.logged_values import ALWAYS
from base.config.training import TrainerConfig
from base.device import kernels_explained
from base.distributed import Shard, world_size
from base.distributed.session import is_connection_error
from base.distributed.sync_batch_norm import convert_sync_batchnorm
from base.errors import ConfigError
from base.meters import check_losses, check_metric
from base.optim import Schedule
from base.registry import TRAINERS, lookup
from base.seeding import seed_global_generators
from base.text import counted, first_line, one_line
from data_loader import DATA_LOADERS
from data_loader.label_noise import LabelNoise
from data_loader.own_images import build_loader
from evaluation.accuracy import evaluate
from experiment import build_attacks
from models import MODELS, build_model, model_arguments
from models.losses import LOSSES
from models.metrics import METRICS
from models.ocnn import penalty

MOST_CLASSES = 64
"""How many classes the made-up labels of `check_losses_and_metrics` have at most."""


def build_data_loader(config: Config, device: torch.device) -> BaseDataLoader:
    """Return the training loader of a config.

    If the config asks for no validation split, but needs validation images for a `val_` monitor or
    for robust validation, the loader holds out a tenth of every class.
    """
    settings = config.trainer
    args = config.data_loader.args.model_dump(exclude_none=True)
    # A schedule may watch a value, too, as ReduceLROnPlateau does.
    monitors = settings.monitor + (config.lr_scheduler.monitor or "")
    if ("val_" in monitors or config.adversarial.validate_every) and args["validation_split"] == 0:
        args["validation_split"] = 0.1
    noise = LabelNoise(
        kind=_noise_kind(settings),
        percent=settings.percent,
        law=settings.noise_law,
        file=settings.noise_file,
        key=settings.noise_key,
        on_validation=settings.noisy_validation,
    )
    # The trainer does the mixup.
    augmentation = config.augmentation.model_dump(exclude={"mixup_alpha"})
    name = config.data_loader.type
    arguments = {
        **args,
        **augmentation,
        "seed": config.seed,
        "subset_percent": settings.subset_percent,
        "noise": noise,
        "device": device,
    }
    return build_loader(name, lookup(DATA_LOADERS, name, "data_loader.type"), arguments)


def _noise_kind(settings: TrainerConfig) -> str:
    if settings.sym:
        return "sym"
    if settings.asym:
        return "asym"
    if settings.noise_file:
        return "file"
    return "none"


def completed_config(config: Config, loader: BaseDataLoader) -> Config:
    """Return the config with the classes and channels of its data set.

    This config is enough to build the model without the data.

    Raises:
        ConfigError: the config asks for other classes or channels than the data set has.
    """
    asked = config.arch.args.num_classes or config.num_classes
    if asked is not None and asked != loader.num_classes:
        key = "arch.args.num_classes" if config.arch.args.num_classes else "num_classes"
        raise ConfigError(
            f"{key}: {asked}, but {config.data_loader.type} has {loader.num_classes} classes"
        )
    channels = loader.image_shape[0]
    asked = config.arch.args.in_channels
    if asked is not None and asked != channels:
        raise ConfigError(
            f"arch.args.in_channels: {asked}, but the images of {config.data_loader.type} have"
            f" {channels} channels"
        )
    return with_shape(config, loader.num_classes, channels)


def with_shape(config: Config, num_classes: int, channels: int) -> Config:
    """Return the config with these classes and channels, if its model has such arguments."""
    facts = {"num_classes": num_classes, "in_channels": channels}
    taken = model_arguments(lookup(MODELS, config.arch.type, "arch.type"))
    filled = {name: value for name, value in facts.items() if name in taken}
    args = config.arch.args.model_copy(update=filled)
    return config.model_copy(update={"arch": config.arch.model_copy(update={"args": args})})


def build_completed_model(
    config: Config, *, mean: Sequence[float], std: Sequence[float], device: torch.device
) -> BaseModel:
    """Return the model of a completed config, with weights drawn from the config's seed."""
    arch = config.arch.model_dump(exclude_none=True)
    # The weights are drawn on the CPU, so that they are the same on every device.
    seed_global_generators(config.seed, "weights")
    model = build_model(arch, mean=mean, std=std).to(device)
    if config.system.sync_bn and world_size() > 1:
        model = convert_sync_batchnorm(model)
    if config.system.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model


def check_images_fit(model: BaseModel, loader: BaseDataLoader, name: str) -> None:
    """Run one forward pass in training mode with the smallest batch that a process will get.

    Raises:
        ConfigError: the network cannot take images of that size, or so few of them.
    """
    # The last rank has the smallest shard. Two images are enough: batch normalization fails on one.
    smallest = loader.n_samples % loader.batch_size or loader.batch_size
    shard = Shard(smallest, world_size() - 1, world_size())
    count = min(2, len(range(smallest)[shard.part]))
    images = torch.zeros(count, *loader.image_shape, device=next(model.parameters()).device)
    try:
        with torch.no_grad(), kernels_explained(images.device):
            # A copy, because training mode changes running statistics.
            deepcopy(model).train()(images)
    except (RuntimeError, ValueError, TypeError) as error:
        # Synchronized batch normalization communicates, and another process may have ended.
        if is_connection_error(error):
            raise
        size = f"{loader.image_shape[2]}x{loader.image_shape[1]}"
        reason = first_line(error)
        raise ConfigError(
            f"arch.type: {name} cannot be trained on batches of {counted(count, 'image')} of"
            f" {size}: {reason}"
        ) from None


@torch.no_grad()
def check_losses_and_metrics(config: Config, num_classes: int, device: torch.device) -> None:
    """Call the config's losses and metrics with made-up logits: those that break the contract of
    their table must not fail, or give wrong numbers, at the end of an epoch.

    Raises:
        ConfigError: naming the key, the entry and what it returned.
    """
    labels = torch.arange(min(num_classes, MOST_CLASSES), device=device).repeat(2)
    right = F.one_hot(labels, num_classes).float()
    # Half of the answers are hesitant, half are sure: a metric may count only some of them
    right[len(labels) // 2 :] *= 20
    wrong = right.roll(1, dims=1)
    # What training and what evaluation give as labels
    kinds = [labels, labels]
    if config.augmentation.mixup_alpha > 0:
        kinds[0] = F.one_hot(labels, num_classes).float()
    names = {"train_loss": config.train_loss, "val_loss": config.val_loss}
    for (key, name), targets in zip(names.items(), kinds, strict=True):
        losses = LOSSES[name](wrong, targets)
        check_losses(losses, len(labels), f"{key}: {name!r} must return")
    for name, metric in metrics(config).items():
        for targets in kinds:
            check_metric(name, metric, right, targets)
            check_metric(name, metric, torch.cat([right, wrong]), torch.cat([targets, targets]))


def check_image_counts(
    config: Config,
    training: BaseDataLoader,
    validation: BaseDataLoader | None,
    test: BaseDataLoader,
) -> None:
    """Check that every set of images that is sharded has at least one for each process.

    Raises:
        ConfigError: naming the set.
    """
    counts: dict[str, int | None] = {
        "data_loader.args.batch_size": training.batch_size,
        "the test set": test.n_samples,
    }
    if validation is not None:
        counts["the validation set"] = validation.n_samples
    if config.robust_validation_period:
        counts["adversarial.validate_images"] = config.adversarial.validate_images
    if config.reports_robustness:
        # None stands for the whole test set.
        counts["adversarial.report_images"] = config.adversarial.report_images
    for name, number in counts.items():
        if number is not None and number < world_size():
            raise ConfigError(
                f"{name}: {counted(number, 'image')} cannot be divided among {world_size()}"
                " processes"
            )


def build_trainer(
    config: Config,
    *,
    model: BaseModel,
    optimizer: Optimizer,
    schedule: Schedule,
    train_loader: BaseDataLoader,
    validate: Validate,
    precision: str,
    folder: Path,
    metadata: Mapping[str, Any],
) -> BaseTrainer:
    """Return the trainer of the config's training method; see `TrainerParts` for the arguments.

    Raises:
        ConfigError: the method does not accept the config's arguments for it.
    """
    threat = build_attacks.threat_model(config)
    parts = TrainerParts(
        config=config,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        train_loader=train_loader,
        validate=validate,
        loss=LOSSES[config.train_loss],
        metrics=metrics(config),
        penalty=ocnn_penalty(config),
        norm=threat.norm,
        epsilon=threat.epsilon,
        precision=precision,
        folder=folder,
        metadata=metadata,
    )
    method = check_method(config)
    try:
        # The constructor raises ValueError for arguments out of range.
        return method(parts, **method_arguments(config))
    except ValueError as error:
        raise ConfigError(f"adversarial: {method.__name__}: {one_line(error)}") from error


def check_method(config: Config) -> type[BaseTrainer]:
    """Return the class of the config's training method, after checking that it can be built.

    Raises:
        ConfigError: naming the method and what is wrong with it.
    """
    name = config.adversarial_method
    method = lookup(TRAINERS, name, "adversarial.method")
    key = f"adversarial.method: {name!r}"
    # A user's own code can put anything into the table.
    if not isinstance(method, type) or not issubclass(method, BaseTrainer):
        raise ConfigError(f"{key} is not a subclass of base.base_trainer.BaseTrainer")
    if isabstract(method):
        raise ConfigError(
            f"{key}: {method.__name__} lacks {', '.join(sorted(method.__abstractmethods__))}"
        )
    if config.augmentation.mixup_alpha > 0 and not method.takes_mixup:
        raise ConfigError(
            f"augmentation.mixup_alpha: {method.__name__} takes labels, not mixup's class"
            " probabilities"
        )
    try:
        signature(method).bind("parts", **method_arguments(config))
    except TypeError as error:
        raise ConfigError(f"{key} cannot be called as (parts, **arguments): {error}") from None
    return method


def method_arguments(config: Config) -> dict[str, Any]:
    """Return the arguments of the config's training method, sizes in units of the pixel range."""
    return build_attacks.entry_arguments(
        config.adversarial, config.adversarial_method, config.adversarial.norm
    )


def metrics(config: Config) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Return the config's metrics, and always top-1 and top-5, which results are reported in."""
    # `dict.fromkeys` keeps each name once, in this order.
    return {name: METRICS[name] for name in dict.fromkeys([*ALWAYS, *config.metrics])}


def evaluator(
    config: Config, autocast: Callable[[], AbstractContextManager]
) -> Callable[..., dict[str, float]]:
    """Return `evaluate(model, loader, description=...)` with the config's loss and metrics."""
    return partial(
        evaluate, loss=LOSSES[config.val_loss], metrics=metrics(config), autocast=autocast
    )


def ocnn_penalty(config: Config) -> Callable[[nn.Module], Tensor] | None:
    """Return OCNN's weighted penalty, if the config asks for it."""
    if not config.trainer.OCNN:
        return None
    return lambda model: config.trainer.lamb_ocnn * penalty(model)
