"""Any entry of DATA_LOADERS as a loader to train on: what its class leaves to the framework is done
around it.

There are three kinds of them:

- a `TrainingDataLoader`, which only reads its data set, does everything itself;
- a `BaseDataLoader` that gives images by position: order, split, subset, noise and augmentation
  are done around it, by `OwnImages`;
- a `BaseDataLoader` that makes its batches itself, with an `__iter__` or `order` of its own: it is
  trained on as it is, and has to do what the config asks for, or the run is refused.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from base.base_data_loader import BaseDataLoader
from base.config.arguments import parameters_of
from base.distributed import Shard, shard_of
from base.errors import ConfigError, DataError
from data_loader.contract import asking, check_images, check_range
from data_loader.datasets import LabeledImages
from data_loader.images import LoadedImages
from data_loader.label_noise import LabelNoise
from data_loader.training_data_loader import TrainingDataLoader

BATCHING = ("__iter__", "__len__", "set_epoch", "order")
"""Methods of `BaseDataLoader`: a class that overrides one of them makes its batches itself."""

AUGMENTATION = ("crop_padding", "padding_mode", "flip", "cutout", "cutout_inside", "cutout_fill")
WORKERS = ("num_workers", "pin_memory")
WITHOUT_EFFECT = (*AUGMENTATION, *WORKERS, "shuffle", "seed")
"""Arguments that a loader which makes its batches itself may do without: a warning says so."""

KEYS = {
    "seed": "seed",
    "subset_percent": "trainer.subset_percent",
    "noise": "trainer.percent",
    **{name: f"augmentation.{name}" for name in AUGMENTATION},
}
"""Argument -> the config's key for it, where it is not one of `data_loader.args`."""


def build_loader(
    name: str, make: Callable[..., BaseDataLoader], arguments: Mapping[str, Any]
) -> BaseDataLoader:
    """The training loader of an entry of DATA_LOADERS.

    Args:
        name: the entry's, for messages.
        make: the entry.
        arguments: what the config and the framework have for it; those that it takes reach it, and
            what it leaves is done around it where that is possible.

    Raises:
        ConfigError: something is asked for that would not be done, or an argument is missing.
        DataError: the data set cannot be read, or is not what `BaseDataLoader` says.
    """
    takes = _names(make)
    taken = {key: value for key, value in arguments.items() if key in takes}
    left = {key: value for key, value in arguments.items() if key not in takes}
    try:
        inspect.signature(make).bind(**taken)
    except TypeError as error:
        raise ConfigError(f"data_loader.args: {name}: {error}") from None
    with asking(f"data_loader.type: {name}"):
        loader = make(**taken)
    if not isinstance(loader, BaseDataLoader):
        kind = type(loader).__name__
        raise ConfigError(f"data_loader.type: {name} makes a {kind}; expected a BaseDataLoader")
    if isinstance(loader, TrainingDataLoader) or _makes_batches(loader):
        _check_left(name, loader, left)
        return loader
    done_around = _names(TrainingDataLoader)
    twice = sorted((takes & done_around) - {"seed", "device", "batch_size", *WORKERS})
    if twice:
        raise ConfigError(
            f"data_loader.type: {name} takes {', '.join(twice)}, which is done around a loader that"
            " gives images by position: drop the argument, or subclass TrainingDataLoader"
        )
    for key in left:
        if key not in done_around:
            raise ConfigError(f"data_loader.args.{key}: {name} takes no such argument")
    return OwnImages(loader, **{key: arguments[key] for key in done_around & arguments.keys()})


class OwnImages(TrainingDataLoader):
    """The images of a loader that gives them by position, with everything that a run does to them.

    Args:
        own: the loader of the training part.
        options: the arguments of `TrainingDataLoader`.
    """

    def __init__(self, own: BaseDataLoader, **options: Any) -> None:
        self.own = own
        self.default_mean, self.default_std = own.default_mean, own.default_std
        super().__init__(**options)

    @property
    def _called(self) -> str:
        return type(self.own).__name__

    def read(self, train: bool) -> LabeledImages:
        part = "split_validation" if train else "test_loader"
        with asking(f"data_loader.type: {self._called}.{part}"):
            other = self.own.split_validation() if train else self.own.test_loader()
        return _labeled(self.own, other) if train else _labeled(other)

    def augmented(self, images: Tensor, epoch: int, number: int, shard: Shard) -> Tensor:
        if type(self.own).augmented is not BaseDataLoader.augmented:
            images = self.own.augmented(images, epoch, number, shard)
        return super().augmented(images, epoch, number, shard)

    def _fits_in_memory(self, n_images: int) -> bool:
        # where the pixels are is the loader's own business
        return False


