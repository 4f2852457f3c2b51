"""Processes that share the work, as torchrun starts them; without torchrun there is one, rank 0 of 1."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist


def rank() -> int:
    """The number of this process, from 0 on."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many processes share the work."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def ranks() -> Iterator[None]:
    """Join the other processes that torchrun has started, for as long as the context lasts.

    Only plain values and tensors on the CPU are exchanged, so gloo serves every device.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    # the first to finish its share waits for the last, however long that takes; torchrun ends all when one dies
    dist.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        yield
    finally:
        dist.destroy_process_group()


def gather(value: Any) -> list[Any]:
    """The values of all ranks, in their order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
