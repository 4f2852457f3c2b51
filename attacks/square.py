"""The Square attack: random search, for models whose gradients are missing or mislead."""

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from attacks.arguments import check_count, check_number
from attacks.attack import Attack
from attacks.classifier import Model
from attacks.losses import wrongness
from attacks.threat_model import Generators, draw, generators_of, lengths

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Of 10,000 queries, those after which the share of changed pixels is halved."""


@dataclass(frozen=True)
class Square(Attack):
    """The Square attack (Andriushchenko et al., arXiv:1912.00049): random search with forward
    passes only.

    Starts with vertical stripes of +-epsilon per channel (l-inf) or a grid of bumps of total length
    epsilon (l2), then proposes a change in a random square window and keeps it if the loss grows or
    the image is misclassified. The window covers the share `p` of the pixels; `p` starts at
    `p_init` and is halved after the paper's 10, 50, 200, 500, 1000, 2000, 4000, 6000 and 8000 of
    10,000 queries, scaled to `queries`. For l-inf a proposal sets the window to the image
    +-epsilon, one sign per channel (algorithm 2; that is the published step of +-2 epsilon,
    clipped). For l2 it takes the change away in a second window of the same size and puts its
    length, and what was left of epsilon, into bumps in the first (algorithm 3).

    Misclassified images leave the batch, those that are misclassified from the beginning unchanged.
    Every image has windows and signs of its own (the PyTorch code of the authors draws them once
    for the batch), and windows may touch the lower and right border, which the authors' code leaves
    out.

    Args:
        epsilon: radius in units of the pixel range, such as 8/255.
        queries: points tried for an image, the start among them, at least 1; one forward pass on
            the image itself comes first.
        norm: `"linf"` or `"l2"`.
        p_init: share of the pixels in the first windows, in (0, 1].
        loss: `"margin"`, `"ce"` or `"dlr"`.
        seed: of all draws, where a call brings no generators.

    Raises:
        ValueError: an argument out of its range.
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
        left = (wrongness(model(images), labels) == 0).nonzero().flatten()
        for query in range(self.queries):
            if len(left) == 0:
                break
            own = generators_of(generators, left)
            tried = (
                self.propose(points[left], images[left], query, own)
                if query
                else self.start(images[left], own)
            )
            logits = model(tried)
            losses = self.losses(logits, labels[left])
            broken = wrongness(logits, labels[left]) > 0
            better = broken | (losses > best[left])
            points[left[better]] = tried[better]
            best[left[better]] = losses[better]
            left = left[~broken]
        return points

    def start(self, images: Tensor, generators: Generators) -> Tensor:
        """The first points tried for `images` `(n, C, H, W)`."""
        if self.threat_model.norm == "linf":
            signs = _signs(draw(torch.rand, images[:, :, :1], generators))
            return self.threat_model.project(images + self.threat_model.epsilon * signs, images)
        return self._of_length_epsilon(_bump_grid(images, generators), images)

    def propose(self, points: Tensor, images: Tensor, query: int, generators: Generators) -> Tensor:
        """The next points to try, from the best `points` so far; `query` counts from 1."""
        side = self.side(query, *images.shape[2:])
        move = self._propose_linf if self.threat_model.norm == "linf" else self._propose_l2
        return move(points, images, side, generators)

    def side(self, query: int, height: int, width: int) -> int:
        """The side in pixels of the windows of a query: `sqrt(p H W)`, at most the image's; for l2
        odd and at least 3, as bumps need room (an image of even or smaller size is the
        exception)."""
        share = self.p_init / 2 ** sum(
            query / self.queries * 10_000 > halving for halving in HALVINGS
        )
        side = max(round((share * height * width) ** 0.5), 1)
        if self.threat_model.norm == "l2":
            side = max(side, 3) | 1
        return min(side, height, width)

    def _propose_linf(
        self, points: Tensor, images: Tensor, side: int, generators: Generators
    ) -> Tensor:
        n, channels, height, width = images.shape
        draws = _uniform(n, 2 + channels, images, generators)
        rows, columns = _inside(draws[:, 0], height, side)[0], _inside(draws[:, 1], width, side)[0]
        window = (rows[:, :, None] & columns[:, None, :]).unsqueeze(1)
        changed = images + self.threat_model.epsilon * _signs(draws[:, 2:, None, None])
        return self.threat_model.project(torch.where(window, changed, points), images)

    def _propose_l2(
        self, points: Tensor, images: Tensor, side: int, generators: Generators
    ) -> Tensor:
        n, channels, height, width = images.shape
        draws = _uniform(n, 5 + channels, images, generators)
        signs = _signs(draws[:, 5:, None, None])
        (rows, row), (columns, column) = (
            _inside(draws[:, 0], height, side),
            _inside(draws[:, 1], width, side),
        )
        filled = (rows[:, :, None] & columns[:, None, :]).unsqueeze(1)
        emptied = (
            _inside(draws[:, 2], height, side)[0][:, :, None]
            & _inside(draws[:, 3], width, side)[0][:, None, :]
        )
        emptied = emptied.unsqueeze(1) & ~filled
        turned = (draws[:, 4] < 0.5).long()[:, None, None]
        # The shape is (n, 1, H, W).
        bumps = _bumps(side).to(images)[turned, row[:, :, None], column[:, None, :]].unsqueeze(1)

        change = points - images
        there = torch.where(filled, change, 0)
        room = (self.threat_model.epsilon**2 - _squares(change, (1, 2, 3))).clamp_min(0) / channels
        length = (room + _squares(torch.where(filled | emptied, change, 0), (2, 3))).sqrt()
        new = torch.where(filled, bumps * signs, 0) + there / _squares(
            there, (2, 3)
        ).sqrt().clamp_min(1e-12)
        new = new / _squares(new, (2, 3)).sqrt().clamp_min(1e-12) * length
        return self._of_length_epsilon(
            torch.where(filled, new, torch.where(emptied, 0, change)), images
        )

    def _of_length_epsilon(self, change: Tensor, images: Tensor) -> Tensor:
        change = change * (self.threat_model.epsilon / lengths(change).clamp_min(1e-12))
        return self.threat_model.project(images + change, images)


