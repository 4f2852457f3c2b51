"""ImageDataLoader: batches of any labeled images, in memory or in files."""

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
    """One part of a data set, in batches; see `BaseDataLoader` for what iterating yields.

    Images that fit in memory are moved to the device once, as they are, and every batch is
    gathered, augmented and turned into floats there; others are decoded batch by batch, with the
    same result. The order of epoch e is a function of (seed, e), the augmentation of its b-th batch
    of (seed, e, b). The last batch is never dropped.

    Args:
        images: `N` images.
        labels: int64 `(N,)`.
        class_names: in label order.
        mean: per-channel mean, in `[0, 1]`; None where the class knows it.
        std: per-channel standard deviation, in `[0, 1]`; None likewise.
        batch_size: images per batch.
        shuffle: a new order every epoch; False keeps the order of `images`.
        num_batches: above 0 ends every epoch after that many batches.
        seed: of order and augmentation.
        crop_padding: pixels of padding for random crops; 0 for none.
        padding_mode: `zeros` or `reflect`; see `augment.random_crop`.
        flip: mirror half of the images.
        cutout: side in pixels of the square that is overwritten; 0 for none.
        cutout_inside: whether the square lies wholly inside the image.
        cutout_fill: its color: `mean`, or `black`.
        clean_labels: int64 `(N,)` labels before the noise, where `labels` carry noise.
        in_memory: decode files once, at the first iteration, and keep the pixels.
        device: where the batches shall be.
        test: gives the test loader; None where this is it.
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
        self.n_samples = (
            min(len(labels), num_batches * batch_size) if num_batches > 0 else len(labels)
        )
        self.num_classes = len(class_names)
        self.class_names = tuple(class_names)
        self.image_shape = images.shape
        if mean is not None:
            self.mean = tuple(map(float, mean))
        if std is not None:
            self.std = tuple(map(float, std))
        self.device = torch.device(device)
        self.clean_labels = None
        if clean_labels is not None and not shuffle:
            self.clean_labels = torch.from_numpy(clean_labels[: self.n_samples]).to(self.device)
        self.positions = torch.arange(self.n_samples)
        self._source, self._in_memory = images, in_memory
        self.labels = torch.from_numpy(labels).to(self.device)
        self._shuffle, self._seed = shuffle, seed
        self._crop_padding, self._padding_mode, self._flip = crop_padding, padding_mode, flip
        self._cutout, self._cutout_inside, self._cutout_fill = cutout, cutout_inside, cutout_fill
        self._test = test
        self._image_digest: str | None = None

    @property
    def images(self) -> Images:
        """The images, decoded and moved to the device at the first call if they are to stay in
        memory.

        Raises:
            DataError: a file cannot be decoded.
        """
        if self._in_memory or isinstance(self._source, MemoryImages):
            self._source = self._source.in_memory(self.device)
        return self._source

    def prepare(self) -> None:
        """Look at the images, so that a broken one is found before training: each file is decoded
        once.

        Where the pixels do not stay in memory, rank 0 does it for all processes. It does not tell
        them here: one that has failed before would not hear it. See
        `base.distributed.agreement.prepare_on_all_ranks`.

        Raises:
            DataError: a file cannot be decoded, or images are not such.
        """
        images = self.images
        if is_primary():
            images.check()

    def images_at(self, positions: Tensor) -> Tensor:
        return next(iter(self.images.batches([positions.to(self.device)])))

    def order(self, epoch: int) -> Tensor:
        if not self._shuffle:
            return torch.arange(len(self.labels))
        generator = torch_generator(self._seed, "order", epoch)
        return torch.randperm(len(self.labels), generator=generator)

    def image_batches(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        return self.images.batches(batches)

    def augmented(self, images: Tensor, epoch: int, number: int, shard: Shard) -> Tensor:
        pixels = images
        generator = torch_generator(self._seed, "augmentation", epoch, number)
        if self._crop_padding > 0:
            pixels = augment.random_crop(
                pixels, self._crop_padding, generator, shard, self._padding_mode
            )
        if self._flip:
            pixels = augment.random_flip(pixels, generator, shard)
        images = augment.to_float(pixels)
        if self._cutout > 0:
            black = (0.0,) * len(self.mean)
            fill = black if self._cutout_fill == "black" else self.mean
            images = augment.cutout(
                images, self._cutout, fill, generator, shard, self._cutout_inside
            )
        return images

    def subset(self, index: Tensor) -> "ImageDataLoader":
        chosen = index.cpu().numpy()
        clean = None if self.clean_labels is None else self.clean_labels.cpu().numpy()[chosen]
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
        if self._image_digest is None:
            self._image_digest = self.images.digest()
        return self._image_digest

    def sample_names(self) -> Sequence[str] | None:
        return self._source.names

    def test_loader(self) -> "ImageDataLoader":
        return self if self._test is None else self._test()
