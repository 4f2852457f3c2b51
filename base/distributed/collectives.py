"""What all processes of a run exchange; with one process each function returns at once."""

import pickle
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from base.distributed.process_group import is_primary, world_size
from base.errors import ProjectError

T = TypeVar("T")
LOOK_EVERY = 0.5
"""Seconds between two looks at signals, where a process waits for others."""


def all_gather_object(value: T) -> list[T]:
    """The values of all ranks, in their order, on every rank."""
    if world_size() == 1:
        return [value]
    words = _as_bytes(value)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    _finish(dist.all_gather(sizes, torch.tensor([len(words)]), async_op=True))
    longest = int(max(sizes))
    padded = torch.cat([words, words.new_zeros(longest - len(words))])
    parts = [torch.empty_like(padded) for _ in sizes]
    _finish(dist.all_gather(parts, padded, async_op=True))
    return [_from_bytes(part[: int(size)]) for part, size in zip(parts, sizes, strict=True)]


def _as_bytes(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def _from_bytes(words: Tensor) -> Any:
    return pickle.loads(words.numpy().tobytes())  # noqa: S301 - of a process of the same job


def _finish(work: dist.Work) -> None:
    """Wait until all processes have taken part, and let Python see to signals in between: a process
    that waits in gloo's own code would not hear them."""
    while not work.is_completed():
        try:
            work.wait(timedelta(seconds=LOOK_EVERY))
        except RuntimeError:  # time is up, or the connection has failed, which the last line tells
            continue
    work.wait()


def barrier() -> None:
    """Wait until every process has come to this point."""
    all_gather_object(None)


def all_reduce_max(number: int) -> int:
    """The largest of all ranks' numbers, on every rank."""
    if world_size() == 1:
        return number
    tensor = torch.tensor(number)
    _finish(dist.all_reduce(tensor, dist.ReduceOp.MAX, async_op=True))
    return int(tensor)


def all_reduce_min(tensor: Tensor) -> Tensor:
    """Return the elementwise smallest of all ranks' tensors, on every rank; a GPU's host does not
    wait for it."""
    if world_size() == 1:
        return tensor
    reduced = tensor.clone()
    dist.all_reduce(reduced, dist.ReduceOp.MIN)
    return reduced


def from_primary(function: Callable[[], T]) -> T:
    """What `function` returns on rank 0, where alone it is called, on every rank; where it raises a
    `ProjectError` there, the other ranks leave without a word."""
    if world_size() == 1:
        return function()
    failure, value = None, None
    if is_primary():
        try:
            value = function()
        except ProjectError as error:
            failure = error
    words = _as_bytes((failure and failure.exit_code, value))
    size = torch.tensor([len(words)])
    _finish(dist.broadcast(size, 0, async_op=True))
    if not is_primary():
        words = torch.empty(int(size), dtype=torch.uint8)
    _finish(dist.broadcast(words, 0, async_op=True))
    exit_code, value = _from_bytes(words)
    if exit_code:
        exit_unless_primary(exit_code)
    if failure is not None:
        raise failure
    return value


def exit_unless_primary(exit_code: int) -> None:
    """On every rank but 0: end this process quietly, because rank 0 says why all end, with this
    exit code (see `_wait_for_the_word_of`)."""
    if not is_primary():
        raise SystemExit(exit_code)


@torch.no_grad()
def broadcast(tensors: Sequence[Tensor]) -> None:
    """Overwrite these tensors, which are of the same shapes on every rank, by those of rank 0, in
    one message per type."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        of_type = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.flatten() for tensor in of_type])
        if flat.device.type == "cpu":
            _finish(dist.broadcast(flat, 0, async_op=True))
        else:
            dist.broadcast(flat, 0)
        for tensor, values in zip(
            of_type, flat.split([tensor.numel() for tensor in of_type]), strict=True
        ):
            tensor.copy_(values.view_as(tensor))