def _uniform(n: int, count: int, images: Tensor, generators: Generators) -> Tensor:
    """`count` numbers in [0, 1) for each of `n` images, float32 whatever the images are: a rounded
    1 would be no place."""
    return draw(torch.rand, images.new_empty((n, count), dtype=torch.float32), generators)


def _signs(draws: Tensor) -> Tensor:
    return torch.where(draws < 0.5, -1.0, 1.0)


def _inside(draws: Tensor, size: int, side: int) -> tuple[Tensor, Tensor]:
    """Which of `size` rows or columns lie in windows at random places, bool `(n, size)`, and at
    which of the window's rows or columns (0 for those outside)."""
    first = (draws * (size - side + 1)).long()
    place = torch.arange(size, device=draws.device) - first[:, None]
    inside = (place >= 0) & (place < side)
    return inside, torch.where(inside, place, 0)


def _squares(change: Tensor, dims: tuple[int, ...]) -> Tensor:
    return change.square().sum(dim=dims, keepdim=True)


def _bump(height: int, width: int) -> Tensor:
    """A pyramid of length 1, `(height, width)`: at distance d (the larger of rows and columns) from
    its middle `sum_{k=d}^{n} 1 / (k + 1)^2` with n half the larger side."""
    rows, columns = (
        (torch.arange(height) - height // 2).abs(),
        (torch.arange(width) - width // 2).abs(),
    )
    terms = 1 / torch.arange(1, max(height, width) // 2 + 2).square()
    bump = terms.flip(0).cumsum(0).flip(0)[torch.maximum(rows[:, None], columns[None, :])]
    return bump / torch.linalg.vector_norm(bump)


def _bumps(side: int) -> Tensor:
    """A bump above a negative one, of length 1, and the same lying on its side, `(2, side,
    side)`."""
    above = torch.cat([_bump(side // 2, side), -_bump(side - side // 2, side)])
    above = above / torch.linalg.vector_norm(above)
    return torch.stack([above, above.T])


def _bump_grid(images: Tensor, generators: Generators) -> Tensor:
    """Pairs of bumps of a fifth of the image's side, turned at random, with a random sign per
    channel, `(n, C, H, W)`."""
    n, channels, height, width = images.shape
    side = max(min(height, width) // 5, 1)
    down, across = height // side, width // side
    draws = _uniform(n, down * across * (1 + channels), images, generators).reshape(
        n, 1 + channels, down, across
    )
    turned = (draws[:, 0] < 0.5).long()
    tiles = _bumps(side).to(images)[turned].unsqueeze(1) * _signs(draws[:, 1:, :, :, None, None])
    grid = tiles.permute(0, 1, 2, 4, 3, 5).reshape(n, channels, down * side, across * side)
    change = torch.zeros_like(images)
    top, left = (height - down * side) // 2, (width - across * side) // 2
    change[:, :, top : top + down * side, left : left + across * side] = grid
    return change
