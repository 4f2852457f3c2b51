"""BaseDataLoader: what the trainer and the attacks see of any data set."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator

from torch import Tensor


class BaseDataLoader(ABC):
    """Batches of one split of one data set.

    Iterating yields `images` float32 `(B, C, H, W)` in `[0, 1]` and `labels` int64 `(B,)`, on the device the loader was built
    for. What a batch holds is a pure function of (seed, epoch, batch index): neither earlier batches nor the number of worker
    processes change it, so `set_epoch(e, first_batch=b)` continues an interrupted epoch exactly.

    Attributes:
        batch_size: images in a full batch; the last batch of an epoch may hold fewer.
        n_samples: images in one epoch.
        num_classes: number of classes; labels are in `[0, num_classes)`.
        class_names: the classes' names in label order.
        image_shape: `(C, H, W)`.
        mean: per-channel mean of the pixels, in `[0, 1]`.
        std: per-channel standard deviation of the pixels, in `[0, 1]`.
        labels: int64, the labels in the order of the data set, on the loader's device.
        positions: int64, for each image of an unshuffled loader its place in the part of the data set it was taken from.
        clean_labels: where the labels of an unshuffled loader carry noise, int64 `(n_samples,)` labels before the noise in the
            order of iteration, on the loader's device; None where the labels are clean.
        names_validation: whether the data set names its validation images itself.
        remarks: lines that the log of a run should hold about the data set.
    """

    batch_size: int
    n_samples: int
    num_classes: int
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    labels: Tensor
    positions: Tensor
    clean_labels: Tensor | None = None
    names_validation: bool = False
    remarks: tuple[str, ...] = ()

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of the current epoch, from `first_batch` on."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of batches in a whole epoch, whatever `first_batch` is."""

    @abstractmethod
    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch (from 1 on) whose order and augmentation the next iteration uses, and the batch it begins with."""

    @abstractmethod
    def subset(self, index: Tensor) -> "BaseDataLoader":
        """A loader of the images at `index` (int64, positions in `labels`), in that order, neither shuffled nor augmented."""

    @abstractmethod
    def split_validation(self) -> "BaseDataLoader | None":
        """The held-out part of the training set, neither shuffled nor augmented; None where nothing is held out."""

    @abstractmethod
    def test_loader(self) -> "BaseDataLoader":
        """The test set, neither shuffled nor augmented, always with clean labels."""

    def fingerprint(self) -> str:
        """Hexadecimal digest of the labels: a run goes on only with the same ones."""
        return hashlib.sha256(self.labels.cpu().numpy().astype("<i8").tobytes()).hexdigest()

    def image_digest(self) -> str:
        """Hexadecimal digest of the images, by which processes make sure that they have the same ones; empty where a loader
        does not know it."""
        return ""

    def image_fingerprints(self) -> dict[str, str]:
        """What images a run trains and is tested on: a name in words -> digest of them; empty where that is not known.

        A digest depends on what the images are, not on where they lie, so that data may move between two parts of a run.
        """
        return {}
