"""Where pixels are: in memory, in files that are decoded when they are asked for, or wherever a
user's own loader gets them from. uint8 `(N, C, H, W)`, or float32 in `[0, 1]`.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from base.base_data_loader import BaseDataLoader
from base.distributed import hide_progress_bar
from base.errors import DataError
from data_loader.contract import asking, check_images, check_range
from data_loader.decoding import decode_image
from data_loader.workers import decode_in_processes

DECODE_BATCH = 250
"""Images that a worker decodes in one go where no batch size is given."""

FINGERPRINT_BYTES = 2 * 1024**3
"""Bytes of files that a digest is of, about; of more it takes every second, third or n-th file."""

CHECKED = 64
"""Images of a user's own loader that are looked at before training."""

MIN_STD = 1e-3
"""Standard deviations are never below this, so that a constant channel can be divided by its
own."""


@dataclass(frozen=True)
class MemoryImages:
    """Images in one tensor, on any device.

    Attributes:
        pixels: uint8 `(N, C, H, W)`, or float32 in `[0, 1]`.
        names: what to call each image in tables; None where they have no names.
    """

    pixels: Tensor
    names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(C, H, W)` of one image."""
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    def select(self, index: np.ndarray) -> "MemoryImages":
        """The images at these positions."""
        pixels = self.pixels[torch.from_numpy(index).to(self.pixels.device)]
        return MemoryImages(pixels, _selected(self.names, index))

    def in_memory(self, device: torch.device) -> "MemoryImages":
        """The same images on `device`."""
        return replace(self, pixels=self.pixels.to(device))

    def check(self) -> None:
        """Refuse a tensor that is not images.

        Raises:
            DataError: it has another shape or type, or values outside `[0, 1]`.
        """
        where = "data_loader.type: MemoryImages"
        check_images(self.pixels, {}, where)
        check_range(self.pixels, where)

    def batches(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """One `(B, C, H, W)` for each int64 `(B,)` of positions, which are on the device of the
        images."""
        return (self.pixels[positions] for positions in batches)

    def digest(self) -> str:
        """SHA-256 of the shape and of all pixels, hexadecimal."""
        digest = hashlib.sha256(f"pixels {tuple(self.pixels.shape)}".encode())
        for chunk in self.pixels.split(DECODE_BATCH):
            digest.update(chunk.cpu().contiguous().numpy())
        return digest.hexdigest()


@dataclass(frozen=True)
class LoadedImages:
    """Images of a user's own loader, which is asked for them whenever they are needed.

    Attributes:
        loader: gives images by position.
        index: int64 `(N,)`, their positions in it.
    """

    loader: BaseDataLoader
    index: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(C, H, W)` of one image."""
        return self.loader.image_shape

    @property
    def names(self) -> tuple[str, ...] | None:
        """What the loader calls each image; None where it has no names."""
        return _selected(self.loader.sample_names(), self.index)

    def select(self, index: np.ndarray) -> "LoadedImages":
        """The images at these positions."""
        return replace(self, index=self.index[index])

    def in_memory(self, device: torch.device) -> MemoryImages:
        """All images in one tensor, on `device`."""
        pixels = list(self.batches(torch.arange(len(self)).split(DECODE_BATCH)))
        return MemoryImages(torch.cat(pixels).to(device), self.names)

    def check(self) -> None:
        """Ask for the first few images, twice.

        Raises:
            DataError: they are not images, or other ones the second time.
        """
        batch = torch.arange(min(len(self), CHECKED))
        first, again = self.batches([batch, batch])
        if not torch.equal(first, again):
            raise DataError(
                f"{self._where} gives other images for the same positions: augmentation belongs"
                " into the config, or into the loader's `augmented`"
            )

    def batches(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """One `(B, C, H, W)` for each int64 `(B,)` of positions, wherever the loader has it.

        Raises:
            DataError: what the loader gives has another shape or type than it should, or the first
                images have values outside `[0, 1]`.
        """
        if not batches:
            return
        index = torch.from_numpy(self.index)
        sizes = [len(batch) for batch in batches]
        # one copy from the device for all of them
        chosen = index[torch.cat(tuple(batches)).cpu()].split(sizes)
        with asking(self._where):
            for number, images in enumerate(self.loader.image_batches(chosen)):
                expected = {0: sizes[number], **dict(enumerate(self.shape, start=1))}
                check_images(images, expected, self._where)
                if number == 0:
                    check_range(images, self._where)
                yield images

    def digest(self) -> str:
        """SHA-256 of the shape and of the pixels of all images, hexadecimal; of more than
        `FINGERPRINT_BYTES` of every n-th image only."""
        digest = hashlib.sha256(f"loaded {len(self)} {self.shape}".encode())
        # as if they were bytes; floats take four times as many
        step = -(-len(self) * prod(self.shape) // FINGERPRINT_BYTES) or 1
        for images in self.batches(torch.arange(0, len(self), step).split(DECODE_BATCH)):
            digest.update(images.cpu().contiguous().numpy())
        return digest.hexdigest()

    @property
    def _where(self) -> str:
        return f"data_loader.type: {type(self.loader).__name__}.images_at"


@dataclass(frozen=True)
class FileImages:
    """Image files, decoded anew for every batch.

    Attributes:
        paths: one per image.
        shape: `(C, H, W)` that every image gets: RGB with 3 channels, gray with 1.
        resize: True resizes the shorter side to H and cuts the center (H equals W); False expects H
            x W in every file.
        num_workers: processes that decode; 0 decodes in this one.
        pin_memory: hand batches over in page-locked memory, which speeds up the way to a CUDA
            device.
        folder: the data set's; see `names`.
    """

    paths: tuple[str, ...]
    shape: tuple[int, int, int]
    resize: bool
    num_workers: int = 0
    pin_memory: bool = False
    folder: str = ""

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def names(self) -> tuple[str, ...]:
        """The paths of the files below the data set's folder."""
        # the folder "." stands in no path below it
        prefix = str(Path(self.folder, "x")).removesuffix("x")
        return tuple(path.removeprefix(prefix).replace(os.sep, "/") for path in self.paths)

    def select(self, index: np.ndarray) -> "FileImages":
        """The images at these positions."""
        return replace(self, paths=tuple(self.paths[position] for position in index))

    def in_memory(self, device: torch.device) -> MemoryImages:
        """All images decoded, on `device`; shows a progress bar on a terminal."""
        pixels = torch.empty((len(self), *self.shape), dtype=torch.uint8)
        for chunk, images in self._in_order("decoding images"):
            pixels[chunk] = images
        return MemoryImages(pixels.to(device), self.names)

    def check(self) -> None:
        """Decode every image once, and keep none.

        Raises:
            DataError: a file cannot be decoded or has another size.
        """
        for _ in self._in_order("checking images"):
            pass

    def _in_order(self, description: str) -> Iterator[tuple[Tensor, Tensor]]:
        """All images, some at a time: their positions, and uint8 `(B, C, H, W)`."""
        chunks = torch.arange(len(self)).split(DECODE_BATCH)
        bar = tqdm(
            total=len(self),
            desc=description,
            unit="image",
            disable=hide_progress_bar(),
            leave=False,
        )
        with bar:
            for chunk, images in zip(chunks, self.batches(chunks), strict=True):
                yield chunk, images
                bar.update(len(chunk))

    def batches(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """One uint8 CPU `(B, C, H, W)` for each int64 `(B,)` of positions, in their order whatever
        `num_workers` is.

        Raises:
            DataError: a file cannot be decoded or has another size, or a worker process died or
                hangs.
        """
        positions = [batch.tolist() for batch in batches]
        workers = min(self.num_workers, len(positions))
        if workers == 0:
            decoded = map(self._decode, positions)
        else:
            decoded = decode_in_processes(self.paths, self.shape, self.resize, positions, workers)
        if self.pin_memory:
            return map(Tensor.pin_memory, decoded)
        # out of the memory that the workers write to
        return map(Tensor.clone, decoded) if workers else decoded

    def digest(self) -> str:
        """SHA-256 of the sizes of all files and of what is in them, hexadecimal; their places and
        names do not matter.

        Files are read as they are, not decoded. Of more than `FINGERPRINT_BYTES` only every n-th
        one is read: another image in one of the rest is noticed where its file is larger or
        smaller.

        Raises:
            DataError: a file cannot be read.
        """
        digest = hashlib.sha256(f"files {self.shape}".encode())
        path = ""
        try:
            sizes = []
            for path in self.paths:
                sizes.append(Path(path).stat().st_size)
            digest.update(np.array(sizes, "<i8").tobytes())
            step = -(-sum(sizes) // FINGERPRINT_BYTES) or 1
            for path in tqdm(
                self.paths[::step],
                desc="reading images",
                unit="image",
                disable=hide_progress_bar(),
                leave=False,
            ):
                digest.update(Path(path).read_bytes())
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        return digest.hexdigest()

    def _decode(self, positions: list[int]) -> Tensor:
        batch = torch.empty((len(positions), *self.shape), dtype=torch.uint8)
        for place, position in enumerate(positions):
            batch[place] = decode_image(self.paths[position], self.shape, self.resize)
        return batch


Images = MemoryImages | FileImages | LoadedImages


def pixel_statistics(images: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel mean and (population) standard deviation of all pixels, in `[0, 1]`.

    Counted exactly from histograms of the 256 pixel values, so the order and the batches do not
    matter; floats are summed in double precision. The standard deviation is at least 0.001."""
    counts = torch.zeros(images.shape[0], 256, dtype=torch.int64)
    sums = torch.zeros(3, images.shape[0], dtype=torch.float64)
    device = images.pixels.device if isinstance(images, MemoryImages) else torch.device("cpu")
    for batch in images.batches(torch.arange(len(images), device=device).split(DECODE_BATCH)):
        if batch.dtype != torch.uint8:
            sums += _power_sums(batch)
            continue
        for channel in range(len(counts)):
            counts[channel] += torch.bincount(batch[:, channel].flatten(), minlength=256).cpu()
    if sums[0].any():
        mean = sums[1] / sums[0]
        variance = (sums[2] / sums[0] - mean**2).clamp(min=0)
    else:
        share = counts.double() / counts.sum(dim=1, keepdim=True)
        values = torch.arange(256, dtype=torch.float64) / 255
        mean = share @ values
        variance = (share * (values - mean[:, None]) ** 2).sum(dim=1)
    std = variance.sqrt().clamp(min=MIN_STD)
    return tuple(mean.tolist()), tuple(std.tolist())


def _power_sums(images: Tensor) -> Tensor:
    """float64 `(3, C)` on the CPU: the number, the sum and the sum of squares of each channel's
    pixels."""
    # MPS has no double precision
    pixels = images.cpu().double()
    count = torch.full((pixels.shape[1],), pixels.numel() / pixels.shape[1], dtype=torch.float64)
    return torch.stack([count, pixels.sum(dim=(0, 2, 3)), (pixels**2).sum(dim=(0, 2, 3))])


def _selected(names: Sequence[str] | None, index: np.ndarray) -> tuple[str, ...] | None:
    return None if names is None else tuple(names[position] for position in index.tolist())
