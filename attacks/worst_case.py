"""WorstCase: the worst point that an attack has found so far for every image of a batch."""

import torch
from torch import Tensor

MISSED, DONE = 0, 2
"""The progress of an attack on an image: `MISSED`, the image is classified correctly; 1, it is
misclassified, but not yet as badly as required (see `Attack.rank`); `DONE`, it is."""
NOT_TRIED = -1


class WorstCase:
    """The worst point found so far for every image: the one with the most progress (see
    `DONE`), and among equals the one with the largest loss.

    Args:
        images: `(B, C, H, W)`, the points to begin with.

    Attributes:
        points: `(B, C, H, W)`.
        reached: int64 `(B,)`, from `MISSED` to `DONE`; `NOT_TRIED` before the first update.
        losses: float32 `(B,)`.
    """

    def __init__(self, images: Tensor) -> None:
        self.points = images.clone()
        self.reached = torch.full((len(images),), NOT_TRIED, device=images.device)
        self.losses = images.new_full((len(images),), float("-inf"), dtype=torch.float32)

    def update(self, index: Tensor, points: Tensor, losses: Tensor, reached: Tensor) -> None:
        """Keep those of `points` that are worse than what is known.

        Args:
            index: int64 `(n,)`, the positions of the images that were tried.
            points: `(n, C, H, W)`.
            losses: `(n,)`.
            reached: int64 `(n,)`.
        """
        # A comparison with NaN is always false: as -inf it loses against every number
        losses = losses.nan_to_num(nan=float("-inf"))
        before = self.reached[index]
        farther = reached > before
        larger = (reached == before) & (losses > self.losses[index])
        worse = farther | larger
        # Not a selection by `worse`: the host would wait for its size
        per_pixel = worse.reshape(-1, 1, 1, 1)
        self.points[index] = torch.where(per_pixel, points, self.points[index])
        self.reached[index] = torch.where(worse, reached, before)
        self.losses[index] = torch.where(worse, losses, self.losses[index])

    def remaining(self) -> Tensor:
        """Return the positions, int64 `(n,)`, of the images that are not `DONE`."""
        return (self.reached < DONE).nonzero().squeeze(1)
