"""The shard of a minibatch that each process computes on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from base.distributed.process_group import rank, world_size


@dataclass(frozen=True)
class Shard:
    """The part of a minibatch that this process computes on: every `processes`-th image from number
    `rank` on.

    A minibatch with fewer images than processes is computed as a whole by each of them, so that
    none has nothing to do (and nothing to bring to the statistics of batch normalization), and
    counted by rank 0 only. (Synchronized batch normalization then sees each image several times,
    which changes nothing but the n / (n - 1) of its running variance.)

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
        return slice(0, self.total) if self.copied else self.own

    @property
    def own(self) -> slice:
        """The images that only this process has; none where there are fewer images than processes
        before it."""
        return slice(self.rank, self.total, self.processes)

    @property
    def counts(self) -> bool:
        """Whether what this process computes belongs into sums over all processes."""
        return self.rank == 0 or not self.copied

    def mean(self, losses: Tensor) -> Tensor:
        """What this process contributes to the minibatch's mean of `losses` `(B,)`: the average
        over all processes, which DistributedDataParallel takes of its gradients, is the mean over
        the whole minibatch, however uneven the shards are."""
        if self.processes == 1 or self.copied:
            return losses.mean()
        return losses.sum() * (self.processes / self.total)


def shard_of(total: int) -> Shard:
    """This process's shard of a minibatch of `total` images."""
    return Shard(total, rank(), world_size())


@dataclass(frozen=True)
class ShardedGenerator:
    """Draws for a whole minibatch, from the same state in every process, of which each takes its
    shard's part: the number of processes then changes no draw."""

    generator: torch.Generator
    shard: Shard

    def draw(self, distribution: Callable[..., Tensor], shape: Sequence[int]) -> Tensor:
        """`distribution((B, *shape), generator=...)` of the shard's images."""
        return distribution((self.shard.total, *shape), generator=self.generator)[self.shard.part]
