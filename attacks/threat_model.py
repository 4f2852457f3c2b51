"""The threat model: which perturbations of an image count as small, and how to move among them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.arguments import check_size
from base.device import to_device
from base.distributed import ShardedGenerator

NORMS = ("linf", "l2")
ROUNDING = 1e-6
Generators = torch.Generator | ShardedGenerator | Sequence[torch.Generator]
"""One generator for a whole batch, one for a minibatch of which the batch is a process's share, or
one for each image, with which no draw depends on the other images of the batch."""


def in_pixel_range(size: float, norm: str) -> float:
    """An epsilon or step size of a config or a command line in units of the pixel range `[0, 1]`.

    This is the only place that converts: l-inf sizes are written in 1/255 (8 means 8/255), l2 sizes
    in the pixel range already."""
    return size / 255 if norm == "linf" else size


def format_size(size: float, norm: str) -> str:
    """A size in pixel range as people write it: `8/255` for l-inf, `0.5` for l2."""
    return f"{size * 255:.4g}/255" if norm == "linf" else f"{size:.4g}"


@dataclass(frozen=True)
class ThreatModel:
    """All images within `epsilon` of the original in `norm`, with pixels in `[0, 1]`.

    Attributes:
        norm: `"linf"`, the largest change of any pixel, or `"l2"`, the Euclidean length of the
            change.
        epsilon: radius in units of the pixel range, at least 0.

    Raises:
        ValueError: another norm, or an epsilon that is negative, not finite, or above 1 for l-inf.
    """

    norm: str
    epsilon: float

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"norm {self.norm!r} is not one of: {', '.join(NORMS)}")
        # as a plain float, also where numpy's was given
        object.__setattr__(self, "epsilon", check_size("epsilon", self.epsilon, self.norm))

    def project(self, points: Tensor, images: Tensor) -> Tensor:
        """The allowed images at `points` `(B, C, H, W)`, or the nearest to them on the way back to
        `images`.

        First into the ball, then into `[0, 1]`; as `images` lie in `[0, 1]`, the second never
        leaves the ball again."""
        if self.norm == "linf":
            points = torch.minimum(
                torch.maximum(points, images - self.epsilon), images + self.epsilon
            )
        else:
            points = images + self.bound(points - images)
        return points.clamp(0, 1)

    def bound(self, change: Tensor) -> Tensor:
        """The nearest `change` `(B, C, H, W)` in the ball around zero; under l2 within 1e-6 of its
        radius, so that rounding in `images + change` does not leave the ball."""
        if self.norm == "linf":
            return change.clamp(-self.epsilon, self.epsilon)
        return change * (self.epsilon * (1 - ROUNDING) / lengths(change).clamp_min(1e-30)).clamp(
            max=1
        )

    def step(self, points: Tensor, gradient: Tensor, size: float) -> Tensor:
        """`points` moved by `size` in direction of steepest ascent: the gradient's sign (l-inf), or
        the gradient at length 1 (l2). Where the gradient is zero or NaN nothing moves. The result
        is not projected."""
        return points + size * self.direction(gradient)

    def direction(self, gradient: Tensor) -> Tensor:
        """The direction of steepest ascent, of size 1 in this norm; see `step`."""
        gradient = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
        if self.norm == "linf":
            return gradient.sign()
        # the largest entry first: lengths of denormal gradients have few digits
        gradient = gradient / _largest_entry(gradient)
        return gradient / lengths(gradient).clamp_min(0.5)  # at least 1 unless the gradient is zero

    def random_start(self, images: Tensor, generators: Generators) -> Tensor:
        """Allowed images around `images` `(B, C, H, W)`, clamped to `[0, 1]`.

        Under linf they are drawn uniformly from the ball. Under l2 direction and length are
        uniform: in many dimensions nearly all of the ball lies at its surface, and an attack of few
        steps that begins with a random change of full length does not get rid of it, and finds
        less."""
        if self.norm == "linf":
            change = 2 * draw(torch.rand, images, generators) - 1
        else:
            direction = draw(torch.randn, images, generators)
            radius = draw(torch.rand, images[:, :1, :1, :1], generators)
            change = direction / lengths(direction).clamp_min(1e-30) * radius
        return self.project(images + self.epsilon * change, images)

    def distance(self, points: Tensor, images: Tensor) -> Tensor:
        """The size `(B,)` of the change from `images` to `points`, in this norm."""
        change = points - images
        if self.norm == "linf":
            return change.flatten(1).abs().amax(dim=1)
        return lengths(change).flatten()


def lengths(change: Tensor) -> Tensor:
    """The Euclidean length of every image, `(B, 1, 1, 1)`, exact to rounding for any size.

    `torch.linalg.vector_norm` adds squares one after another: in float32, of 224 x 224 pixels, it
    is off by 2e-5. `sum` adds them pairwise. The largest entry is divided out, so that no square
    vanishes or becomes infinite.
    """
    largest = _largest_entry(change)
    return largest * (change / largest).square().sum(dim=(1, 2, 3), keepdim=True).sqrt()


def _largest_entry(change: Tensor) -> Tensor:
    """The largest absolute value of every image, `(B, 1, 1, 1)`; 1 where all are zero."""
    largest = change.abs().amax(dim=(1, 2, 3), keepdim=True)
    return torch.where(largest > 0, largest, 1)


def generators_of(generators: Generators, index: Tensor) -> Generators:
    """The generators of the images at `index`, int64 `(n,)`."""
    return (
        [generators[image] for image in index.tolist()]
        if isinstance(generators, Sequence)
        else generators
    )


def draw(distribution: Callable[..., Tensor], like: Tensor, generators: Generators) -> Tensor:
    """Random numbers of the shape of `like`, drawn on the CPU, so that they are the same on every
    device."""
    if isinstance(generators, torch.Generator):
        drawn = distribution(like.shape, generator=generators)
    elif isinstance(generators, ShardedGenerator):
        drawn = generators.draw(distribution, like.shape[1:])
    else:
        drawn = torch.stack(
            [distribution(like.shape[1:], generator=generator) for generator in generators]
        )
    return to_device(drawn.to(like.dtype), like.device)
