"""Where pixels are: in memory, or in files that are decoded when they are asked for. Always uint8 `(N, C, H, W)`, RGB."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from base.errors import DataError
from base.ranks import quiet
from data_loader.decoding import decode_image
from data_loader.workers import decode_in_processes

DECODE_BATCH = 250
"""Images that a worker decodes in one go where no batch size is given."""

FINGERPRINT_BYTES = 2 * 1024**3
"""Bytes of files that a digest is of, about; of more it takes every second, third or n-th file."""

MIN_STD = 1e-3
"""Standard deviations are never below this, so that a constant channel can be divided by its own."""


@dataclass(frozen=True)
class MemoryImages:
    """Images in one uint8 tensor `(N, C, H, W)`, on any device."""

    pixels: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(C, H, W)` of one image."""
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    def select(self, index: np.ndarray) -> "MemoryImages":
        """The images at these positions."""
        return MemoryImages(self.pixels[torch.from_numpy(index).to(self.pixels.device)])

    def in_memory(self, device: torch.device) -> "MemoryImages":
        """The same images on `device`."""
        return MemoryImages(self.pixels.to(device))

    def batches(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """One uint8 `(B, C, H, W)` for each int64 `(B,)` of positions, which are on the device of the images."""
        return (self.pixels[positions] for positions in batches)

    def digest(self) -> str:
        """SHA-256 of the shape and of all pixels, hexadecimal."""
        digest = hashlib.sha256(f"pixels {tuple(self.pixels.shape)}".encode())
        for chunk in self.pixels.split(DECODE_BATCH):
            digest.update(chunk.cpu().contiguous().numpy())
        return digest.hexdigest()


@dataclass(frozen=True)
class FileImages:
    """Image files, decoded anew for every batch.

    Attributes:
        paths: one per image.
        shape: `(3, H, W)` that every image gets.
        resize: True resizes the shorter side to H and cuts the centre (H equals W); False expects H x W in every file.
        num_workers: processes that decode; 0 decodes in this one.
        pin_memory: hand batches over in page-locked memory, which speeds up the way to a CUDA device.
    """

    paths: tuple[str, ...]
    shape: tuple[int, int, int]
    resize: bool
    num_workers: int = 0
    pin_memory: bool = False

    def __len__(self) -> int:
        return len(self.paths)

    def select(self, index: np.ndarray) -> "FileImages":
        """The images at these positions."""
        return replace(self, paths=tuple(self.paths[position] for position in index))

    def in_memory(self, device: torch.device) -> MemoryImages:
        """All images decoded, on `device`; shows a progress bar on a terminal."""
        pixels = torch.empty((len(self), *self.shape), dtype=torch.uint8)
        for chunk, images in self._in_order("decoding images"):
            pixels[chunk] = images
        return MemoryImages(pixels.to(device))

    def check(self) -> None:
        """Decode every image once, and keep none.

        Raises:
            DataError: a file cannot be decoded or has another size.
        """
        for _ in self._in_order("checking images"):
            pass

    def _in_order(self, description: str) -> Iterator[tuple[Tensor, Tensor]]:
        """All images, some at a time: their positions, and uint8 `(B, 3, H, W)`."""
        chunks = torch.arange(len(self)).split(DECODE_BATCH)
        bar = tqdm(total=len(self), desc=description, unit="image", disable=quiet(), leave=False)
        with bar:
            for chunk, images in zip(chunks, self.batches(chunks), strict=True):
                yield chunk, images
                bar.update(len(chunk))

    def batches(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """One uint8 CPU `(B, 3, H, W)` for each int64 `(B,)` of positions, in their order whatever `num_workers` is.

        Raises:
            DataError: a file cannot be decoded or has another size, or a worker process died or hangs.
        """
        positions = [batch.tolist() for batch in batches]
        workers = min(self.num_workers, len(positions))
        if workers == 0:
            decoded = map(self._decode, positions)
        else:
            decoded = decode_in_processes(self.paths, self.shape, self.resize, positions, workers)
        if self.pin_memory:
            return map(Tensor.pin_memory, decoded)
        return map(Tensor.clone, decoded) if workers else decoded  # out of the memory that the workers write to

    def digest(self) -> str:
        """SHA-256 of the sizes of all files and of what is in them, hexadecimal; their places and names do not matter.

        Files are read as they are, not decoded. Of more than `FINGERPRINT_BYTES` only every n-th one is read: another image
        in one of the rest is noticed where its file is larger or smaller.

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
            for path in tqdm(self.paths[::step], desc="reading images", unit="image", disable=quiet(), leave=False):
                digest.update(Path(path).read_bytes())
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        return digest.hexdigest()

    def _decode(self, positions: list[int]) -> Tensor:
        batch = torch.empty((len(positions), *self.shape), dtype=torch.uint8)
        for place, position in enumerate(positions):
            batch[place] = decode_image(self.paths[position], self.shape, self.resize)
        return batch


def pixel_statistics(images: MemoryImages | FileImages) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel mean and (population) standard deviation of all pixels, in `[0, 1]`.

    Counted exactly from histograms of the 256 pixel values, so the order and the batches do not matter. The standard deviation
    is at least 0.001.
    """
    counts = torch.zeros(images.shape[0], 256, dtype=torch.int64)
    device = images.pixels.device if isinstance(images, MemoryImages) else torch.device("cpu")
    for batch in images.batches(torch.arange(len(images), device=device).split(DECODE_BATCH)):
        for channel in range(len(counts)):
            counts[channel] += torch.bincount(batch[:, channel].flatten(), minlength=256).cpu()
    share = counts.double() / counts.sum(dim=1, keepdim=True)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ values
    std = (share * (values - mean[:, None]) ** 2).sum(dim=1).sqrt().clamp(min=MIN_STD)
    return tuple(mean.tolist()), tuple(std.tolist())
