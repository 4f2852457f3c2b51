"""Several processes: joining them, exchanging values, sharding minibatches, launching, averaging
gradients."""

from base.distributed.collectives import (
    all_gather_object,
    all_reduce_max,
    all_reduce_min,
    barrier,
    broadcast,
    exit_unless_primary,
    from_primary,
)
from base.distributed.process_group import (
    hide_progress_bar,
    is_primary,
    rank,
    started_processes,
    world_size,
)
from base.distributed.session import distributed_session
from base.distributed.shard import Shard, ShardedGenerator, shard_of

__all__ = [
    "Shard",
    "ShardedGenerator",
    "all_gather_object",
    "all_reduce_max",
    "all_reduce_min",
    "barrier",
    "broadcast",
    "distributed_session",
    "exit_unless_primary",
    "from_primary",
    "hide_progress_bar",
    "is_primary",
    "rank",
    "shard_of",
    "started_processes",
    "world_size",
]
