"""WorstPoints: the best that an attack has found so far, for every image of a batch."""

import torch
from torch import Tensor

MISSED, DONE = 0, 2
"""How far an attack has come with an image: not at all, or all the way; 1 is misclassified, but not
as badly as was asked."""


class WorstPoints:
    """For every image its worst point so far: the one with which the attack came farthest, of those
    the one of largest loss.

    Args:
        images: `(B, C, H, W)`, the points to begin with.

    Attributes:
        points: `(B, C, H, W)`.
        reached: int64 `(B,)` between `MISSED` and `DONE`, and -1 before anything was tried.
        losses: float32 `(B,)`.
    """

    def __init__(self, images: Tensor) -> None:
        self.points = images.clone()
        self.reached = torch.full((len(images),), -1, device=images.device)
        self.losses = images.new_full((len(images),), float("-inf"), dtype=torch.float32)

    def note(self, at: Tensor, points: Tensor, losses: Tensor, reached: Tensor) -> None:
        """Consider `points` `(n, C, H, W)` for the images at positions `at` `(n,)`; NaN counts as
        the smallest loss."""
        losses = losses.nan_to_num(nan=float("-inf"))
        before = self.reached[at]
        worse = (reached > before) | ((reached == before) & (losses > self.losses[at]))
        kept = at[worse]
        self.points[kept] = points[worse]
        self.reached[kept] = reached[worse]
        self.losses[kept] = losses[worse]

    def left(self, stop: bool = True) -> Tensor:
        """Positions of the images that are still to be attacked: those that are not done, or,
        without `stop`, all."""
        return (self.reached < (DONE if stop else DONE + 1)).nonzero().squeeze(1)
