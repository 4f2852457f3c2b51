"""The images that a model is evaluated on, from any source of data."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from attacks.arguments import check_count
from attacks.attack import check_batch
from attacks.classifier import Model, checked_logits
from attacks.frozen import frozen
from base.base_data_loader import BaseDataLoader
from base.device import NO_ENGINE, is_out_of_memory, memory_explained, to_device
from base.distributed import rank, world_size

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

Data = BaseDataLoader | Iterable[tuple[Tensor, Tensor]]
"""A source of images and labels: a loader of this project, a `torch.utils.data.DataLoader`, a list
of batches, a generator."""


@dataclass(frozen=True)
class Batch:
    """Some of the images, on the model's device.

    Attributes:
        images: `(B, C, H, W)` in `[0, 1]`.
        labels: int64 `(B,)`.
        positions: int64 `(B,)`, on the CPU: the positions of the images in the data.
    """

    images: Tensor
    labels: Tensor
    positions: Tensor

    def split(self, size: int) -> "list[Batch]":
        """Return the batch in parts of `size` images, the last with what is left."""
        columns = (self.images, self.labels, self.positions)
        parts = (column.split(size) for column in columns)
        return [Batch(*part) for part in zip(*parts, strict=True)]


class FittingSize:
    """The number of images at a time that fit into memory. It is halved whenever memory runs out.

    Attributes:
        largest: the largest size that is still tried; None before memory has run out.
    """

    def __init__(self) -> None:
        self.largest: int | None = None

    def run(self, work: Callable[[int], Result], size: int) -> Result:
        """Return `work(size)`, with a smaller size if that does not fit into memory.

        If the work runs out of memory, or if cuDNN has no convolution that runs, it is done again
        with half the size. A warning names the size that fits.

        Raises:
            ConfigError: a single image does not fit.
            RuntimeError: cuDNN has no convolution for a single image.
        """
        ran_out = False
        while True:
            if self.largest is not None:
                size = min(size, self.largest)
            explained: AbstractContextManager[None] = nullcontext()
            if size == 1:
                explained = memory_explained("batch_size", 1)
            try:
                with explained:
                    result = work(size)
            except (MemoryError, RuntimeError) as error:
                may_fit = size > 1 and NO_ENGINE in str(error)
                if not (may_fit or is_out_of_memory(error)):
                    raise
            else:
                if ran_out:
                    logger.warning("out of memory: continuing with batches of %d images", size)
                return result
            # Not inside `except`, where the error still holds the work's tensors
            ran_out = True
            self.largest = max(1, size // 2)
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()


class Batches:
    """Batches of images with their positions, to be iterated once. With several processes these are
    the images of this process.

    A loader of this project knows the positions of its images. Images of other data are numbered
    from 0, in the order of iteration.

    Args:
        data: batches `(images, labels)`, neither shuffled nor augmented.
        model: the model that will be evaluated.
        device: the device of the model; None takes that of its parameters, and leaves the images on
            theirs for a function or a module without parameters.
        batch_size: images at a time; None takes the batches as they come.
        limit: take only the first `limit` images.
        sharded: whether each of several processes takes its shard of the images; False if `data` is
            this process's shard already.

    Raises:
        ValueError: `limit` or `batch_size` is not an integer of at least 1, the data has no images,
            or a batch is not `(images, labels)` with one label for
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
            if value is not None:
                check_count(name, value)
        self._rank = 0
        self._shards = 1
        if sharded:
            self._rank = rank()
            self._shards = world_size()
        if isinstance(data, BaseDataLoader):
            data = self._own_shard(data, batch_size, limit)
        self._data = data
        self._model = model
        if device is None:
            self._device = device_of(model)
        else:
            self._device = torch.device(device)
        self._batch_size = batch_size
        self._limit = limit
        self._iterator: Iterator[Batch] | None = None

    def _own_shard(
        self, loader: BaseDataLoader, batch_size: int | None, limit: int | None
    ) -> BaseDataLoader:
        """Return a loader of this process's images."""
        last = loader.n_samples
        if limit is not None:
            last = min(limit, last)
        if last == 0:
            raise ValueError("data: contains no images")
        if self._shards == 1 and last == loader.n_samples and batch_size is None:
            return loader
        shard = loader.subset(torch.arange(last)).shard(self._rank, self._shards)
        shard.batch_size = batch_size or loader.batch_size
        return shard

    @cached_property
    def first(self) -> Batch:
        """The first batch; iterating yields it, too."""
        if isinstance(self._data, BaseDataLoader):
            self._data.set_epoch(1)
            batches = self._of_loader(self._data, 0)
        else:
            # A generator cannot be iterated again: `without` goes on with the same iterator.
            batches = self._iterator = self._of_iterable(self._data)
        try:
            return next(batches)
        except StopIteration:
            raise ValueError("data: contains no images") from None

    @cached_property
    def num_classes(self) -> int:
        """The number of the model's classes, counted in its logits for one image."""
        with torch.inference_mode(False), torch.no_grad(), frozen(self._model, training=False):
            return checked_logits(self._model, self.first.images[:1]).shape[1]

    def __iter__(self) -> Iterator[Batch]:
        return self.without(torch.empty(0, dtype=torch.int64))

    def without(self, known: Tensor) -> Iterator[Batch]:
        """Yield the batches without the images at `known` positions `(n,)`.

        For a loader of this project these must be its first images; they are not read again.
        """
        if isinstance(self._data, BaseDataLoader):
            skip = self._batches_of(self._data, len(known))
            self._data.set_epoch(1, first_batch=skip)
            yield from self._of_loader(self._data, skip)
            # The next iteration, which may be a caller's own, begins at the first batch again.
            self._data.set_epoch(1)
            return
        first = self.first
        for batch in chain([first], self._iterator or ()):
            new = ~torch.isin(batch.positions, known)
            if new.all():
                yield batch
            elif new.any():
                on_device = new.to(batch.images.device)
                yield Batch(batch.images[on_device], batch.labels[on_device], batch.positions[new])

    def count(self, known: int = 0) -> int | None:
        """Return how many batches follow the `known` images; None if that cannot be known."""
        if isinstance(self._data, BaseDataLoader):
            return len(self._data) - self._batches_of(self._data, known)
        # Known images, another batch size or a limit change the number of batches.
        changed = known > 0 or self._batch_size is not None or self._limit is not None
        if changed or not isinstance(self._data, Sized):
            return None
        return len(self._data)

    @staticmethod
    def _batches_of(loader: BaseDataLoader, images: int) -> int:
        # Division that rounds up
        return -(-images // loader.batch_size)

    def _of_loader(self, loader: BaseDataLoader, skip: int) -> Iterator[Batch]:
        done = skip * loader.batch_size
        for images, labels in loader:
            positions = loader.positions[done : done + len(labels)]
            done += len(labels)
            yield self._on_device(images, labels, positions)

    def _of_iterable(self, data: Iterable[Any]) -> Iterator[Batch]:
        done = 0
        for batch in data:
            images, labels = _pair(batch)
            check_batch(images, labels)
            positions = torch.arange(done, done + len(images))
            if self._limit is not None:
                positions = positions[: self._limit - done]
            # Every process reads all images and takes every `_shards`-th, as loaders do.
            own = positions[positions % self._shards == self._rank]
            within = own - done
            size = self._batch_size or max(1, len(own))
            for begin in range(0, len(own), size):
                chosen = within[begin : begin + size]
                yield self._on_device(
                    images[chosen.to(images.device)],
                    labels[chosen.to(labels.device)],
                    own[begin : begin + size],
                )
            done += len(images)
            if self._limit is not None and done >= self._limit:
                return

    def _on_device(self, images: Tensor, labels: Tensor, positions: Tensor) -> Batch:
        if self._device is not None:
            images = to_device(images, self._device)
        labels = to_device(labels, images.device)
        return Batch(images, labels.long(), positions)


def device_of(model: Model) -> torch.device | None:
    """Return the device of a module's weights; None for a function or a module without weights."""
    if not isinstance(model, nn.Module):
        return None
    return next((tensor.device for tensor in chain(model.parameters(), model.buffers())), None)


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    """Return the images and labels of a batch.

    Raises:
        ValueError: the batch is not a pair.
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
