"""Images by position: in memory, in files, or from a user's own loader.

In the path read -> split -> subset -> noise -> batch -> augment, reading returns `Images`. Split
and subset `select` from them, and `image_data_loader` iterates over their `batches`. Pixels are
uint8 `(N, C, H, W)`, or float32 in `[0, 1]`.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from base.base_data_loader import BaseDataLoader
from base.device import to_device
from base.distributed import hide_progress_bar
from base.errors import DataError
from data_loader.contract import check_images, check_range, loader_errors
from data_loader.decoding import decode_image
from data_loader.workers import decode_in_processes

DECODE_BATCH = 250
"""Images in a batch if no batch size is given."""

FINGERPRINT_BYTES = 2 * 1024**3
"""About how many bytes a digest reads at most. For a larger data set it takes only every second,
third or n-th image."""

CHECKED = 64
"""Images of a user's own loader that are checked before training."""

MIN_STD = 1e-3
"""The smallest standard deviation: a constant channel must not be divided by zero."""


@dataclass(frozen=True)
class MemoryImages:
    """Images in one tensor, on any device.

    Attributes:
        pixels: uint8 `(N, C, H, W)`, or float32 in `[0, 1]`.
        names: the names of the images in tables; None if they have no names.
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
        """Return the images at these positions."""
        pixels = self.pixels[torch.from_numpy(index).to(self.pixels.device)]
        return MemoryImages(pixels, _selected(self.names, index))

    def in_memory(self, device: torch.device) -> "MemoryImages":
        """Return the same images on `device`."""
        return replace(self, pixels=self.pixels.to(device))

    def check(self, where: str = "data_loader.type") -> None:
        """Check shape, type and range of the pixels.

        Args:
            where: the beginning of an error's line.

        Raises:
            DataError: they are not images as `BaseDataLoader` describes them.
        """
        check_images(self.pixels, {}, where)
        check_range(self.pixels, where)

    def batches(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield `(B, C, H, W)` on the images' device for each int64 `(B,)` of positions."""
        device = self.pixels.device
        return (self.pixels[to_device(positions, device)] for positions in batches)

    def digest(self) -> str:
        """Return the hexadecimal SHA-256 of the shape and all pixels."""
        digest = hashlib.sha256(f"pixels {tuple(self.pixels.shape)}".encode())
        for chunk in self.pixels.split(DECODE_BATCH):
            digest.update(chunk.cpu().contiguous().numpy())
        return digest.hexdigest()


