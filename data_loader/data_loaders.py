"""The data loaders that a config can name: CIFAR-10, CIFAR-100, a folder of images, and
scikit-learn's digits.

In the path read -> split -> subset -> noise -> batch -> augment, each class here is only the
reading, by a function of `datasets`. `TrainingDataLoader` does the rest.
"""

from math import prod
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from data_loader.datasets import LabeledImages, read_cifar, read_digits, read_image_folder
from data_loader.training_data_loader import TrainingDataLoader

MEMORY_LIMIT = 2 * 1024**3
"""If `in_memory` is None, images of a folder are kept in memory up to this number of bytes."""

# ConvNorm and pytorch-cifar normalize by these. The standard deviation is the mean of those of
# single images; that of all pixels is (0.2470, 0.2435, 0.2616).
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2023, 0.1994, 0.2010)
"""Per channel, for pixels in `[0, 1]`."""


class CIFAR10DataLoader(TrainingDataLoader):
    """CIFAR-10: 10 classes, 50,000 + 10,000 images of 32 x 32; see `TrainingDataLoader` and
    `datasets.read_cifar`."""

    default_mean = CIFAR10_MEAN
    default_std = CIFAR10_STD
    classes: ClassVar[Literal[10, 100]] = 10

    def __init__(self, data_dir: str | Path, *arguments: Any, **options: Any) -> None:
        self.data_dir = data_dir
        super().__init__(*arguments, **options)

    def read(self, train: bool) -> LabeledImages:
        return read_cifar(self.classes, self.data_dir, train)


class CIFAR100DataLoader(CIFAR10DataLoader):
    """CIFAR-100: 100 classes, 50,000 + 10,000 images of 32 x 32; see `TrainingDataLoader` and
    `datasets.read_cifar`."""

    default_mean = (0.5071, 0.4867, 0.4408)
    default_std = (0.2675, 0.2565, 0.2761)
    classes = 100


class ImageFolderDataLoader(TrainingDataLoader):
    """Images in `data_dir/train/<class>/` and `data_dir/test/<class>/`, or in another layout of
    `datasets.read_image_folder`.

    Takes the arguments of `TrainingDataLoader` and four more. Only images that are used are
    decoded. If validation and test images are decoded batch by batch, `prepare` decodes each of
    them once before training.

    Args:
        image_size: side that every image is resized and cropped to; None if all images have the
            same size.
        in_memory: True decodes every image once and keeps the pixels; False decodes each batch when
            it is needed; None keeps training and validation images of up to 2 GiB, and also the
            test images if all of them together fit. Batches are the same either way.
        test_split: fraction of every class for the test set, if the folder holds only class
            folders; None for 0.2.
        channels: 3 decodes every image as RGB, 1 as gray.
    """

    def __init__(
        self,
        data_dir: str | Path,
        *arguments: Any,
        image_size: Annotated[int, Field(ge=1, le=8192)] | None = None,
        in_memory: bool | None = None,
        test_split: Annotated[float, Field(gt=0, lt=1)] | None = None,
        channels: Literal[1, 3] = 3,
        **options: Any,
    ) -> None:
        # Before the base class's constructor, which calls `read`
        self.data_dir = data_dir
        self._image_size = image_size
        self._keep_in_memory = in_memory
        self._test_split = test_split
        self._channels = channels
        super().__init__(*arguments, **options)

    def read(self, train: bool) -> LabeledImages:
        if not train:
            return self._test_part
        # One scan of both parts, to find files that are in both
        part, self._test_part = read_image_folder(
            self.data_dir,
            self._image_size,
            self.num_workers,
            self.pin_memory,
            self._test_split,
            self._channels,
        )
        return part

    def _fits_in_memory(self, n_images: int) -> bool:
        if self._keep_in_memory is not None:
            return self._keep_in_memory
        return n_images * prod(self._test_part.images.shape) <= MEMORY_LIMIT


class DigitsDataLoader(TrainingDataLoader):
    """scikit-learn's digits as 32 x 32 RGB, without a download; `data_dir` is ignored. See
    `datasets.read_digits`."""

    def __init__(self, data_dir: str | Path | None = None, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)

    def read(self, train: bool) -> LabeledImages:
        return read_digits(train)
