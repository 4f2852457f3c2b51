"""ImageDataLoader: batches of any labeled images, in memory or in files.

In the path read -> split -> subset -> noise -> batch -> augment, these are the last two steps:
`order` and `image_batches` make a batch, and `augmented` calls the functions of `augment`.
`BaseDataLoader.__iter__` puts the two together. Training, validation and test loaders are all of
this class; `training_data_loader` adds the steps before.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from base.base_data_loader import BaseDataLoader
from base.distributed import Shard, is_primary
from base.seeding import torch_generator
from data_loader import augment
from data_loader.images import Images, MemoryImages


class ImageDataLoader(BaseDataLoader):
    """One part of a data set, in batches; see `BaseDataLoader` for the values of an iteration.

    Images that fit in memory are moved to the device once, as uint8, and every batch is gathered,
    augmented and converted to floats there. Others are decoded batch by batch, with the same
    result. The order of epoch e is a function of (seed, e), the augmentation of batch b in it a
    function of (seed, e, b). The last batch is never dropped.

    Args:
        images: `N` images.
        labels: int64 `(N,)`.
        class_names: in label order.
        mean: per-channel mean, in `[0, 1]`; None if the class has its own.
        std: per-channel standard deviation, in `[0, 1]`; None if the class has its own.
        batch_size: images per batch.
        shuffle: a new order every epoch; False keeps the order of `images`.
        num_batches: above 0 ends every epoch after that many batches.
        seed: the seed of order and augmentation.
        crop_padding: pixels of padding for random crops; 0 for none.
        padding_mode: `zeros` or `reflect`; see `augment.random_crop`.
        flip: mirror each image with probability 1/2.
        cutout: side in pixels of the square that is overwritten; 0 for none.
        cutout_inside: whether the square is wholly inside the image.
        cutout_fill: the color of the square: `mean` or `black`.
        clean_labels: int64 `(N,)` labels before the noise; None if `labels` are clean.
        in_memory: decode files once, at the first iteration, and keep the pixels.
        device: the device of the batches.
        test: returns the test loader; None if this is the test loader.
    """

    def __init__(
        self,
        images: Images,
        labels: np.ndarray,
        class_names: Sequence[str],
        *,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        batch_size: int,
        shuffle: bool = False,
        num_batches: int = 0,
        seed: int = 0,
        crop_padding: int = 0,
        padding_mode: str = "zeros",
        flip: bool = False,
        cutout: int = 0,
        cutout_inside: bool = False,
        cutout_fill: str = "mean",
        clean_labels: np.ndarray | None = None,
        in_memory: bool = True,
        device: str | torch.device = "cpu",
        test: "Callable[[], ImageDataLoader] | None" = None,
    ) -> None:
        self.batch_size = batch_size
        self.n_samples = len(labels)
        if num_batches > 0:
            self.n_samples = min(len(labels), num_batches * batch_size)
        self.num_classes = len(class_names)
        self.class_names = tuple(class_names)
        self.image_shape = images.shape
        if mean is not None:
            self.mean = tuple(map(float, mean))
        if std is not None:
            self.std = tuple(map(float, std))
        self.device = torch.device(device)
        self.clean_labels = None
        # In the order of iteration, which is fixed only for an unshuffled loader
        if clean_labels is not None and not shuffle:
            self.clean_labels = torch.from_numpy(clean_labels[: self.n_samples]).to(self.device)
        self.positions = torch.arange(self.n_samples)
        self._source = images
        self._in_memory = in_memory
        self.labels = torch.from_numpy(labels).to(self.device)
        self._shuffle = shuffle
        self._seed = seed
        self._crop_padding = crop_padding
        self._padding_mode = padding_mode
        self._flip = flip
        self._cutout = cutout
        self._cutout_inside = cutout_inside
        self._cutout_fill = cutout_fill
        self._test = test
        self._image_digest: str | None = None

    @property
    def images(self) -> Images:
        """The images. If they are kept in memory, the first call decodes them and moves them to the
        device.

        Raises:
            DataError: a file cannot be decoded.
        """
        if self._in_memory or isinstance(self._source, MemoryImages):
            self._source = self._source.in_memory(self.device)
        return self._source

    def prepare(self) -> None:
        """Check the images, so that a broken one is found before training: each file is decoded
        once.

        Raises:
            DataError: a file cannot be decoded, or a value is not an image.
        """
        images = self.images
        # One process checks for all. It does not report the result here, because a process that has
        # failed already would not receive it; see `agreement.prepare_on_all_ranks`.
        if is_primary():
            images.check()

    def images_at(self, positions: Tensor) -> Tensor:
        return next(iter(self.images.batches([positions])))

    def order(self, epoch: int) -> Tensor:
        if not self._shuffle:
            return torch.arange(len(self.labels))
        generator = torch_generator(self._seed, "order", epoch)
        return torch.randperm(len(self.labels), generator=generator)

    def image_batches(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        return self.images.batches(batches)

    def augmented(self, images: Tensor, epoch: int, number: int, shard: Shard) -> Tensor:
        generator = torch_generator(self._seed, "augmentation", epoch, number)
        # Crop and flip move pixels only, so they run on uint8, a quarter of the bytes of floats.
        if self._crop_padding > 0:
            images = augment.random_crop(
                images, self._crop_padding, generator, shard, self._padding_mode
            )
        if self._flip:
            images = augment.random_flip(images, generator, shard)
        images = augment.to_float(images)
        if self._cutout > 0:
            fill = self.mean
            if self._cutout_fill == "black":
                fill = (0.0,) * len(self.mean)
            images = augment.cutout(
                images, self._cutout, fill, generator, shard, self._cutout_inside
            )
        return images

    def subset(self, index: Tensor) -> "ImageDataLoader":
        chosen = index.cpu().numpy()
        clean = None
        if self.clean_labels is not None:
            clean = self.clean_labels.cpu().numpy()[chosen]
        part = ImageDataLoader(
            self._source.select(chosen),
            self.labels.cpu().numpy()[chosen],
            self.class_names,
            mean=self.mean,
            std=self.std,
            batch_size=self.batch_size,
            clean_labels=clean,
            in_memory=self._in_memory,
            device=self.device,
        )
        part.positions = self.positions[index.cpu()]
        return part

    def image_digest(self) -> str:
        # It reads every file, and both checkpoints and the comparison between processes need it.
        if self._image_digest is None:
            self._image_digest = self.images.digest()
        return self._image_digest

    def sample_names(self) -> Sequence[str] | None:
        return self._source.names

    def test_loader(self) -> "ImageDataLoader":
        if self._test is None:
            return self
        return self._test()
