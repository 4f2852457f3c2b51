"""The shard of a minibatch that each process computes on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from base.distributed.process_group import rank, world_size
from base.draws_ahead import draw


@dataclass(frozen=True)
class Shard:
    """The part of a minibatch that this process computes on: every `processes`-th image, from image
    `rank` on.

    If a minibatch has fewer images than there are processes, each process computes all of it, and
    only rank 0 counts it. Otherwise some processes would have no image for batch normalization.
    Synchronized batch normalization then sees each image several times, which changes only the
    factor n / (n - 1) of its running variance.

    Attributes:
        total: images in the whole minibatch.
        rank: of this process.
        processes: how many there are.
    """

    total: int
    rank: int = 0
    processes: int = 1

    @property
    def copied(self) -> bool:
        """Whether every process computes the whole minibatch."""
        return self.total < self.processes

    @property
    def part(self) -> slice:
        """The images that this process computes on."""
        if self.copied:
            return slice(0, self.total)
        return self.own

    @property
    def own(self) -> slice:
        """The images that belong to this process only. It can be empty if `copied`."""
        return slice(self.rank, self.total, self.processes)

    @property
    def counts(self) -> bool:
        """Whether the results of this process belong in sums over all processes."""
        return self.rank == 0 or not self.copied

    def mean(self, losses: Tensor) -> Tensor:
        """Return what this process contributes to the mean of `losses` `(B,)` over the minibatch.

        The average of all processes' values is the mean over the whole minibatch, also if the
        shards differ in size.
        """
        if self.processes == 1 or self.copied:
            return losses.mean()
        # DistributedDataParallel divides the sum of gradients by the number of processes.
        return losses.sum() * (self.processes / self.total)


def shard_of(total: int) -> Shard:
    """Return this process's shard of a minibatch of `total` images."""
    return Shard(total, rank(), world_size())


@dataclass(frozen=True)
class ShardedGenerator:
    """Draws for a whole minibatch and returns the part of a shard.

    The generator has the same state in every process, so the number of processes changes no draw.
    """

    generator: torch.Generator
    shard: Shard

    def draw(self, distribution: Callable[..., Tensor], shape: Sequence[int]) -> Tensor:
        """Return the shard's part of `distribution((total, *shape), generator=...)`."""
        whole = (self.shard.total, *shape)
        return draw(distribution, whole, self.generator, self.shard.part)