def check_first_batch(loader: BaseDataLoader) -> None:
    """Refuse a loader whose batches are not what `BaseDataLoader` says, before training.

    Raises:
        DataError: in one line.
    """
    own = loader.own if isinstance(loader, OwnImages) else loader
    where = f"data_loader.type: {type(own).__name__}"
    expected = -(-loader.n_samples // loader.batch_size)
    if len(loader) != expected:
        raise DataError(
            f"{where}: __len__ is {len(loader)}; expected {expected} batches of"
            f" {loader.batch_size} for n_samples {loader.n_samples}"
        )
    loader.set_epoch(1)
    batch = next(iter(loader), None)
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise DataError(f"{where}: yields a {type(batch).__name__}; expected (images, labels)")
    images, labels = batch
    total = min(loader.batch_size, loader.n_samples)
    shard = shard_of(total) if loader.shard_batches else Shard(total)
    count = len(range(total)[shard.part])
    check_images(images, {0: count, **dict(enumerate(loader.image_shape, start=1))}, where)
    if images.dtype != torch.float32:
        raise DataError(f"{where}: yields {images.dtype} images; expected float32 in [0, 1]")
    check_range(images, where)
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or len(labels) != count:
        raise DataError(f"{where}: yields labels that are not an int64 tensor of shape ({count},)")


def _labeled(loader: BaseDataLoader, validation: BaseDataLoader | None = None) -> LabeledImages:
    """One part of a data set, from the loader that gives its images."""
    where = f"data_loader.type: {type(loader).__name__}"
    if not isinstance(loader, BaseDataLoader):
        raise DataError(f"{where}: expected a BaseDataLoader from test_loader and split_validation")
    with asking(where):
        last = len(loader.labels) - 1
        class_names, names = loader.class_names, loader.sample_names()
    if last < 0:
        raise DataError(f"{where}: labels: there are none")
    if names is not None and len(names) != last + 1:
        raise DataError(f"{where}.sample_names gives {len(names)} names for {last + 1} labels")
    with asking(f"{where}.images_at, asked for positions 0 and {last}"):
        images = loader.images_at(torch.tensor([0, last]))
    check_images(images, {0: 2}, f"{where}.images_at")
    return LabeledImages(
        LoadedImages(loader, np.arange(last + 1)),
        loader.labels,
        class_names,
        validation=None if validation is None else _labeled(validation),
        remarks=loader.remarks,
    )


def _makes_batches(loader: BaseDataLoader) -> bool:
    own, inherited = type(loader), BaseDataLoader
    return any(getattr(own, name) is not getattr(inherited, name) for name in BATCHING)


def _check_left(name: str, loader: BaseDataLoader, left: Mapping[str, Any]) -> None:
    """Refuse what the config asks for and nothing does; leave a warning of what has no effect."""
    defaults = inspect.signature(TrainingDataLoader.__init__).parameters
    idle = []
    for key, value in left.items():
        dotted = KEYS.get(key, f"data_loader.args.{key}")
        if key not in defaults:
            raise ConfigError(f"{dotted}: {name} takes no such argument")
        done = loader.batch_size if key == "batch_size" else defaults[key].default
        # where batches are is seen from the first one
        if value == done or key == "device":
            continue
        if isinstance(value, LabelNoise) and not value.active:
            continue
        if key in WITHOUT_EFFECT:
            idle.append(dotted)
        else:
            raise ConfigError(
                f"{dotted}: {name} does not take {key}, so it would not be done: let its constructor"
                " take it, or **options for its base class"
            )
    if idle:
        warning = f"{', '.join(idle)}: without effect: {name} does not take them"
        loader.warnings = (*loader.warnings, warning)


def _names(make: Callable[..., BaseDataLoader]) -> set[str]:
    """The names of a constructor's arguments."""
    return {parameter.name for parameter in parameters_of(make)}