@dataclass(frozen=True)
class LoadedImages:
    """Images of a user's own loader, which loads them each time they are needed.

    Attributes:
        loader: returns images by position.
        index: int64 `(N,)`, the images' positions in the loader.
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
        """The loader's names of the images; None if they have no names."""
        return _selected(self.loader.sample_names(), self.index)

    def select(self, index: np.ndarray) -> "LoadedImages":
        """Return the images at these positions."""
        return replace(self, index=self.index[index])

    def in_memory(self, device: torch.device) -> MemoryImages:
        """Load all images into one tensor on `device`."""
        pixels = list(self.batches(torch.arange(len(self)).split(DECODE_BATCH)))
        return MemoryImages(torch.cat(pixels).to(device), self.names)

    def check(self) -> None:
        """Load the first few images twice.

        Raises:
            DataError: they are not images, or differ the second time.
        """
        batch = torch.arange(min(len(self), CHECKED))
        first, again = self.batches([batch, batch])
        if not torch.equal(first, again):
            raise DataError(
                f"{self._where} returns different images for the same positions: augmentation"
                " belongs in the config, or in the loader's `augmented`"
            )

    def batches(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield `(B, C, H, W)` for each int64 `(B,)` of positions, on the loader's device.

        Raises:
            DataError: the images have a wrong shape or type, those of the first batch have values
                outside `[0, 1]`, or there are more or fewer batches than were asked for.
        """
        index = torch.from_numpy(self.index)
        chosen = [index[batch] for batch in batches]
        with loader_errors(self._where):
            loaded = zip_longest(chosen, self.loader.image_batches(chosen))
            for number, (positions, images) in enumerate(loaded):
                if positions is None or images is None:
                    raise DataError(
                        f"{self._where}: `image_batches` does not yield one batch of images for"
                        " each batch of positions"
                    )
                expected = {0: len(positions), **dict(enumerate(self.shape, start=1))}
                check_images(images, expected, self._where)
                # Finding the range of every batch would take longer than loading it.
                if number == 0:
                    check_range(images, self._where)
                yield images

    def digest(self) -> str:
        """Return the hexadecimal SHA-256 of shape and pixels. Above `FINGERPRINT_BYTES`, only every
        n-th image is loaded."""
        digest = hashlib.sha256(f"loaded {len(self)} {self.shape}".encode())
        # The size of uint8 pixels, although floats take four times as many bytes
        step = -(-len(self) * prod(self.shape) // FINGERPRINT_BYTES) or 1
        for images in self.batches(torch.arange(0, len(self), step).split(DECODE_BATCH)):
            digest.update(images.cpu().contiguous().numpy())
        return digest.hexdigest()

    @property
    def _where(self) -> str:
        return f"data_loader.type: {type(self.loader).__name__}.images_at"


@dataclass(frozen=True)
class FileImages:
    """Image files, which are decoded again for every batch.

    Attributes:
        paths: one per image.
        shape: `(C, H, W)` of every decoded image: RGB with 3 channels, gray with 1.
        resize: True resizes the shorter side to H and crops the center (H equals W); False expects
            files of H x W.
        num_workers: processes that decode; 0 decodes in the main process.
        pin_memory: return batches in page-locked memory, which copies faster to a CUDA device.
        folder: the data set's folder; `names` are relative to it.
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
        # pathlib drops the folder "." from a path, so the prefix is then empty
        prefix = str(Path(self.folder, "x")).removesuffix("x")
        return tuple(path.removeprefix(prefix).replace(os.sep, "/") for path in self.paths)

    def select(self, index: np.ndarray) -> "FileImages":
        """Return the images at these positions."""
        return replace(self, paths=tuple(self.paths[position] for position in index))

    def in_memory(self, device: torch.device) -> MemoryImages:
        """Decode all images and move them to `device`, with a progress bar on a terminal."""
        pixels = torch.empty((len(self), *self.shape), dtype=torch.uint8)
        for chunk, images in self._in_order("decoding images"):
            pixels[chunk] = images
        return MemoryImages(pixels.to(device), self.names)

    def check(self) -> None:
        """Decode every image once, and discard it.

        Raises:
            DataError: a file cannot be decoded or has another size.
        """
        for _ in self._in_order("checking images"):
            pass

    def _in_order(self, description: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield positions and images, uint8 `(B, C, H, W)`, until all are decoded."""
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
        """Yield uint8 `(B, C, H, W)` on the CPU for each int64 `(B,)` of positions, in order.

        Batches are the same for any `num_workers`.

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
        # `pin_memory` and `clone` both copy the batch out of the memory that workers write to.
        if self.pin_memory:
            return map(Tensor.pin_memory, decoded)
        if workers > 0:
            return map(Tensor.clone, decoded)
        return decoded

    def digest(self) -> str:
        """Return the hexadecimal SHA-256 of the sizes and bytes of all files.

        Folders and names do not matter, so data may be moved. Above `FINGERPRINT_BYTES`, only every
        n-th file is read, and a change in one of the others is noticed if its size changes.

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
    """Return per-channel mean and (population) standard deviation of all pixels, in `[0, 1]`.

    The standard deviation is at least `MIN_STD`. For uint8 pixels, the result does not depend on
    the order of the images.
    """
    # A histogram of the 256 pixel values is exact. Floats are summed in double precision.
    counts = torch.zeros(images.shape[0], 256, dtype=torch.int64)
    sums = torch.zeros(3, images.shape[0], dtype=torch.float64)
    for batch in images.batches(torch.arange(len(images)).split(DECODE_BATCH)):
        if batch.dtype != torch.uint8:
            sums += _power_sums(batch)
            continue
        for channel in range(len(counts)):
            counts[channel] += torch.bincount(batch[:, channel].flatten(), minlength=256).cpu()
    if sums[0].any():
        mean = sums[1] / sums[0]
        variance = (sums[2] / sums[0] - mean**2).clamp(min=0)
    else:
        frequency = counts.double() / counts.sum(dim=1, keepdim=True)
        values = torch.arange(256, dtype=torch.float64) / 255
        mean = frequency @ values
        variance = (frequency * (values - mean[:, None]) ** 2).sum(dim=1)
    std = variance.sqrt().clamp(min=MIN_STD)
    return tuple(mean.tolist()), tuple(std.tolist())


def _power_sums(images: Tensor) -> Tensor:
    """Return number, sum and sum of squares of each channel's pixels: float64 `(3, C)`, on the
    CPU."""
    # On the CPU, because MPS has no double precision
    pixels = images.cpu().double()
    count = torch.full((pixels.shape[1],), pixels.numel() / pixels.shape[1], dtype=torch.float64)
    return torch.stack([count, pixels.sum(dim=(0, 2, 3)), (pixels**2).sum(dim=(0, 2, 3))])


def _selected(names: Sequence[str] | None, index: np.ndarray) -> tuple[str, ...] | None:
    if names is None:
        return None
    return tuple(names[position] for position in index.tolist())
