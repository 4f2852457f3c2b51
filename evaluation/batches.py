"""The images that a model is evaluated on, whatever they come from."""

from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from attacks.attack import check_batch, frozen
from attacks.classifier import Model, ask
from base.base_data_loader import BaseDataLoader
from base.distributed import rank, world_size

Data = BaseDataLoader | Iterable[tuple[Tensor, Tensor]]
"""A source of images and labels: a loader of this project, a `torch.utils.data.DataLoader`, a list
of batches, a generator."""


@dataclass(frozen=True)
class Batch:
    """Some of the images, on the model's device.

    Attributes:
        images: `(B, C, H, W)` in `[0, 1]`.
        labels: int64 `(B,)`.
        positions: int64 `(B,)`, on the CPU: which images of the data they are.
    """

    images: Tensor
    labels: Tensor
    positions: Tensor


class Batches:
    """Batches with the images' positions, to be iterated once; with several processes those of this
    one.

    A loader of this project knows its images' positions. Those of other data are numbers in the
    order of iteration, from 0 on.

    Args:
        data: batches `(images, labels)`, neither shuffled nor augmented.
        model: that the images are for.
        device: where it is; None asks its parameters, and leaves the images of a function, or of a
            module without any, where they are.
        batch_size: images at a time; None takes the batches as they come.
        limit: take the first that many images only.
        sharded: whether each of several processes takes its part of the images; False where `data`
            is this process's part already.

    Raises:
        ValueError: there are no images, or a batch is not `(images, labels)` with one label for
            each image and float pixels in `[0, 1]`.
    """

    def __init__(
        self,
        data: Data,
        model: Model,
        *,
        device: str | torch.device | None = None,
        batch_size: int | None = None,
        limit: int | None = None,
        sharded: bool = False,
    ) -> None:
        for name, value in (("limit", limit), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, not {value}")
        self._share, self._shares = (rank(), world_size()) if sharded else (0, 1)
        if isinstance(data, BaseDataLoader):
            data = self._part(data, batch_size, limit)
        self._data = data
        self._model = model
        self._device = device_of(model) if device is None else torch.device(device)
        self._batch_size, self._limit = batch_size, limit
        self._waiting: Iterator[Batch] | None = None

    def _part(
        self, loader: BaseDataLoader, batch_size: int | None, limit: int | None
    ) -> BaseDataLoader:
        last = loader.n_samples if limit is None else min(limit, loader.n_samples)
        if last == 0:
            raise ValueError("the loader holds no images to attack")
        if self._shares == 1 and last == loader.n_samples and batch_size is None:
            return loader
        part = loader.subset(torch.arange(last)).shard(self._share, self._shares)
        part.batch_size = batch_size or loader.batch_size
        return part

    @cached_property
    def first(self) -> Batch:
        """The first batch, which iterating yields, too."""
        if isinstance(self._data, BaseDataLoader):
            self._data.set_epoch(1)
            return next(self._of_loader(self._data, 0))
        self._waiting = self._of_iterable(self._data)
        try:
            return next(self._waiting)
        except StopIteration:
            raise ValueError("data: holds no images to attack") from None

    @cached_property
    def num_classes(self) -> int:
        """The classes of the model, which answers for one image."""
        with torch.inference_mode(False), torch.no_grad(), frozen(self._model, training=False):
            return ask(self._model, self.first.images[:1]).shape[1]

    def __iter__(self) -> Iterator[Batch]:
        return self.without(torch.empty(0, dtype=torch.int64))

    def without(self, known: Tensor) -> Iterator[Batch]:
        """The batches, but for images at `known` positions `(n,)`, which a loader of this project
        does not even read: they are its first ones."""
        if isinstance(self._data, BaseDataLoader):
            skip = -(-len(known) // self._data.batch_size)
            self._data.set_epoch(1, first_batch=skip)
            yield from self._of_loader(self._data, skip)
            self._data.set_epoch(1)
            return
        first = self.first
        for batch in chain([first], self._waiting or ()):
            new = ~torch.isin(batch.positions, known)
            if new.all():
                yield batch
            elif new.any():
                there = new.to(batch.images.device)
                yield Batch(batch.images[there], batch.labels[there], batch.positions[new])

    def count(self, known: int = 0) -> int | None:
        """How many batches follow the `known` images; None where the data does not tell."""
        if isinstance(self._data, BaseDataLoader):
            return len(self._data) - -(-known // self._data.batch_size)
        told = isinstance(self._data, Sized) and self._batch_size is None and self._limit is None
        return len(self._data) if told and not known else None

    def _of_loader(self, loader: BaseDataLoader, skip: int) -> Iterator[Batch]:
        done = skip * loader.batch_size
        for images, labels in loader:
            positions = loader.positions[done : done + len(labels)]
            done += len(labels)
            yield self._placed(images, labels, positions)

    def _of_iterable(self, data: Iterable[Any]) -> Iterator[Batch]:
        done = 0
        for batch in data:
            images, labels = _pair(batch)
            check_batch(images, labels)
            left = len(images) if self._limit is None else self._limit - done
            positions = torch.arange(done, done + len(images))[:left]
            done += len(images)
            own = positions[positions % self._shares == self._share]
            within = own - positions[:1]
            for part in range(0, len(own), self._batch_size or max(1, len(own))):
                size = self._batch_size or len(own)
                chosen = within[part : part + size]
                yield self._placed(
                    images[chosen.to(images.device)],
                    labels[chosen.to(labels.device)],
                    own[part : part + size],
                )
            if self._limit is not None and done >= self._limit:
                return

    def _placed(self, images: Tensor, labels: Tensor, positions: Tensor) -> Batch:
        if self._device is not None:
            images, labels = images.to(self._device), labels.to(self._device)
        return Batch(images, labels.long(), positions)


def device_of(model: Model) -> torch.device | None:
    """Where a module's weights are; None for a function, and for a module without any."""
    if not isinstance(model, nn.Module):
        return None
    return next((tensor.device for tensor in chain(model.parameters(), model.buffers())), None)


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    """Images and labels of a batch.

    Raises:
        ValueError: it is something else.
    """
    expected = "data: expected batches (images, labels)"
    if isinstance(batch, Tensor):
        raise ValueError(f"{expected}, not a tensor; a single batch is [(images, labels)]")
    if not isinstance(batch, tuple | list):
        raise ValueError(f"{expected}, not {type(batch).__name__}")
    if len(batch) != 2:
        raise ValueError(f"{expected}, not a {type(batch).__name__} of {len(batch)}")
    images, labels = batch
    return images, labels
