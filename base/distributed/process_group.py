"""Which process this is, of how many; without torchrun there is one, rank 0 of 1."""

import os

import torch.distributed as dist


def rank() -> int:
    """The number of this process, from 0 on."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many processes share the work."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def started_processes() -> int:
    """How many processes torchrun has started, whether they have met yet or not; 1 without
    torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_primary() -> bool:
    """Whether this is rank 0, the process that writes files and draws progress bars."""
    return rank() == 0


def hide_progress_bar() -> bool | None:
    """The argument `disable` of tqdm: rank 0 alone draws bars, and only on a terminal (None)."""
    return None if is_primary() else True
