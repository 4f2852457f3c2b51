"""Random augmentation of whole batches, on their device: the last step to a batch.

Every function is pure: it draws from the given CPU generator, so that a batch is the same on every
device, and returns a new tensor. Images are `(B, C, H, W)`, uint8 in `[0, 255]` or float in
`[0, 1]`. If they are a `shard` of a minibatch, random numbers are drawn for the whole minibatch: an
image is then augmented in the same way for any number of processes.
"""

from collections.abc import Sequence

import numpy as np
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
    """Pad every side of each image, and cut out a window of the original size at a random place.

    Args:
        images: `(B, C, H, W)`.
        padding: pixels added on each side, at least 0.
        generator: a CPU generator.
        shard: the shard of the minibatch that `images` are; None for the whole minibatch.
        mode: `zeros`, or `reflect` to mirror the image at its border pixels, which are not
            repeated. Padding may be larger than the image.
    """
    batch, _, height, width = images.shape
    shard = shard or Shard(batch)
    places = torch.randint(0, 2 * padding + 1, (2, shard.total), generator=generator)
    top, left = to_device(places[:, shard.part], images.device)
    if mode == "reflect":
        # torch's own `reflect` padding must be smaller than the image
        padded = images
        for dim, length in ((2, height), (3, width)):
            kept = torch.from_numpy(np.pad(np.arange(length), padding, mode="reflect"))
            padded = padded.index_select(dim, to_device(kept, images.device))
    else:
        padded = F.pad(images, (padding,) * 4)
    # A view of every possible window, which copies nothing
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(batch, device=images.device), :, top, left]


def random_flip(images: Tensor, generator: torch.Generator, shard: Shard | None = None) -> Tensor:
    """Mirror each image left to right with probability 1/2."""
    shard = shard or Shard(len(images))
    flips = torch.rand(shard.total, generator=generator, dtype=torch.float32) < 0.5
    mirrored = to_device(flips[shard.part], images.device)
    return torch.where(mirrored.reshape(-1, 1, 1, 1), images.flip(-1), images)


def cutout(
    images: Tensor,
    size: int,
    fill: Sequence[float],
    generator: torch.Generator,
    shard: Shard | None = None,
    inside: bool = False,
) -> Tensor:
    """Overwrite one square of `size` x `size` pixels per image (DeVries and Taylor,
    arXiv:1708.04552).

    Args:
        images: `(B, C, H, W)`.
        size: the square's side in pixels. An odd side is kept; the paper's code rounds it down to
            an even one.
        fill: one value per channel, in the unit of `images`. The paper writes 0 into normalized
            images, which is the mean of the data here.
        generator: a CPU generator.
        shard: the shard of the minibatch that `images` are; None for the whole minibatch.
        inside: True draws the place uniformly among those wholly inside the image; a square larger
            than the image covers it. False draws the center of the square uniformly over the image,
            as in the paper, so that a part of it may lie outside.
    """
    batch, _, height, width = images.shape
    drawn_for = shard or Shard(batch)

    def covered(length: int) -> Tensor:
        """Draw which of `length` rows or columns are covered: bool `(B, length)`."""
        if inside:
            starts = max(length - size, 0) + 1
            offset = 0
        else:
            starts = length
            offset = size // 2
        drawn = torch.randint(0, starts, (drawn_for.total, 1), generator=generator)[drawn_for.part]
        first = to_device(drawn, images.device) - offset
        place = torch.arange(length, device=images.device)
        return (place >= first) & (place < first + size)

    # Rows before columns: their order decides which random numbers they get
    rows = covered(height)
    columns = covered(width)
    mask = (rows[:, :, None] & columns[:, None, :])[:, None]
    color = torch.tensor(list(fill), dtype=torch.float32).to(images.dtype)
    return torch.where(mask, to_device(color, images.device).reshape(1, -1, 1, 1), images)
