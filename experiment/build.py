"""From a config to its parts: data loader, model, trainer. `experiment` puts them together."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from functools import partial
from inspect import isabstract, signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from base.base_data_loader import BaseDataLoader
from base.base_model import BaseModel
from base.base_trainer import BaseTrainer, TrainerParts, Validate
from base.config import Config
from base.config.names import ALWAYS
from base.device import determinism_explained
from base.distributed import Shard, world_size
from base.distributed.session import is_of_connection
from base.distributed.sync_batch_norm import convert_sync_batchnorm
from base.errors import ConfigError
from base.optim import Schedule
from base.registry import TRAINERS, lookup
from base.seeding import seed_global_generators
from base.text import first_line, one_line
from data_loader import DATA_LOADERS
from data_loader.label_noise import LabelNoise
from data_loader.own_images import build_loader
from evaluation.accuracy import evaluate
from experiment import build_attacks
from models import MODELS, arguments_of, build_model
from models.losses import LOSSES
from models.metrics import METRICS
from models.ocnn import penalty

HELD_OUT_BY_DEFAULT = 0.1


def build_data_loader(config: Config, device: torch.device) -> BaseDataLoader:
    """The training loader of a config.

    It holds out a tenth of every class where the config needs validation images, for a `val_`
    monitor or robust validation, and asks for no validation split."""
    settings, args = config.trainer, config.data_loader.args.model_dump(exclude_none=True)
    monitors = settings.monitor + (config.lr_scheduler.monitor or "")
    if ("val_" in monitors or config.adversarial.validate_every) and args["validation_split"] == 0:
        args["validation_split"] = HELD_OUT_BY_DEFAULT
    kind = (
        "sym"
        if settings.sym
        else "asym"
        if settings.asym
        else "file"
        if settings.noise_file
        else "none"
    )
    noise = LabelNoise(
        kind=kind,
        percent=settings.percent,
        law=settings.noise_law,
        file=settings.noise_file,
        key=settings.noise_key,
        on_validation=settings.noisy_validation,
    )
    # mixup is done by the trainer
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


def completed_config(config: Config, loader: BaseDataLoader) -> Config:
    """The config with what its data set decides, `FILLED_FROM_DATA`: it is enough to build the
    model without the data.

    Raises:
        ConfigError: the config asks for other classes or channels than the data set has.
    """
    asked = config.arch.args.num_classes or config.num_classes
    if asked is not None and asked != loader.num_classes:
        raise ConfigError(
            f"arch.args.num_classes: {asked}, but {config.data_loader.type} has"
            f" {loader.num_classes} classes"
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
    """The config with a number of classes and of channels, as far as its model takes them."""
    facts = {"num_classes": num_classes, "in_channels": channels}
    taken = arguments_of(lookup(MODELS, config.arch.type, "arch.type"))
    filled = {name: value for name, value in facts.items() if name in taken}
    args = config.arch.args.model_copy(update=filled)
    return config.model_copy(update={"arch": config.arch.model_copy(update={"args": args})})


def build_experiment_model(
    config: Config, loader: BaseDataLoader, device: torch.device
) -> BaseModel:
    """The config's model for the loader's classes and channels, with the loader's mean and std, on
    the device."""
    config = completed_config(config, loader)
    return build_network(config, mean=loader.mean, std=loader.std, device=device)


def build_network(
    config: Config, *, mean: Sequence[float], std: Sequence[float], device: torch.device
) -> BaseModel:
    """The model of a config that says its classes and channels, with weights of the config's
    seed."""
    arch = config.arch.model_dump(exclude_none=True)
    seed_global_generators(config.seed, "weights")
    model = build_model(arch, mean=mean, std=std).to(device)
    if config.system.sync_bn and world_size() > 1:
        model = convert_sync_batchnorm(model)
    if config.system.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model


def refuse_unfit_images(model: BaseModel, loader: BaseDataLoader, name: str) -> None:
    """Try one forward pass in training mode, on a copy, with the smallest batch that will occur in
    a process (two images are enough).

    Raises:
        ConfigError: the network cannot take images of that size, or so few.
    """
    smallest = loader.n_samples % loader.batch_size or loader.batch_size
    shard = Shard(smallest, world_size() - 1, world_size())
    count = min(2, len(range(smallest)[shard.part]))
    images = torch.zeros(count, *loader.image_shape, device=next(model.parameters()).device)
    try:
        with torch.no_grad(), determinism_explained():
            deepcopy(model).train()(images)
    except (RuntimeError, ValueError, TypeError) as error:
        # synchronized batch normalization asks the other processes, which may have ended
        if is_of_connection(error):
            raise
        size = f"{loader.image_shape[2]}x{loader.image_shape[1]}"
        reason = first_line(error)
        raise ConfigError(
            f"arch.type: {name} cannot be trained on batches of {count} images of {size}: {reason}"
        ) from None


def refuse_too_few_images(
    config: Config, training: BaseDataLoader, *others: BaseDataLoader | None
) -> None:
    """Refuse what cannot be shared out over all processes.

    Raises:
        ConfigError: naming the key.
    """
    adversarial, held_out, test = config.adversarial, *others
    attacked = adversarial.validate_images if config.robust_validation_period else None
    reported = adversarial.report_images if config.reports_robustness else None
    numbers = {
        "data_loader.args.batch_size": training.batch_size,
        "the validation set": None if held_out is None else held_out.n_samples,
        "the test set": test.n_samples,
        "adversarial.validate_images": attacked,
        "adversarial.report_images": reported,
    }
    for name, number in numbers.items():
        if number is not None and number < world_size():
            raise ConfigError(
                f"{name}: {number} images cannot be shared out over {world_size()} processes"
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
    """The trainer of the config's training method, with its arguments; the others are those of
    `TrainerParts`.

    Raises:
        ConfigError: the method does not take them.
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
        return method(parts, **method_arguments(config))
    except ValueError as error:
        raise ConfigError(f"adversarial: {method.__name__}: {one_line(error)}") from error


