"""The threat model: which perturbations of an image count as small, and how to move among them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.arguments import check_size
from base import draws_ahead
from base.device import to_device

NORMS = ("linf", "l2")
ROUNDING = 1e-6

Draw = Callable[[Callable[..., Tensor], Sequence[int]], Tensor]
"""`draw(distribution, shape)` -> random numbers `(B, *shape)`, with `shape` that of one image."""
Generators = torch.Generator | Sequence[torch.Generator] | Draw
"""Where an attack's random numbers come from: one generator for the whole batch; one for each
image, so that no draw depends on the other images of the batch; or a function of its own."""


def in_pixel_range(size: float, norm: str) -> float:
    """Convert an epsilon or step size of a config or a command line to the pixel range `[0, 1]`.

    This is the only place that converts: l-inf sizes are written in 1/255 (8 means 8/255), l2 sizes
    in the pixel range already.
    """
    if norm == "linf":
        return size / 255
    return size


def format_size(size: float, norm: str) -> str:
    """Format a size in units of the pixel range for readers: `8/255` for l-inf, `0.5` for l2."""
    if norm == "linf":
        return f"{size * 255:.4g}/255"
    return f"{size:.4g}"


@dataclass(frozen=True)
class ThreatModel:
    """All images within `epsilon` of the original in `norm`, with pixels in `[0, 1]`.

    Attributes:
        norm: `"linf"`, the largest change of any pixel, or `"l2"`, the Euclidean length of the
            change.
        epsilon: radius in units of the pixel range, at least 0.

    Raises:
        ValueError: the norm is another one, or epsilon is negative, not finite, or above 1 for
            l-inf.
    """

    norm: str
    epsilon: float

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"norm {self.norm!r} is not one of: {', '.join(NORMS)}")
        # numpy's numbers become plain floats, which reports can write
        object.__setattr__(self, "epsilon", check_size("epsilon", self.epsilon, self.norm))

    def project(self, points: Tensor, images: Tensor) -> Tensor:
        """Project `points` `(B, C, H, W)` into the ball around `images`, then into `[0, 1]`."""
        # Both branches make a new tensor, into which the last line writes
        if self.norm == "linf":
            projected = torch.clamp(points, images - self.epsilon, images + self.epsilon)
        else:
            projected = self.bound(points - images).add_(images)
        # Images lie in [0, 1], so clamping moves every pixel towards its image's, never out of the
        # ball
        return projected.clamp_(0, 1)

    def bound(self, change: Tensor) -> Tensor:
        """Project `change` `(B, C, H, W)` into the ball around zero."""
        if self.norm == "linf":
            return change.clamp(-self.epsilon, self.epsilon)
        # A little shorter than the radius, so that rounding in images + change stays in the ball
        radius = self.epsilon * (1 - ROUNDING)
        return change * (radius / lengths(change).clamp_min(1e-30)).clamp(max=1)

    def step(self, points: Tensor, gradient: Tensor, size: float) -> Tensor:
        """Move `points` by `size` in the direction of steepest ascent, without projection; see
        `direction`."""
        return points + self.direction(gradient).mul_(size)

    def direction(self, gradient: Tensor) -> Tensor:
        """Return the direction of steepest ascent, of size 1 in this norm, as a new tensor.

        It is the gradient's sign (l-inf), or the gradient at length 1 (l2). It is zero where the
        gradient is zero or NaN.
        """
        gradient = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
        if self.norm == "linf":
            # nan_to_num has made a new tensor
            return gradient.sign_()
        # Squares of tiny gradients underflow: the largest entry becomes 1 before they are taken
        gradient = gradient / _largest_entry(gradient)
        # That makes every length at least 1, except where the gradient is zero and stays zero
        return gradient / _root_of_squares(gradient.square()).clamp_min(0.5)

    def random_start(self, images: Tensor, generators: Generators) -> Tensor:
        """Return random allowed points around `images` `(B, C, H, W)`.

        Under l-inf they are drawn uniformly from the ball, under l2 direction and length are drawn
        uniformly.
        """
        if self.norm == "linf":
            change = (2 * draw(torch.rand, images, generators)).sub_(1)
        else:
            # Nearly all of a ball of many dimensions lies at its surface, and an attack of few
            # steps does not get rid of a random change of full length: it finds less
            direction = draw(torch.randn, images, generators)
            radius = draw(torch.rand, images[:, :1, :1, :1], generators)
            change = (direction / lengths(direction).clamp_min(1e-30)).mul_(radius)
        return self.project(change.mul_(self.epsilon).add_(images), images)

    def distance(self, points: Tensor, images: Tensor) -> Tensor:
        """Return the size `(B,)` of the change from `images` to `points` in this norm."""
        change = points - images
        if self.norm == "linf":
            return change.flatten(1).abs().amax(dim=1)
        return lengths(change).flatten()


def lengths(change: Tensor) -> Tensor:
    """Return the Euclidean length of every image, `(B, 1, 1, 1)`, exact to rounding for any
    size."""
    # The largest entry is divided out, so that no square vanishes or becomes infinite
    largest = _largest_entry(change)
    return largest * _root_of_squares((change / largest).square_())


def _root_of_squares(squares: Tensor) -> Tensor:
    """Return the square root of each image's sum of `squares`, `(B, C, H, W)` -> `(B, 1, 1, 1)`."""
    # torch.linalg.vector_norm adds squares one after another, which in float32 is off by 2e-5 for
    # 224 x 224 pixels; sum adds them pairwise
    return squares.sum(dim=(1, 2, 3), keepdim=True).sqrt()


def _largest_entry(change: Tensor) -> Tensor:
    """Return the largest absolute value of every image, `(B, 1, 1, 1)`; 1 if all are zero."""
    largest = change.abs().amax(dim=(1, 2, 3), keepdim=True)
    return torch.where(largest > 0, largest, 1)


def generators_of(generators: Generators, index: Tensor) -> Generators:
    """Return the generators of the images at `index`, int64 `(n,)`."""
    if isinstance(generators, Sequence):
        return [generators[position] for position in index.tolist()]
    return generators


def draw(distribution: Callable[..., Tensor], like: Tensor, generators: Generators) -> Tensor:
    """Draw random numbers of the shape, type and device of `like` `(B, ...)`.

    Args:
        distribution: `torch.rand`, `torch.randn`, or another function of a shape with the arguments
            `generator` and `dtype`.
        like: the tensor to imitate.
        generators: where the numbers come from.

    Raises:
        ValueError: a function does not return a number for every pixel.
    """
    # On the CPU, so that the numbers are the same for every device
    if isinstance(generators, torch.Generator):
        drawn = draws_ahead.draw(distribution, like.shape, generators)
    elif isinstance(generators, Sequence):
        # float32 also under another default dtype, which would give other numbers
        of_images = [
            distribution(like.shape[1:], generator=one, dtype=torch.float32) for one in generators
        ]
        drawn = torch.stack(of_images)
    else:
        drawn = generators(distribution, like.shape[1:])
        if drawn.shape != like.shape:
            raise ValueError(
                f"generators: the function must return the shape {tuple(like.shape)},"
                f" not {tuple(drawn.shape)}"
            )
    return to_device(drawn.to(like.dtype), like.device)
