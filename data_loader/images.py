"""Where pixels are: in memory, or in files that are decoded when they are asked for. Always uint8 `(N, C, H, W)`, RGB."""

import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from base.errors import DataError
from base.ranks import quiet

DECODE_BATCH = 250
"""Images that a worker decodes in one go where no batch size is given."""

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
        chunks = torch.arange(len(self)).split(DECODE_BATCH)
        with tqdm(total=len(self), desc="decoding images", unit="image", disable=quiet(), leave=False) as bar:
            for chunk, images in zip(chunks, self.batches(chunks), strict=True):
                pixels[chunk] = images
                bar.update(len(chunk))
        return MemoryImages(pixels.to(device))

    def batches(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """One uint8 CPU `(B, 3, H, W)` for each int64 `(B,)` of positions, in their order whatever `num_workers` is.

        Raises:
            DataError: a file cannot be decoded or has another size, or a worker process died.
        """
        if not batches:
            return
        try:
            for item in self._start_decoding([positions.tolist() for positions in batches]):
                if isinstance(item, str):
                    raise DataError(item)
                yield item
        except RuntimeError as error:
            if "worker" not in str(error):
                raise
            reason = str(error).splitlines()[0].rstrip(".")
            raise DataError(
                f"data_loader.args.num_workers: a process that decodes images died ({reason}); "
                "memory or shared memory may have run out: try fewer"
            ) from None

    def _start_decoding(self, batches: list[list[int]]) -> Iterator[Tensor | str]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="This DataLoader will create")  # more workers than cores is allowed
            loader = DataLoader(
                _Decoder(self, batches),
                batch_size=None,  # an item is already a batch
                num_workers=min(self.num_workers, len(batches)),
                pin_memory=self.pin_memory,
                collate_fn=_unchanged,
                worker_init_fn=_leave_signals_to_the_main_process,
                generator=torch.Generator(),  # otherwise starting the workers would draw from the global one
            )
            with _signals_held_back():
                return iter(loader)


def decode_image(path: str, shape: tuple[int, int, int], resize: bool) -> Tensor:
    """One file as uint8 `(3, H, W)`, converted to RGB.

    With `resize`, the shorter side becomes H (bilinear with antialiasing, as PIL does it) and the centre H x H is cut out, the
    usual evaluation transform; otherwise the file must be H x W.

    Raises:
        DataError: the file cannot be decoded, or has another size.
    """
    _, height, width = shape
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except Exception as error:  # PIL's decoders raise nearly everything on broken files
        raise DataError(f"{path}: cannot be decoded as an image ({_reason(error, path)})") from None
    if resize and image.size != (width, height):
        image = _resize_and_crop(image, height)
    if image.size != (width, height):
        raise DataError(
            f"{path}: is {image.width}x{image.height} pixels, the first training image is {width}x{height}: "
            "set data_loader.args.image_size to bring all images to one size"
        )
    return torch.from_numpy(np.array(image).transpose(2, 0, 1))


def image_size(path: str) -> tuple[int, int]:
    """`(height, width)` of an image file, from its header.

    Raises:
        DataError: it is no image.
    """
    try:
        with Image.open(path) as file:
            return file.height, file.width
    except Exception as error:
        raise DataError(f"{path}: cannot be decoded as an image ({_reason(error, path)})") from None


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


class _Decoder(Dataset):
    """Item b is the b-th batch, decoded. A failure is returned, not raised: DataLoader would wrap it in a traceback."""

    def __init__(self, images: FileImages, batches: list[list[int]]) -> None:
        self.images = images
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Tensor | str:
        images = self.images
        batch = torch.empty((len(self.batches[number]), *images.shape), dtype=torch.uint8)
        try:
            for place, position in enumerate(self.batches[number]):
                batch[place] = decode_image(images.paths[position], images.shape, images.resize)
        except DataError as error:
            return str(error)
        return batch


def _resize_and_crop(image: Image.Image, side: int) -> Image.Image:
    width, height = image.size
    shorter = min(width, height)
    image = image.resize((int(side * width / shorter), int(side * height / shorter)), Image.Resampling.BILINEAR)
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    return image.crop((left, top, left + side, top + side))


def _unchanged(item: Tensor | str) -> Tensor | str:
    return item


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Worker processes begin with these signals blocked, so that none can end them before they ignore it; the main one gets it
    afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_the_main_process(_: int) -> None:
    # Ctrl-C and a scheduler's SIGTERM reach every process of the group; the main one finishes its batch and saves, for which it
    # needs the workers. They end with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _reason(error: Exception, path: str) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].replace(f" {path!r}", "")
