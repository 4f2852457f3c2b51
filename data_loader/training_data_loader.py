"""TrainingDataLoader: the training part of a data set, its split, its label noise, and the way to
validation and test parts."""

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from base.errors import ConfigError, DataError
from base.seeding import numpy_generator
from base.text import one_line
from data_loader.contract import check_labels
from data_loader.datasets import LabeledImages
from data_loader.image_data_loader import ImageDataLoader
from data_loader.images import FileImages, Images, MemoryImages, pixel_statistics
from data_loader.label_noise import (
    CLEAN,
    LabelNoise,
    apply_noise,
    explain_rate,
    realized_rate,
    transition_matrix,
)
from data_loader.noise_file import NO_LABEL, read_noise_file
from data_loader.splits import stratified_split, stratified_subset

STATISTICS_SAMPLE = 5000
"""Images that mean and standard deviation are computed from where the images are not in memory."""

EVALUATION_BATCH = 256
"""Validation and test batches are at least this large: they need no gradients."""


class TrainingDataLoader(ImageDataLoader):
    """The training part of a data set, which also knows its validation and test parts.

    A subclass writes `read`, which returns images and labels of either part. One whose data set has
    arguments of its own takes them in its constructor, beside `**options` for this one:

        class Moons(TrainingDataLoader):
            def __init__(self, file: str, **options: Any) -> None:
                self.file = file
                super().__init__(**options)

            def read(self, train: bool) -> LabeledImages:
                ...

    The names up to `std` are those of ConvNorm's loaders.

    Args:
        batch_size: images per training batch; validation and test use max(batch_size, 256).
        shuffle: a new order every epoch.
        validation_split: fraction of every class that is held out, in `[0, 1)`; see
            `splits.stratified_split`. Without effect where the data set names its validation images
            itself.
        num_workers: processes that decode image files; data that is in memory needs none.
        pin_memory: page-locked batches for image files on the way to a CUDA device.
        num_batches: above 0 ends the training epoch after that many batches; validation and test
            are never shortened.
        mean: per-channel mean in `[0, 1]`; None for the data set's own: published constants for
            CIFAR, otherwise computed from the training images that are used (in memory from all,
            else from a seeded sample of 5,000).
        std: per-channel standard deviation in `[0, 1]`; None likewise.
        seed: of split, subset, noise, order and augmentation, each drawn independently.
        subset_percent: part of the whole training set to train on, in `(0, 1]`; see
            `splits.stratified_subset`.
        noise: what happens to training and validation labels; test labels are always clean. The law
            is applied to the labels of one split: the chosen subset, or the validation part.
        crop_padding: pixels of padding for random crops of training images; 0 for none.
        padding_mode: `zeros` or `reflect`; see `augment.random_crop`.
        flip: mirror half of the training images.
        cutout: side in pixels of a square overwritten in training images; 0 for none.
        cutout_inside: whether the square lies wholly inside the image.
        cutout_fill: its color: `mean`, or `black`.
        device: where batches shall be.

    Raises:
        DataError: data is missing or broken, a class has too few images for the fractions, or the
            noise does not fit.
    """

    def __init__(
        self,
        batch_size: int = 128,
        shuffle: bool = True,
        validation_split: float = 0.0,
        num_workers: int = 0,
        pin_memory: bool = False,
        num_batches: int = 0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        *,
        seed: int = 0,
        subset_percent: float = 1.0,
        noise: LabelNoise = CLEAN,
        crop_padding: int = 0,
        padding_mode: str = "zeros",
        flip: bool = False,
        cutout: int = 0,
        cutout_inside: bool = False,
        cutout_fill: str = "mean",
        device: str | torch.device = "cpu",
    ) -> None:
        self.num_workers = num_workers
        self.pin_memory = pin_memory and torch.device(device).type == "cuda"
        train = self._checked(self.read(train=True))
        self.names_validation = train.validation is not None
        self.remarks = train.remarks
        if train.validation is None:
            remaining, self._val_index = stratified_split(train.labels, validation_split, seed)
            self._val_images = train.images.select(self._val_index)
            val_labels = train.labels[self._val_index]
        else:
            remaining = np.arange(len(train.labels))
            validation = self._checked(train.validation, train.images.shape, train.class_names)
            self._val_images, val_labels = validation.images, validation.labels
            # their numbers go on behind those of the training set
            self._val_index = len(train.labels) + np.arange(len(val_labels))
        self._train_index = stratified_subset(remaining, train.labels, subset_percent, seed)
        self._noise = noise
        self._label_arrays = self._draw_labels(train, val_labels, seed)
        for name, given in (("mean", mean), ("std", std)):
            self._check_statistic(name, given, train.images.shape[0])
        self._validation: ImageDataLoader | None = None
        self._test_loader: ImageDataLoader | None = None
        super().__init__(
            train.images.select(self._train_index),
            self._label_arrays["train_label"],
            train.class_names,
            mean=self.default_mean if mean is None else mean,
            std=self.default_std if std is None else std,
            batch_size=batch_size,
            shuffle=shuffle,
            num_batches=num_batches,
            seed=seed,
            crop_padding=crop_padding,
            padding_mode=padding_mode,
            flip=flip,
            cutout=cutout,
            cutout_inside=cutout_inside,
            cutout_fill=cutout_fill,
            clean_labels=self._label_arrays["train_clean_label"] if noise.active else None,
            in_memory=self._fits_in_memory(len(self._train_index) + len(self._val_index)),
            device=device,
        )

    @abstractmethod
    def read(self, train: bool) -> LabeledImages:
        """The training part of the data set, or its test part, which is asked for after it.

        What it needs is in the attributes that the subclass sets before it calls this class's
        constructor; `num_workers` and `pin_memory` are set, too.

        Raises:
            DataError: data is missing or broken.
        """

    @property
    def _called(self) -> str:
        """The class's name, for messages."""
        return type(self).__name__

    def _checked(
        self,
        part: LabeledImages,
        shape: tuple[int, int, int] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> LabeledImages:
        """A part of the data set that keeps the contract; `shape` and `class_names` are those of
        the training images, where this is another part."""
        where = f"data_loader.type: {self._called}"
        if not isinstance(part.images, Images):
            found = type(part.images).__name__
            raise DataError(f"{where}: read: images: {found}; expected MemoryImages or FileImages")
        if isinstance(part.images, MemoryImages):
            part.images.check()
        labels = check_labels(part.labels, len(part.images), part.class_names, where)
        if shape not in (None, part.images.shape):
            raise DataError(
                f"{where}: images (C, H, W) of {part.images.shape}, but those that are trained on"
                f" have {shape}"
            )
        names = tuple(part.class_names)
        # the same classes in another order would be taken for each other
        if class_names not in (None, names):
            raise DataError(
                f"{where}: class_names {one_line(names, 80)} of its other images, but those that"
                f" are trained on have {one_line(class_names, 80)}"
            )
        return replace(part, labels=labels, class_names=names)

    def _check_statistic(self, name: str, given: Sequence[float] | None, channels: int) -> None:
        """Refuse a mean or a standard deviation, from the config or the class's own, that does not
        hold a number for each channel."""
        own = getattr(self, f"default_{name}")
        numbers = own if given is None else given
        if numbers is None or np.shape(numbers) == (channels,):
            return
        found = f"{len(numbers)} values" if np.ndim(numbers) == 1 else one_line(numbers, 80)
        problem = f"{found}, but the images have {channels} channels"
        if given is None:
            raise DataError(f"data_loader.type: {self._called}.default_{name}: {problem}")
        raise ConfigError(f"data_loader.args.{name}: {problem}")

    def _fits_in_memory(self, n_images: int) -> bool:
        """Whether so many images may be kept in memory."""
        return True

    def _draw_labels(
        self, train: LabeledImages, val_labels: np.ndarray, seed: int
    ) -> dict[str, np.ndarray]:
        noise, from_file = self._noise, None
        if noise.kind == "file":
            from_file = read_noise_file(
                str(noise.file), noise.key, train.labels, len(train.class_names)
            )
        arrays = {}
        for part, index, clean in (
            ("train", self._train_index, train.labels[self._train_index]),
            ("val", self._val_index, val_labels),
        ):
            if part == "val" and not noise.on_validation:
                noisy = clean
            elif from_file is None:
                noisy = apply_noise(
                    clean, train.class_names, noise, numpy_generator(seed, f"label noise {part}")
                )
            elif part == "val" and self.names_validation:
                # the file speaks of the training set
                noisy = clean
            else:
                noisy = self._labels_of_file(from_file, index, part)
            arrays.update(
                {f"{part}_index": index, f"{part}_label": noisy, f"{part}_clean_label": clean}
            )
        return arrays

    def _labels_of_file(self, labels: np.ndarray, index: np.ndarray, part: str) -> np.ndarray:
        chosen = labels[index]
        missing = int(np.sum(chosen == NO_LABEL))
        if missing:
            raise DataError(
                f"trainer.noise_file: {self._noise.file!r} holds no labels for {missing} of the "
                f"{len(index)} {part} images: its run used fewer images of the training set"
            )
        return chosen

    @cached_property
    def mean(self) -> tuple[float, ...]:
        return self._statistics[0]

    @cached_property
    def std(self) -> tuple[float, ...]:
        return self._statistics[1]

    @cached_property
    def _statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of the training images' pixels."""
        images = self.images
        if not isinstance(images, MemoryImages) and len(images) > STATISTICS_SAMPLE:
            drawn = numpy_generator(self._seed, "statistics").permutation(len(images))
            images = images.select(np.sort(drawn[:STATISTICS_SAMPLE]))
        return pixel_statistics(images)

    def prepare(self) -> None:
        """Decode now what is to stay in memory.

        Other files are decoded by the first epoch anyway, which finds a broken one.

        Raises:
            DataError: a file cannot be decoded, or images are not such.
        """
        images = self.images
        if not isinstance(images, FileImages):
            images.check()

    def split_validation(self) -> ImageDataLoader | None:
        if len(self._val_index) == 0:
            return None
        if self._validation is None:
            noisy = self._noise.active and self._noise.on_validation
            self._validation = self._evaluation_loader(
                LabeledImages(self._val_images, self._label_arrays["val_label"], self.class_names),
                clean_labels=self._label_arrays["val_clean_label"] if noisy else None,
                test=self.test_loader,
                in_memory=self._in_memory,
            )
        return self._validation

    def test_loader(self) -> ImageDataLoader:
        if self._test_loader is None:
            test = self._checked(self.read(train=False), self.image_shape, self.class_names)
            n_images = len(self._train_index) + len(self._val_index) + len(test.labels)
            # whether training images are kept must not depend on the test set: mean and std do
            # depend on it
            self._test_loader = self._evaluation_loader(
                test, in_memory=self._in_memory and self._fits_in_memory(n_images)
            )
        return self._test_loader

    def _evaluation_loader(
        self, part: LabeledImages, *, in_memory: bool, **options: Any
    ) -> ImageDataLoader:
        return ImageDataLoader(
            part.images,
            part.labels,
            part.class_names,
            mean=self.mean,
            std=self.std,
            batch_size=max(self.batch_size, EVALUATION_BATCH),
            seed=self._seed,
            in_memory=in_memory,
            device=self.device,
            **options,
        )

    def label_arrays(self) -> dict[str, np.ndarray]:
        """See `BaseDataLoader`; copies: changing them changes nothing here."""
        arrays = {name: array.copy() for name, array in self._label_arrays.items()}
        if self._noise.active:
            clean, noisy = arrays["train_clean_label"], arrays["train_label"]
            arrays["transition_matrix"] = transition_matrix(clean, noisy, self.num_classes)
        return arrays

    def noise_report(self) -> dict[str, Any] | None:
        """What the label noise amounts to, in plain values for JSON; None without noise.

        Rates are shares of changed labels in `[0, 1]`. `asked_rate` is the share of labels that the
        law picked (None for a file), `val_rate` is None where nothing is held out."""
        if not self._noise.active:
            return None
        arrays = self._label_arrays
        clean, noisy = arrays["train_clean_label"], arrays["train_label"]
        return {
            "kind": self._noise.kind,
            "law": self._noise.law if self._noise.kind == "sym" else None,
            "file": self._noise.file if self._noise.kind == "file" else None,
            "key": self._noise.key if self._noise.kind == "file" else None,
            "asked_rate": None if self._noise.kind == "file" else self._noise.percent,
            "train_rate": realized_rate(clean, noisy),
            "val_rate": realized_rate(arrays["val_clean_label"], arrays["val_label"])
            if len(self._val_index)
            else None,
        }

    def noise_warning(self) -> str | None:
        """See `label_noise.explain_rate`; None without noise."""
        arrays = self._label_arrays
        rate = realized_rate(arrays["train_clean_label"], arrays["train_label"])
        return explain_rate(self._noise, self.class_names, rate) if self._noise.active else None

    def fingerprint(self) -> str:
        """Hexadecimal digest of split and labels: two runs with the same one trained and validated
        on the same labels."""
        return _digest(self._label_arrays)

    def image_fingerprints(self) -> dict[str, str]:
        """Hexadecimal digests of the images that are trained and validated on, and of the test set
        with its labels."""
        held_out, test = self.split_validation(), self.test_loader()
        training = [self.image_digest()] + ([held_out.image_digest()] if held_out else [])
        labels = _digest({"test_label": test.labels.cpu().numpy()})
        return {
            "training images": " ".join(training),
            "test images": f"{test.image_digest()} {labels}",
        }


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(f"{name}:{len(array)}:".encode() + array.astype("<i8").tobytes())
    return digest.hexdigest()
