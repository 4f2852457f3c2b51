"""Build the training loader from any class of DATA_LOADERS.

Classes differ in which steps of the path read -> split -> subset -> noise -> batch -> augment they
leave to this project:

- a subclass of `TrainingDataLoader` only reads its data set, and inherits all other steps;
- a `BaseDataLoader` that returns images by position is wrapped in `OwnImages`, a
  `TrainingDataLoader` that takes the other steps;
- a `BaseDataLoader` with an `__iter__` or `order` of its own makes its batches itself. It is used
  as it is, and it is an error if the config asks for a step that it does not take.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from base.base_data_loader import BaseDataLoader
from base.config.arguments import parameters_of
from base.distributed import Shard, shard_of
from base.errors import ConfigError, DataError
from data_loader.contract import check_images, check_range, loader_errors
from data_loader.datasets import LabeledImages
from data_loader.images import LoadedImages
from data_loader.label_noise import LabelNoise
from data_loader.training_data_loader import TrainingDataLoader

BATCHING = ("__iter__", "__len__", "set_epoch", "order")
"""A class that overrides one of these methods of `BaseDataLoader` makes its batches itself."""

AUGMENTATION = ("crop_padding", "padding_mode", "flip", "cutout", "cutout_inside", "cutout_fill")
WORKERS = ("num_workers", "pin_memory")
WITHOUT_EFFECT = (*AUGMENTATION, *WORKERS, "shuffle", "seed")
"""Arguments that are ignored with a warning, and not refused, if a loader that makes its batches
itself does not take them."""

KEYS = {
    "seed": "seed",
    "subset_percent": "trainer.subset_percent",
    "noise": "trainer.percent",
    **{name: f"augmentation.{name}" for name in AUGMENTATION},
}
"""Argument -> its config key, for arguments outside of `data_loader.args`."""


def build_loader(
    name: str, make: Callable[..., BaseDataLoader], arguments: Mapping[str, Any]
) -> BaseDataLoader:
    """Build the training loader of an entry of DATA_LOADERS.

    Args:
        name: the entry's name, for messages.
        make: the entry.
        arguments: all arguments from the config and the framework. The entry gets those that its
            constructor takes; `OwnImages` gets the others, if the entry needs one.

    Raises:
        ConfigError: the config requests a step that no code would take, or an argument is missing.
        DataError: the data set cannot be read, or breaks the contract of `BaseDataLoader`.
    """
    names = _names(make)
    taken = {key: value for key, value in arguments.items() if key in names}
    left = {key: value for key, value in arguments.items() if key not in names}
    try:
        inspect.signature(make).bind(**taken)
    except TypeError as error:
        raise ConfigError(f"data_loader.args: {name}: {error}") from None
    with loader_errors(f"data_loader.type: {name}"):
        loader = make(**taken)
    if not isinstance(loader, BaseDataLoader):
        kind = type(loader).__name__
        raise ConfigError(f"data_loader.type: {name} makes a {kind}; expected a BaseDataLoader")
    if isinstance(loader, TrainingDataLoader) or _makes_batches(loader):
        _check_left(name, loader, left)
        return loader
    options = _names(TrainingDataLoader)
    # An argument that both take would be applied twice, except for these.
    twice = sorted((names & options) - {"seed", "device", "batch_size", *WORKERS})
    if twice:
        raise ConfigError(
            f"data_loader.type: {name} takes {', '.join(twice)}, which is done around a loader that"
            " returns images by position: drop the argument, or subclass TrainingDataLoader"
        )
    for key in left:
        if key not in options:
            raise ConfigError(f"data_loader.args.{key}: {name} takes no such argument")
    return OwnImages(loader, **{key: arguments[key] for key in options & arguments.keys()})


class OwnImages(TrainingDataLoader):
    """The training loader around a loader that returns images by position.

    Args:
        own: the loader of the training part.
        options: the arguments of `TrainingDataLoader`.
    """

    def __init__(self, own: BaseDataLoader, **options: Any) -> None:
        self.own = own
        self.default_mean = own.default_mean
        self.default_std = own.default_std
        super().__init__(**options)

    @property
    def _called(self) -> str:
        return type(self.own).__name__

    def read(self, train: bool) -> LabeledImages:
        where = f"data_loader.type: {self._called}"
        if train:
            with loader_errors(f"{where}.split_validation"):
                validation = self.own.split_validation()
            return _labeled(self.own, validation)
        with loader_errors(f"{where}.test_loader"):
            test = self.own.test_loader()
        return _labeled(test)

    def augmented(self, images: Tensor, epoch: int, number: int, shard: Shard) -> Tensor:
        # Its own augmentation first, on the pixels that it returned
        if type(self.own).augmented is not BaseDataLoader.augmented:
            images = self.own.augmented(images, epoch, number, shard)
        return super().augmented(images, epoch, number, shard)

    def _fits_in_memory(self, n_images: int) -> bool:
        # The user's loader decides whether it keeps pixels in memory.
        return False


def check_first_batch(loader: BaseDataLoader) -> None:
    """Check before training that a loader's batches keep the contract of `BaseDataLoader`.

    Raises:
        DataError: they do not; the message names the difference.
    """
    own = loader
    if isinstance(loader, OwnImages):
        own = loader.own
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
    shard = Shard(total)
    if loader.shard_batches:
        shard = shard_of(total)
    count = len(range(total)[shard.part])
    check_images(images, {0: count, **dict(enumerate(loader.image_shape, start=1))}, where)
    if images.dtype != torch.float32:
        raise DataError(f"{where}: yields {images.dtype} images; expected float32 in [0, 1]")
    check_range(images, where)
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or len(labels) != count:
        raise DataError(f"{where}: yields labels that are not an int64 tensor of shape ({count},)")


def _labeled(loader: BaseDataLoader, validation: BaseDataLoader | None = None) -> LabeledImages:
    """Describe one part of a data set by the loader that returns its images."""
    where = f"data_loader.type: {type(loader).__name__}"
    if not isinstance(loader, BaseDataLoader):
        raise DataError(f"{where}: expected a BaseDataLoader from test_loader and split_validation")
    with loader_errors(where):
        last = len(loader.labels) - 1
        class_names = loader.class_names
        names = loader.sample_names()
    if last < 0:
        raise DataError(f"{where}: labels: empty")
    if names is not None and len(names) != last + 1:
        raise DataError(f"{where}.sample_names returns {len(names)} names for {last + 1} labels")
    # The first and the last image find a wrong shape and labels that outnumber the images
    with loader_errors(f"{where}.images_at, asked for positions 0 and {last}"):
        first_and_last = loader.images_at(torch.tensor([0, last]))
    check_images(first_and_last, {0: 2}, f"{where}.images_at")
    images = LoadedImages(loader, np.arange(last + 1))
    part = LabeledImages(images, loader.labels, class_names, remarks=loader.remarks)
    if validation is not None:
        part = replace(part, validation=_labeled(validation))
    return part


def _makes_batches(loader: BaseDataLoader) -> bool:
    kind = type(loader)
    return any(getattr(kind, name) is not getattr(BaseDataLoader, name) for name in BATCHING)


def _check_left(name: str, loader: BaseDataLoader, left: Mapping[str, Any]) -> None:
    """Check the arguments that a loader which makes its batches itself does not take.

    An argument at its default asks for nothing. Otherwise, one of `WITHOUT_EFFECT` is a warning,
    and any other one an error.
    """
    defaults = inspect.signature(TrainingDataLoader.__init__).parameters
    ignored = []
    for key, value in left.items():
        dotted = KEYS.get(key, f"data_loader.args.{key}")
        if key not in defaults:
            raise ConfigError(f"{dotted}: {name} takes no such argument")
        done = defaults[key].default
        if key == "batch_size":
            done = loader.batch_size
        # Training moves batches to its own device.
        if value == done or key == "device":
            continue
        if isinstance(value, LabelNoise) and not value.active:
            continue
        if key in WITHOUT_EFFECT:
            ignored.append(dotted)
        else:
            raise ConfigError(
                f"{dotted}: {name} does not take {key}, so it would have no effect: let its"
                " constructor take it, or **options for its base class"
            )
    if ignored:
        warning = f"{', '.join(ignored)}: without effect: {name} does not take them"
        loader.warnings = (*loader.warnings, warning)


def _names(make: Callable[..., BaseDataLoader]) -> set[str]:
    """Return the names of a constructor's arguments."""
    return {parameter.name for parameter in parameters_of(make)}
