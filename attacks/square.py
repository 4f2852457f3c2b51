"""The Square attack: random search, for models whose gradients are missing or mislead."""

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from attacks.arguments import check_count, check_number
from attacks.attack import Attack
from attacks.classifier import Model
from attacks.losses import wrongness
from attacks.threat_model import Generators, draw, generators_of, lengths
from base.device import to_device

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Of 10,000 queries, those after which the share of changed pixels is halved."""
TINY = 1e-12
"""Keeps quotients of lengths finite."""


@dataclass(frozen=True)
class Square(Attack):
    """The Square attack (Andriushchenko et al., arXiv:1912.00049): random search with forward
    passes only.

    The search starts with vertical stripes of +-epsilon per channel (l-inf) or a grid of bumps of
    total length epsilon (l2). It then proposes a change in a random square window, and keeps it if
    the loss grows or the image is misclassified. The window covers the share `p` of the pixels; `p`
    starts at `p_init` and is halved after the paper's 10, 50, 200, 500, 1000, 2000, 4000, 6000 and
    8000 of 10,000 queries, scaled to `queries`.

    For l-inf a proposal sets the window to the image +-epsilon, one sign per channel (algorithm 2;
    that is the published step of +-2 epsilon, clipped). For l2 it takes the change away in a second
    window of the same size, and puts that length and the unused rest of epsilon into bumps in the
    first window (algorithm 3).

    An image that is misclassified leaves the batch; one that is misclassified from the beginning
    comes back unchanged. Every image has windows and signs of its own (the authors' PyTorch code
    draws them once for the batch), and windows may touch the lower and right border, which the
    authors' code leaves out.

    Args:
        epsilon: radius in units of the pixel range, such as 8/255.
        queries: points tried for an image, the start among them, at least 1; one forward pass on
            the image itself comes first.
        norm: `"linf"` or `"l2"`.
        p_init: share of the pixels in the first windows, in (0, 1].
        loss: `"margin"`, `"ce"` or `"dlr"`.
        seed: of all random draws, if a call passes no generators.

    Raises:
        ValueError: an argument is out of its range.
    """

    epsilon: float
    queries: int = 1000
    norm: str = "linf"
    p_init: float = 0.8
    loss: str = "margin"
    _: KW_ONLY
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        p_init = check_number("p_init", self.p_init)
        if not 0 < p_init <= 1:
            raise ValueError(f"p_init: expected a number in (0, 1], not {self.p_init}")
        object.__setattr__(self, "queries", check_count("queries", self.queries))
        object.__setattr__(self, "p_init", p_init)

    @torch.no_grad()
    def perturb(
        self, model: Model, images: Tensor, labels: Tensor, generators: Generators
    ) -> Tensor:
        points = images.clone()
        best = images.new_full((len(images),), float("-inf"), dtype=torch.float32)
        remaining = (wrongness(model(images), labels) == 0).nonzero().flatten()
        for query in range(self.queries):
            if len(remaining) == 0:
                break
            generators_here = generators_of(generators, remaining)
            if query == 0:
                tried = self.start(images[remaining], generators_here)
            else:
                tried = self.propose(points[remaining], images[remaining], query, generators_here)
            logits = model(tried)
            losses = self.losses(logits, labels[remaining])
            broken = wrongness(logits, labels[remaining]) > 0
            best_here = best[remaining]
            better = broken | (losses > best_here)
            # Not a selection by `better`: the host would wait for its size
            per_pixel = better.reshape(-1, 1, 1, 1)
            points[remaining] = torch.where(per_pixel, tried, points[remaining])
            best[remaining] = torch.where(better, losses, best_here)
            remaining = remaining[(~broken).nonzero().squeeze(1)]
        return points

    def start(self, images: Tensor, generators: Generators) -> Tensor:
        """Return the first points to try for `images` `(n, C, H, W)`."""
        if self.threat_model.norm == "linf":
            # One sign per channel and column: vertical stripes
            signs = _signs(draw(torch.rand, images[:, :, :1], generators))
            return self.threat_model.project(images + self.threat_model.epsilon * signs, images)
        return self._at_full_length(_bump_grid(images, generators), images)

    def propose(self, points: Tensor, images: Tensor, query: int, generators: Generators) -> Tensor:
        """Return the next points to try, given the best `points` so far; `query` counts from 1."""
        side = self.side(query, *images.shape[2:])
        if self.threat_model.norm == "linf":
            return self._propose_linf(points, images, side, generators)
        return self._propose_l2(points, images, side, generators)

    def side(self, query: int, height: int, width: int) -> int:
        """Return the side in pixels of a query's windows: `sqrt(p H W)`, at most the image's."""
        halvings = sum(query / self.queries * 10_000 > halving for halving in HALVINGS)
        share = self.p_init / 2**halvings
        side = max(round((share * height * width) ** 0.5), 1)
        if self.threat_model.norm == "l2":
            # A pair of bumps needs an odd side of at least 3, where the image has the room
            side = max(side, 3) | 1
        return min(side, height, width)

    def _propose_linf(
        self, points: Tensor, images: Tensor, side: int, generators: Generators
    ) -> Tensor:
        """Algorithm 2: set a window to the image +-epsilon."""
        n, channels, height, width = images.shape
        draws = _uniform(n, 2 + channels, images, generators)
        window = _Window(draws[:, 0], draws[:, 1], height, width, side)
        signs = _signs(draws[:, 2:, None, None])
        changed = images + self.threat_model.epsilon * signs
        return self.threat_model.project(torch.where(window.mask, changed, points), images)

    def _propose_l2(
        self, points: Tensor, images: Tensor, side: int, generators: Generators
    ) -> Tensor:
        """Algorithm 3: move the change of one window into another one.

        In the paper the two windows are W_2 (`emptied`) and W_1 (`filled`).
        """
        n, channels, height, width = images.shape
        draws = _uniform(n, 5 + channels, images, generators)
        filled = _Window(draws[:, 0], draws[:, 1], height, width, side)
        emptied = _Window(draws[:, 2], draws[:, 3], height, width, side).mask & ~filled.mask
        transposed = (draws[:, 4] < 0.5).long()[:, None, None]
        signs = _signs(draws[:, 5:, None, None])
        # Every pixel looks up its place in the window; those outside look up place 0 and are masked
        # below
        bumps = _bumps_like(images, side)
        bumps = bumps[transposed, filled.row[:, :, None], filled.column[:, None, :]].unsqueeze(1)

        change = points - images
        old = torch.where(filled.mask, change, 0)
        new = torch.where(filled.mask, bumps * signs, 0) + old / _norm(old).clamp_min(TINY)
        # epsilon_avail of the paper, per channel: a share of what the change leaves of epsilon, and
        # what both windows hold
        unused = self.threat_model.epsilon**2 - _squares(change, (1, 2, 3))
        unused = unused.clamp_min(0) / channels
        held = _squares(torch.where(filled.mask | emptied, change, 0), (2, 3))
        available = (unused + held).sqrt()
        new = new / _norm(new).clamp_min(TINY) * available
        rest = torch.where(emptied, 0, change)
        return self._at_full_length(torch.where(filled.mask, new, rest), images)

    def _at_full_length(self, change: Tensor, images: Tensor) -> Tensor:
        """Stretch `change` to length epsilon and add it to the images."""
        change = change * (self.threat_model.epsilon / lengths(change).clamp_min(TINY))
        return self.threat_model.project(images + change, images)


class _Window:
    """A square window at a random place of each of `n` images.

    Args:
        draws_of_rows, draws_of_columns: `(n,)` in [0, 1), which choose the places.
        height, width: of the images.
        side: of the windows.

    Attributes:
        mask: bool `(n, 1, H, W)`, True inside the window.
        row: int64 `(n, H)`, the row of the window at each row of the image; 0 outside.
        column: int64 `(n, W)`, the same for columns.
    """

    def __init__(
        self,
        draws_of_rows: Tensor,
        draws_of_columns: Tensor,
        height: int,
        width: int,
        side: int,
    ) -> None:
        in_rows, self.row = _inside(draws_of_rows, height, side)
        in_columns, self.column = _inside(draws_of_columns, width, side)
        self.mask = (in_rows[:, :, None] & in_columns[:, None, :]).unsqueeze(1)


def _inside(draws: Tensor, size: int, side: int) -> tuple[Tensor, Tensor]:
    """Return which of `size` rows are in the window, bool `(n, size)`, and the row of the window at
    each of them, int64 `(n, size)`, 0 outside."""
    first = (draws * (size - side + 1)).long()
    place = torch.arange(size, device=draws.device) - first[:, None]
    inside = (place >= 0) & (place < side)
    return inside, torch.where(inside, place, 0)


def _uniform(n: int, count: int, images: Tensor, generators: Generators) -> Tensor:
    """Draw `count` numbers in [0, 1) for each of `n` images, `(n, count)`."""
    # Always float32: a draw that is rounded up to 1 would choose a place outside of the image
    return draw(torch.rand, images.new_empty((n, count), dtype=torch.float32), generators)


def _signs(draws: Tensor) -> Tensor:
    return 1 - 2 * (draws < 0.5).to(draws.dtype)


def _squares(change: Tensor, dims: tuple[int, ...]) -> Tensor:
    return change.square().sum(dim=dims, keepdim=True)


def _norm(change: Tensor) -> Tensor:
    """Return the Euclidean length of every channel, `(n, C, 1, 1)`."""
    return _squares(change, (2, 3)).sqrt()


def _bump(height: int, width: int) -> Tensor:
    """Return a pyramid of length 1, `(height, width)`.

    At distance d from its middle (the larger of rows and columns) it is
    `sum_{k=d}^{n} 1 / (k + 1)^2`, with n half the larger side.
    """
    rows = (torch.arange(height) - height // 2).abs()
    columns = (torch.arange(width) - width // 2).abs()
    distance = torch.maximum(rows[:, None], columns[None, :])
    terms = 1 / torch.arange(1, max(height, width) // 2 + 2, dtype=torch.float32).square()
    # Reversed twice, as the sums begin at d and not at 0
    sums = terms.flip(0).cumsum(0).flip(0)
    bump = sums[distance]
    return bump / torch.linalg.vector_norm(bump)


def _bumps(side: int) -> Tensor:
    """Return a bump above a negative one, of length 1, and its transpose, `(2, side, side)`."""
    pair = torch.cat([_bump(side // 2, side), -_bump(side - side // 2, side)])
    pair = pair / torch.linalg.vector_norm(pair)
    return torch.stack([pair, pair.T])


def _bumps_like(images: Tensor, side: int) -> Tensor:
    """Return `_bumps` with the images' type and device."""
    return to_device(_bumps(side).to(images.dtype), images.device)


def _bump_grid(images: Tensor, generators: Generators) -> Tensor:
    """Tile the images with pairs of bumps of a fifth of their side, `(n, C, H, W)`.

    Each pair is transposed or not at random, and has a random sign per channel.
    """
    n, channels, height, width = images.shape
    side = max(min(height, width) // 5, 1)
    down = height // side
    across = width // side
    draws = _uniform(n, down * across * (1 + channels), images, generators)
    draws = draws.reshape(n, 1 + channels, down, across)
    transposed = (draws[:, 0] < 0.5).long()
    signs = _signs(draws[:, 1:, :, :, None, None])
    # (n, C, down, across, side, side): a pair of bumps for every tile
    tiles = _bumps_like(images, side)[transposed].unsqueeze(1) * signs
    grid = tiles.permute(0, 1, 2, 4, 3, 5).reshape(n, channels, down * side, across * side)
    # The tiles seldom fill the image: the border around them stays as it is
    change = torch.zeros_like(images)
    top = (height - down * side) // 2
    left = (width - across * side) // 2
    change[:, :, top : top + down * side, left : left + across * side] = grid
    return change
