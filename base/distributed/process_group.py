"""The rank of this process, and how many there are. Without torchrun it is rank 0 of 1."""

import os

import torch.distributed as dist


def rank() -> int:
    """Return the number of this process, from 0."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return 0


def world_size() -> int:
    """Return how many processes share the work."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return 1


def started_processes() -> int:
    """Return how many processes torchrun has started, whether or not they have joined; 1 without
    torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_primary() -> bool:
    """Whether this is rank 0, the process that writes files and draws progress bars."""
    return rank() == 0


def hide_progress_bar() -> bool | None:
    """Return the argument `disable` of tqdm: only rank 0 draws bars, and only on a terminal."""
    if not is_primary():
        return True
    # tqdm itself hides the bar if stderr is not a terminal.
    return None
