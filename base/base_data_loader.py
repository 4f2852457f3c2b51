"""BaseDataLoader: the interface through which the project uses a data set."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from base.device import to_device
from base.distributed import Shard, shard_of

DIGESTED_IMAGES = 64
"""The largest number of images that `data_digest` reads: enough to notice a corrupted data set."""


class BaseDataLoader(ABC):
    """Labeled images of one part of a data set, which can be iterated over in batches.

    A subclass sets `labels` and `class_names` and writes two methods, `images_at` and
    `test_loader`; everything else has a default. An entry in `base.registry.DATA_LOADERS` can be
    trained on: `data_loader.own_images` adds order, epochs, subsets, validation split, label noise
    and augmentation.

    Iterating yields `images` float32 `(B, C, H, W)` in `[0, 1]` and `labels` int64 `(B,)`, which
    the caller moves to its model's device. The contents of a batch are a pure function of (seed,
    epoch, batch index). They depend neither on earlier batches nor on the number of worker
    processes, so `set_epoch(e, first_batch=b)` continues an interrupted epoch exactly.

    Attributes:
        labels: int64 `(N,)` in `[0, num_classes)`, in the order of the data set.
        class_names: the classes' names in label order.
        device: where batches are made.
        batch_size: images in a full batch; the last batch of an epoch may hold fewer.
        shard_batches: where several processes train, yield only this process's shard of every
            batch (see `base.distributed.shard.Shard`). Order and augmentation are those of the
            whole batch in any case.
        default_mean, default_std: published statistics of the data set's pixels, per channel in
            `[0, 1]`; if they are None, training computes its own.
        mean, std: per channel, in `[0, 1]`; a model normalizes these images by them.
        num_classes: number of classes.
        n_samples: images in one epoch.
        image_shape: `(C, H, W)`.
        positions: int64 `(n_samples,)`, for each image of an unshuffled loader its position in the
            part of the data set it was taken from.
        clean_labels: where the labels of an unshuffled loader carry noise, int64 `(n_samples,)`
            labels before the noise in the order of iteration, on `device`; None if the labels are
            clean.
        names_validation: whether the data set names its validation images itself.
        remarks: lines about the data set for the log of a run.
        warnings: the same, logged as warnings.
    """

    default_mean: tuple[float, ...] | None = None
    default_std: tuple[float, ...] | None = None

    labels: Tensor
    class_names: Sequence[str]
    device: str | torch.device = "cpu"
    batch_size: int = 128
    shard_batches: bool = False
    clean_labels: Tensor | None = None
    names_validation: bool = False
    remarks: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    _epoch: int = 1
    _first_batch: int = 0

    @abstractmethod
    def images_at(self, positions: Tensor) -> Tensor:
        """Return the images at int64 `positions` `(B,)`, which are on the CPU, in that order.

        They are float32 `(B, C, H, W)` in `[0, 1]`, or uint8, which is divided by 255. Every call
        returns the same images.
        """

    @abstractmethod
    def test_loader(self) -> "BaseDataLoader":
        """Return the test set, neither shuffled nor augmented, always with clean labels."""

    @cached_property
    def num_classes(self) -> int:
        return len(self.class_names)

    @cached_property
    def n_samples(self) -> int:
        return len(self.labels)

    @cached_property
    def image_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.images_at(torch.arange(1)).shape[1:]
        return channels, height, width

    @cached_property
    def positions(self) -> Tensor:
        return torch.arange(self.n_samples)

    @cached_property
    def mean(self) -> tuple[float, ...]:
        return self.default_mean or (0.0,) * self.image_shape[0]

    @cached_property
    def std(self) -> tuple[float, ...]:
        return self.default_std or (1.0,) * self.image_shape[0]

    def __len__(self) -> int:
        """Return the number of batches in a whole epoch; `first_batch` does not change it."""
        return -(-self.n_samples // self.batch_size)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch whose order and augmentation the next iteration uses.

        Args:
            epoch: counted from 1.
            first_batch: the batch to begin with, counted from 0.
        """
        self._epoch = epoch
        self._first_batch = first_batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of the current epoch, from `first_batch` on."""
        # The generator gets its own copy: set_epoch does not change an iteration that has begun
        return self._batches(self._epoch, self._first_batch)

    def _batches(self, epoch: int, first_batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        device = torch.device(self.device)
        order = self.order(epoch).cpu()
        labels = self.labels.to(device)
        # A loader may yield fewer batches than there are images for (num_batches)
        whole_batches = order.split(self.batch_size)[first_batch : len(self)]
        shards = [self._shard(len(batch)) for batch in whole_batches]
        batches = [batch[shard.part] for batch, shard in zip(whole_batches, shards, strict=True)]
        loaded = zip(batches, shards, self.image_batches(batches), strict=True)
        for number, (positions, shard, images) in enumerate(loaded, start=first_batch):
            images = self.augmented(to_device(images, device), epoch, number, shard)
            yield images, labels[to_device(positions, device)]

    def _shard(self, total: int) -> Shard:
        if self.shard_batches:
            return shard_of(total)
        return Shard(total)

    def order(self, epoch: int) -> Tensor:
        """Return the positions of the images, int64, in the order in which an epoch yields them."""
        return torch.arange(len(self.labels))

    def image_batches(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the images of each batch.

        A class that can load images ahead does it here.

        Args:
            batches: int64 positions of the images of each batch, on the CPU.
        """
        return (self.images_at(positions) for positions in batches)

    def augmented(self, images: Tensor, epoch: int, number: int, shard: Shard) -> Tensor:
        """Return the images on `device` as they are trained on, float32 in `[0, 1]`.

        Args:
            images: as `image_batches` yields them.
            epoch: of the batch, counted from 1.
            number: of the batch in its epoch, counted from 0.
            shard: the part of the batch that `images` are.
        """
        return to_float(images)

    def subset(self, index: Tensor) -> "BaseDataLoader":
        """Return a loader of the images at `index` (int64, positions in `labels`), in that order,
        neither shuffled nor augmented."""
        return Subset(self, index)

    def shard(self, rank: int, processes: int) -> "BaseDataLoader":
        """Return the images that one of several processes evaluates: every `processes`-th, from
        number `rank` on."""
        if processes == 1:
            return self
        return self.subset(torch.arange(rank, self.n_samples, processes))

    def split_validation(self) -> "BaseDataLoader | None":
        """Return the held-out part of the training set, neither shuffled nor augmented; None where
        nothing is held out."""
        return None

    def prepare(self) -> None:  # noqa: B027 - optional
        """Find out now whether the data can be read, before any training.

        Raises:
            DataError: an image cannot be read.
        """

    def fingerprint(self) -> str:
        """Return a hexadecimal digest of the labels: a run is resumed only with the same ones."""
        # Of one byte order, so that the digest is the same on every machine
        labels = self.labels.cpu().numpy().astype("<i8")
        return hashlib.sha256(labels.tobytes()).hexdigest()

    def image_digest(self) -> str:
        """Return a hexadecimal digest of the images, with which processes check that they have the
        same ones; an empty string if the loader has none."""
        return ""

    def data_digest(self) -> str:
        """Return 16 hexadecimal digits for all labels and some of the images, which tell reports
        whether they describe the same data. Whether images are kept in memory does not matter."""
        step = -(-self.n_samples // DIGESTED_IMAGES)
        images = self.images_at(torch.arange(0, self.n_samples, step)).cpu().contiguous()
        digest = hashlib.sha256(f"{self.fingerprint()} {tuple(images.shape)}".encode())
        digest.update(images.numpy())
        # Random starts of attacks depend on them
        digest.update(self.positions.numpy())
        return digest.hexdigest()[:16]

    def image_fingerprints(self) -> dict[str, str]:
        """Return digests of the images that a run is trained and tested on, by a name in words;
        empty where they are not known.

        A digest depends on the contents of the images, not on their place, so that data may be
        moved before a run is resumed.
        """
        return {}

    def label_arrays(self) -> dict[str, np.ndarray]:
        """Return the contents of a run folder's `labels.npz`: `train_index, train_label,
        train_clean_label` and the same for `val`, all int64.

        An index is a position in the original training set. The numbers of validation images that
        the data set names itself follow those of the training set. With label noise there is also
        `transition_matrix`, float64, of the training labels.
        """
        labels = _int64(self.labels)
        held_out = np.empty(0, np.int64)
        validation = self.split_validation()
        if validation is not None:
            held_out = _int64(validation.labels)
        return {
            "train_index": np.arange(len(labels)),
            "train_label": labels,
            "train_clean_label": labels.copy(),
            "val_index": len(labels) + np.arange(len(held_out)),
            "val_label": held_out,
            "val_clean_label": held_out.copy(),
        }

    def noise_report(self) -> dict[str, Any] | None:
        """Summarize the effect of the label noise, in plain values for JSON; None without noise.

        `train_rate` is the share of training labels that it has changed.
        """
        return None

    def noise_warning(self) -> str | None:
        """Return why the realized noise differs from the config's; None if it does not, or if there
        is no noise."""
        return None

    def sample_names(self) -> Sequence[str] | None:
        """Return the name of each image for tables, in the order of `labels`, such as its file's
        path below the data set's folder; None where images have no names."""
        return None


class Subset(BaseDataLoader):
    """Some images of another loader, neither shuffled nor augmented.

    Args:
        whole: the loader.
        index: int64, positions in its `labels`.
    """

    def __init__(self, whole: BaseDataLoader, index: Tensor) -> None:
        self.whole = whole
        self.index = index.cpu()
        self.class_names = whole.class_names
        self.num_classes = whole.num_classes
        self.image_shape = whole.image_shape
        self.mean = whole.mean
        self.std = whole.std
        self.device = whole.device
        self.batch_size = whole.batch_size
        self.labels = whole.labels[index.to(whole.labels.device)]
        self.positions = whole.positions[self.index]
        if whole.clean_labels is not None:
            self.clean_labels = whole.clean_labels[index.to(whole.clean_labels.device)]

    def images_at(self, positions: Tensor) -> Tensor:
        return self.whole.images_at(self.index[positions])

    def test_loader(self) -> BaseDataLoader:
        return self.whole.test_loader()

    def sample_names(self) -> Sequence[str] | None:
        names = self.whole.sample_names()
        if names is None:
            return None
        return [names[position] for position in self.index.tolist()]


def to_float(images: Tensor) -> Tensor:
    """Return pixels as float32 in `[0, 1]`: uint8 is divided by 255, floats stay as they are."""
    if images.dtype == torch.uint8:
        # Copy, as the division is in place and the caller's images must stay
        return images.to(torch.float32, copy=True).div_(255)
    return images


def _int64(labels: Tensor) -> np.ndarray:
    return labels.cpu().numpy().astype(np.int64)
