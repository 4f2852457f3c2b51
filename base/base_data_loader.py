"""BaseDataLoader: everything that the project asks of a data set."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from base.distributed import Shard, shard_of


class BaseDataLoader(ABC):
    """Labeled images of one part of a data set, which can be iterated over in batches.

    A subclass sets `labels` and `class_names` and writes two methods, `images_at` and
    `test_loader`; everything else has a default. A class in `base.registry.DATA_LOADERS` can be
    trained on: order, epochs, subsets, validation split, label noise and augmentation are then done
    around it (see `data_loader.own_images`), as pure functions of seed, epoch and batch.

    Iterating yields `images` float32 `(B, C, H, W)` in `[0, 1]` and `labels` int64 `(B,)`; whoever
    asks for them moves them to its model's device. What a batch holds is a pure function of
    (seed, epoch, batch index): neither earlier batches nor the number of worker processes change
    it, so `set_epoch(e, first_batch=b)` continues an interrupted epoch exactly.

    Attributes:
        labels: int64 `(N,)` in `[0, num_classes)`, in the order of the data set.
        class_names: the classes' names in label order.
        device: where batches are made.
        batch_size: images in a full batch; the last batch of an epoch may hold fewer.
        shard_batches: where several processes train together: yield this process's part of every
            batch (see `base.distributed.shard.Shard`) instead of the whole. Order and augmentation
            are those of the whole batch either way.
        default_mean, default_std: published statistics of the data set's pixels, where there are
            any; without them, training computes its own.
        mean, std: per channel, in `[0, 1]`: what a model normalizes these images by.
        num_classes: number of classes.
        n_samples: images in one epoch.
        image_shape: `(C, H, W)`.
        positions: int64 `(n_samples,)`, for each image of an unshuffled loader its place in the
            part of the data set it was taken from.
        clean_labels: where the labels of an unshuffled loader carry noise, int64 `(n_samples,)`
            labels before the noise in the order of iteration, on `device`; None where they are
            clean.
        names_validation: whether the data set names its validation images itself.
        remarks: lines that the log of a run should hold about the data set.
        warnings: lines that it should warn of.
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
        """The images at int64 `positions` `(B,)`, which are on the CPU, in that order.

        float32 `(B, C, H, W)` in `[0, 1]`, or uint8, which is divided by 255. The same images
        whenever it is asked.
        """

    @abstractmethod
    def test_loader(self) -> "BaseDataLoader":
        """The test set, neither shuffled nor augmented, always with clean labels."""

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
        """The number of batches in a whole epoch, whatever `first_batch` is."""
        return -(-self.n_samples // self.batch_size)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch (from 1 on) whose order and augmentation the next iteration uses, and
        the batch it begins with."""
        self._epoch, self._first_batch = epoch, first_batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of the current epoch, from `first_batch` on."""
        return self._batches(self._epoch, self._first_batch)

    def _batches(self, epoch: int, first_batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        device = torch.device(self.device)
        order, labels = self.order(epoch).to(device), self.labels.to(device)
        whole = order.split(self.batch_size)[first_batch : len(self)]
        shards = [self._shard(len(batch)) for batch in whole]
        batches = [batch[shard.part] for batch, shard in zip(whole, shards, strict=True)]
        images_of = zip(batches, shards, self.image_batches(batches), strict=True)
        for number, (positions, shard, images) in enumerate(images_of, start=first_batch):
            images = images.to(device, non_blocking=True)
            yield self.augmented(images, epoch, number, shard), labels[positions]

    def _shard(self, total: int) -> Shard:
        return shard_of(total) if self.shard_batches else Shard(total)

    def order(self, epoch: int) -> Tensor:
        """int64: the positions of the images in the order in which an epoch yields them."""
        return torch.arange(len(self.labels))

    def image_batches(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """The images at each of these positions, which are on `device`; see `images_at`. A class
        that can work ahead does it here."""
        if not batches:
            return iter(())
        # one copy from the device for all of them: each makes the host wait
        on_host = torch.cat(tuple(batches)).cpu().split([len(batch) for batch in batches])
        return (self.images_at(positions) for positions in on_host)

    def augmented(self, images: Tensor, epoch: int, number: int, shard: Shard) -> Tensor:
        """Pixels on `device` as they are trained on, float32 in `[0, 1]`.

        Args:
            images: as `image_batches` gives them.
            epoch: that of the batch, from 1 on.
            number: of the batch in its epoch, from 0 on.
            shard: of the batch that `images` are.
        """
        return to_float(images)

    def subset(self, index: Tensor) -> "BaseDataLoader":
        """A loader of the images at `index` (int64, positions in `labels`), in that order, neither
        shuffled nor augmented."""
        return Subset(self, index)

    def shard(self, rank: int, processes: int) -> "BaseDataLoader":
        """A loader of every `processes`-th image from number `rank` on: what one of several
        processes evaluates."""
        if processes == 1:
            return self
        return self.subset(torch.arange(rank, self.n_samples, processes))

    def split_validation(self) -> "BaseDataLoader | None":
        """The held-out part of the training set, neither shuffled nor augmented; None where nothing
        is held out."""
        return None

    def prepare(self) -> None:  # noqa: B027 - optional
        """Do now what can fail, so that broken data is found before training.

        Raises:
            DataError: an image cannot be read.
        """

    def fingerprint(self) -> str:
        """Hexadecimal digest of the labels: a run goes on only with the same ones."""
        labels = self.labels.cpu().numpy().astype("<i8")
        return hashlib.sha256(labels.tobytes()).hexdigest()

    def image_digest(self) -> str:
        """Hexadecimal digest of the images, by which processes make sure that they have the same
        ones; empty where a loader does not know it."""
        return ""

    def image_fingerprints(self) -> dict[str, str]:
        """What images a run trains and is tested on: a name in words -> digest of them; empty where
        that is not known.

        A digest depends on what the images are, not on where they lie, so that data may move
        between two parts of a run.
        """
        return {}

    def label_arrays(self) -> dict[str, np.ndarray]:
        """What `labels.npz` of a run folder holds: `train_index, train_label, train_clean_label`
        and the same for `val`, all int64.

        An index is a position in the original training set. Validation images that the data set
        names itself are numbered on from its end. With label noise there is also
        `transition_matrix`, float64, of the training labels.
        """
        validation = self.split_validation()
        held_out = np.empty(0, np.int64) if validation is None else _int64(validation.labels)
        labels = _int64(self.labels)
        return {
            "train_index": np.arange(len(labels)),
            "train_label": labels,
            "train_clean_label": labels.copy(),
            "val_index": len(labels) + np.arange(len(held_out)),
            "val_label": held_out,
            "val_clean_label": held_out.copy(),
        }

    def noise_report(self) -> dict[str, Any] | None:
        """What the label noise amounts to, in plain values for JSON; None without noise.

        `train_rate` is the share of training labels that it has changed.
        """
        return None

    def noise_warning(self) -> str | None:
        """Why the noise is not what was asked for; None where it is, and without noise."""
        return None

    def sample_names(self) -> Sequence[str] | None:
        """What to call each image in tables, in the order of `labels`, such as its file's path
        below the data set's folder; None where images have no names."""
        return None


class Subset(BaseDataLoader):
    """Some images of another loader, neither shuffled nor augmented.

    Args:
        whole: the loader.
        index: int64, positions in its `labels`.
    """

    def __init__(self, whole: BaseDataLoader, index: Tensor) -> None:
        self.whole, self.index = whole, index.cpu()
        self.class_names, self.num_classes = whole.class_names, whole.num_classes
        self.image_shape = whole.image_shape
        self.mean, self.std = whole.mean, whole.std
        self.device, self.batch_size = whole.device, whole.batch_size
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
        return None if names is None else [names[position] for position in self.index.tolist()]


def to_float(images: Tensor) -> Tensor:
    """Pixels as float32 in `[0, 1]`: uint8 is divided by 255, floats stay as they are."""
    if images.dtype == torch.uint8:
        return images.to(torch.float32, copy=True).div_(255)
    return images


def _int64(labels: Tensor) -> np.ndarray:
    return labels.cpu().numpy().astype(np.int64)
