"""Random augmentation of whole batches on the device they live on.

Every function is pure: it draws from the CPU generator it is given (so a batch is the same on every
device), returns a new tensor and leaves its input alone. Images are `(B, C, H, W)`, uint8 in `[0,
255]` or float in `[0, 1]`. Where they are a `shard` of a minibatch, numbers are drawn for all of
it: an image then looks the same whatever the number of processes."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from base.base_data_loader import to_float as to_float
from base.device import to_device
from base.distributed import Shard


def random_crop(
    images: Tensor,
    padding: int,
    generator: torch.Generator,
    shard: Shard | None = None,
    mode: str = "zeros",
) -> Tensor:
    """Pad every side and cut a window of the original size at a uniformly drawn place, per image.

    Args:
        images: `(B, C, H, W)`.
        padding: pixels added on each side, at least 0.
        generator: a CPU generator.
        shard: of the minibatch that `images` are; None where they are all of it.
        mode: what is added: `zeros`, or `reflect`: the image mirrored at its border pixels, which
            are not repeated themselves; as often as the padding needs.
    """
    batch, _, height, width = images.shape
    shard = shard or Shard(batch)
    places = torch.randint(0, 2 * padding + 1, (2, shard.total), generator=generator)
    top, left = to_device(places[:, shard.part], images.device)
    if mode == "reflect":
        rows = to_device(_mirrored(height, padding), images.device)
        columns = to_device(_mirrored(width, padding), images.device)
        padded = images[:, :, rows][:, :, :, columns]
    else:
        padded = F.pad(images, (padding,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: every possible window
    return windows[torch.arange(batch, device=images.device), :, top, left]


def _mirrored(length: int, padding: int) -> Tensor:
    """The positions that a row of `length` pixels shows when it is padded by mirroring."""
    places = torch.arange(-padding, length + padding)
    if length == 1:
        return torch.zeros_like(places)
    # there and back again: 0 ... length - 1 ... 1, over and over
    there_and_back = places % (2 * length - 2)
    return torch.minimum(there_and_back, 2 * length - 2 - there_and_back)


def random_flip(images: Tensor, generator: torch.Generator, shard: Shard | None = None) -> Tensor:
    """Mirror each image left to right with probability 1/2."""
    shard = shard or Shard(len(images))
    mirrored = to_device(
        torch.rand(shard.total, generator=generator)[shard.part] < 0.5, images.device
    )
    return torch.where(mirrored.reshape(-1, 1, 1, 1), images.flip(-1), images)


def cutout(
    images: Tensor,
    size: int,
    fill: Sequence[float],
    generator: torch.Generator,
    shard: Shard | None = None,
    inside: bool = False,
) -> Tensor:
    """Overwrite one square of `size` x `size` pixels per image (DeVries and Taylor, arXiv
    1708.04552).

    Args:
        images: `(B, C, H, W)`.
        size: the square's side in pixels. An odd side is kept; the paper's code rounds it down to
            an even one.
        fill: one value per channel, in the unit of `images`. The paper writes 0 after
            normalization: here, the data mean.
        generator: a CPU generator.
        shard: of the minibatch that `images` are; None where they are all of it.
        inside: whether the square's place is uniform among those wholly inside the image; a square
            larger than the image covers it. Otherwise the square's center is uniform over the
            image, so that near a border only part of it falls inside, as in the paper.
    """
    batch, _, height, width = images.shape
    drawn_for = shard or Shard(batch)

    def covered(length: int) -> Tensor:
        starts = max(length - size, 0) + 1 if inside else length
        drawn = torch.randint(0, starts, (drawn_for.total, 1), generator=generator)[drawn_for.part]
        first = to_device(drawn, images.device) - (0 if inside else size // 2)
        place = torch.arange(length, device=images.device)
        return (place >= first) & (place < first + size)

    rows, columns = covered(height), covered(width)
    mask = (rows[:, :, None] & columns[:, None, :])[:, None]
    value = to_device(
        torch.tensor(list(fill), dtype=torch.float32).to(images.dtype), images.device
    ).reshape(1, -1, 1, 1)
    return torch.where(mask, value, images)
