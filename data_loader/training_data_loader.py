"""TrainingDataLoader: the training part of a data set, and its validation and test loaders.

Its constructor takes the steps read -> split -> subset -> noise, in this order. The base class,
`ImageDataLoader`, does the last two, batch and augment. A subclass writes only `read`.
"""

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
"""The number of images that mean and standard deviation are computed from, if the images are not in
memory."""

EVALUATION_BATCH = 256
"""The smallest validation and test batch: without gradients, larger ones fit and are faster."""


class TrainingDataLoader(ImageDataLoader):
    """The training part of a data set, with loaders of its validation and test parts.

    A subclass writes `read`, which returns images and labels of either part. If it has arguments of
    its own, its constructor takes them beside `**options`:

        class Moons(TrainingDataLoader):
            def __init__(self, file: str, **options: Any) -> None:
                self.file = file
                super().__init__(**options)

            def read(self, train: bool) -> LabeledImages:
                ...

    The arguments up to `std` have the names of those of ConvNorm's loaders.

    Args:
        batch_size: images per training batch; validation and test use max(batch_size, 256).
        shuffle: a new order every epoch.
        validation_split: fraction of every class that is held out, in `[0, 1)`; see
            `splits.stratified_split`. Without effect if the data set names its validation images
            itself.
        num_workers: processes that decode image files; data in memory needs none.
        pin_memory: copy batches of decoding processes straight into page-locked memory. Batches are
            copied to a CUDA device from such memory in any case.
        num_batches: above 0 ends the training epoch after that many batches; validation and test
            are never shortened.
        mean: per-channel mean in `[0, 1]`; None for the data set's own: published constants for
            CIFAR, otherwise computed from the training images that are used (all of them in memory,
            or a seeded sample of 5,000 files).
        std: per-channel standard deviation in `[0, 1]`; None for the data set's own.
        seed: the seed of split, subset, noise, order and augmentation, each drawn independently.
        subset_percent: fraction of the whole training set to train on, in `(0, 1]`; see
            `splits.stratified_subset`.
        noise: noise of training and validation labels; test labels are always clean. It is applied
            to each split by itself: to the chosen subset, and to the validation part.
        crop_padding: pixels of padding for random crops of training images; 0 for none.
        padding_mode: `zeros` or `reflect`; see `augment.random_crop`.
        flip: mirror each training image with probability 1/2.
        cutout: side in pixels of a square overwritten in training images; 0 for none.
        cutout_inside: whether the square is wholly inside the image.
        cutout_fill: the color of the square: `mean` or `black`.
        device: the device of the batches.

    Raises:
        DataError: data is missing or broken, a class has too few images for the fractions, or the
            noise does not fit the data set.
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
        # Set before `read`, which may need them
        self.num_workers = num_workers
        self.pin_memory = pin_memory and torch.device(device).type == "cuda"
        # read
        train = self._checked(self.read(train=True))
        self.names_validation = train.validation is not None
        self.remarks = train.remarks
        # split
        if train.validation is None:
            remaining, self._val_index = stratified_split(train.labels, validation_split, seed)
            self._val_images = train.images.select(self._val_index)
            val_labels = train.labels[self._val_index]
        else:
            remaining = np.arange(len(train.labels))
            validation = self._checked(train.validation, train.images.shape, train.class_names)
            self._val_images = validation.images
            val_labels = validation.labels
            # Numbered on from the end of the training set
            self._val_index = len(train.labels) + np.arange(len(val_labels))
        # Subset, then noise: its rate holds for the labels that are trained on
        self._train_index = stratified_subset(remaining, train.labels, subset_percent, seed)
        self._noise = noise
        self._label_arrays = self._draw_labels(train, val_labels, seed)
        for name, given in (("mean", mean), ("std", std)):
            self._check_statistic(name, given, train.images.shape[0])
        self._validation: ImageDataLoader | None = None
        self._test_loader: ImageDataLoader | None = None
        if mean is None:
            mean = self.default_mean
        if std is None:
            std = self.default_std
        clean_labels = None
        if noise.active:
            clean_labels = self._label_arrays["train_clean_label"]
        # Batch and augment
        super().__init__(
            train.images.select(self._train_index),
            self._label_arrays["train_label"],
            train.class_names,
            mean=mean,
            std=std,
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
            clean_labels=clean_labels,
            in_memory=self._fits_in_memory(len(self._train_index) + len(self._val_index)),
            device=device,
        )

    @abstractmethod
    def read(self, train: bool) -> LabeledImages:
        """Read the training part of the data set, or the test part.

        The training part is read first, by the constructor of this class. A subclass therefore sets
        the attributes that `read` needs before it calls that constructor; `num_workers` and
        `pin_memory` are set, too.

        Args:
            train: True for the training part, False for the test part.

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
        """Check that a part of the data set keeps the contract of `BaseDataLoader`.

        Args:
            part: the part.
            shape: `(C, H, W)` of the training images; None if this is the training part.
            class_names: those of the training images; None if this is the training part.

        Returns:
            The part with labels as int64 arrays.
        """
        where = f"data_loader.type: {self._called}"
        if not isinstance(part.images, Images):
            found = type(part.images).__name__
            raise DataError(f"{where}: read: images: {found}; expected MemoryImages or FileImages")
        if isinstance(part.images, MemoryImages):
            part.images.check(where)
        labels = check_labels(part.labels, len(part.images), part.class_names, where)
        if shape not in (None, part.images.shape):
            raise DataError(
                f"{where}: images (C, H, W) of {part.images.shape}, but those that are trained on"
                f" have {shape}"
            )
        names = tuple(part.class_names)
        # In another order, labels would stand for other classes
        if class_names not in (None, names):
            raise DataError(
                f"{where}: class_names {one_line(names, 80)} of its other images, but those that"
                f" are trained on have {one_line(class_names, 80)}"
            )
        return replace(part, labels=labels, class_names=names)

    def _check_statistic(self, name: str, given: Sequence[float] | None, channels: int) -> None:
        """Check that a mean or standard deviation, given or the class's own, has one number per
        channel."""
        numbers = given
        if given is None:
            numbers = getattr(self, f"default_{name}")
        if numbers is None or np.shape(numbers) == (channels,):
            return
        found = one_line(numbers, 80)
        if np.ndim(numbers) == 1:
            found = f"{len(numbers)} values"
        problem = f"{found}, but the images have {channels} channels"
        if given is None:
            raise DataError(f"data_loader.type: {self._called}.default_{name}: {problem}")
        raise ConfigError(f"data_loader.args.{name}: {problem}")

    def _fits_in_memory(self, n_images: int) -> bool:
        """Whether this number of images may be kept in memory."""
        return True

    def _draw_labels(
        self, train: LabeledImages, val_labels: np.ndarray, seed: int
    ) -> dict[str, np.ndarray]:
        """Return the arrays of `label_arrays`: index, noisy and clean labels of both splits."""
        noise = self._noise
        from_file = None
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
                # The file holds labels of the training set only
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
        """Per-channel mean and standard deviation of the training images' pixels."""
        images = self.images
        if not isinstance(images, MemoryImages) and len(images) > STATISTICS_SAMPLE:
            drawn = numpy_generator(self._seed, "statistics").permutation(len(images))
            images = images.select(np.sort(drawn[:STATISTICS_SAMPLE]))
        return pixel_statistics(images)

    def prepare(self) -> None:
        """Decode the images that stay in memory, and check them.

        Raises:
            DataError: a file cannot be decoded, or a value is not an image.
        """
        images = self.images
        # The first epoch decodes the other files anyway, and finds a broken one.
        if not isinstance(images, FileImages):
            images.check()

    def split_validation(self) -> ImageDataLoader | None:
        if len(self._val_index) == 0:
            return None
        if self._validation is None:
            clean_labels = None
            if self._noise.active and self._noise.on_validation:
                clean_labels = self._label_arrays["val_clean_label"]
            self._validation = self._evaluation_loader(
                LabeledImages(self._val_images, self._label_arrays["val_label"], self.class_names),
                clean_labels=clean_labels,
                test=self.test_loader,
                in_memory=self._in_memory,
            )
        return self._validation

    def test_loader(self) -> ImageDataLoader:
        if self._test_loader is None:
            test = self._checked(self.read(train=False), self.image_shape, self.class_names)
            n_images = len(self._train_index) + len(self._val_index) + len(test.labels)
            # The test set must not decide whether training images are kept in memory, because mean
            # and std depend on that: they are computed from all images, or from a sample.
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
        """See `BaseDataLoader`. The arrays are copies."""
        arrays = {name: array.copy() for name, array in self._label_arrays.items()}
        if self._noise.active:
            clean = arrays["train_clean_label"]
            noisy = arrays["train_label"]
            arrays["transition_matrix"] = transition_matrix(clean, noisy, self.num_classes)
        return arrays

    def noise_report(self) -> dict[str, Any] | None:
        """Summarize the label noise in plain values for JSON; None without noise.

        `train_rate` and `val_rate` are the fractions of changed labels, in `[0, 1]`. `asked_rate`
        is `LabelNoise.percent`, the fraction of labels that the law picked; None for a file.
        """
        noise = self._noise
        if not noise.active:
            return None
        arrays = self._label_arrays
        report: dict[str, Any] = {
            "kind": noise.kind,
            "law": None,
            "file": None,
            "key": None,
            "asked_rate": None,
            "train_rate": realized_rate(arrays["train_clean_label"], arrays["train_label"]),
            "val_rate": None,
        }
        if noise.kind == "sym":
            report["law"] = noise.law
        if noise.kind == "file":
            report["file"] = noise.file
            report["key"] = noise.key
        else:
            report["asked_rate"] = noise.percent
        if len(self._val_index) > 0:
            report["val_rate"] = realized_rate(arrays["val_clean_label"], arrays["val_label"])
        return report

    def noise_warning(self) -> str | None:
        """See `label_noise.explain_rate`; None without noise."""
        if not self._noise.active:
            return None
        arrays = self._label_arrays
        rate = realized_rate(arrays["train_clean_label"], arrays["train_label"])
        return explain_rate(self._noise, self.class_names, rate)

    def fingerprint(self) -> str:
        """Return a hexadecimal digest of split and labels. Two runs with the same digest trained
        and validated on the same labels."""
        return _digest(self._label_arrays)

    def image_fingerprints(self) -> dict[str, str]:
        """Return hexadecimal digests of the training and validation images, and of the test set
        with its labels."""
        training = [self.image_digest()]
        held_out = self.split_validation()
        if held_out is not None:
            training.append(held_out.image_digest())
        test = self.test_loader()
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