def check_method(config: Config) -> type[BaseTrainer]:
    """The class of the config's training method, which is one that can be called as the project
    calls it.

    Raises:
        ConfigError: naming the method and what does not fit.
    """
    name = config.adversarial_method
    method = lookup(TRAINERS, name, "adversarial.method")
    key = f"adversarial.method: {name!r}"
    if not isinstance(method, type) or not issubclass(method, BaseTrainer):
        raise ConfigError(f"{key} is not a subclass of base.base_trainer.BaseTrainer")
    if isabstract(method):
        raise ConfigError(
            f"{key}: {method.__name__} lacks {', '.join(sorted(method.__abstractmethods__))}"
        )
    if config.augmentation.mixup_alpha > 0 and not method.takes_mixup:
        raise ConfigError(
            f"augmentation.mixup_alpha: {method.__name__} takes labels, not mixup's class probabilities"
        )
    try:
        signature(method).bind("parts", **method_arguments(config))
    except TypeError as error:
        raise ConfigError(f"{key} cannot be called as (parts, **arguments): {error}") from None
    return method


def method_arguments(config: Config) -> dict[str, Any]:
    """The arguments of the config's training method, sizes in units of the pixel range."""
    return build_attacks.own_arguments(
        config.adversarial, config.adversarial_method, config.adversarial.norm
    )


def metrics(config: Config) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """The config's metrics, and always the two that results are reported in."""
    return {name: METRICS[name] for name in dict.fromkeys([*ALWAYS, *config.metrics])}


def evaluator(
    config: Config, autocast: Callable[[], AbstractContextManager]
) -> Callable[..., dict[str, float]]:
    """`(model, loader, description=...) -> mean loss and accuracies`, with the config's loss and
    metrics; see `evaluate`."""
    return partial(
        evaluate, loss=LOSSES[config.val_loss], metrics=metrics(config), autocast=autocast
    )


def ocnn_penalty(config: Config) -> Callable[[nn.Module], Tensor] | None:
    """OCNN's weighted penalty, where the config asks for it."""
    if not config.trainer.OCNN:
        return None
    return lambda model: config.trainer.lamb_ocnn * penalty(model)
