"""Values that all processes of a run exchange. With one process, each function returns at once."""

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

SIGNAL_INTERVAL = 0.5
"""Seconds after which a process that waits for others lets Python handle signals."""


def all_gather_object(value: T) -> list[T]:
    """Return the values of all ranks, in their order, on every rank."""
    if world_size() == 1:
        return [value]
    data = _pickled(value)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    _wait(dist.all_gather(sizes, torch.tensor([len(data)]), async_op=True))
    # all_gather needs tensors of one size.
    longest = int(max(sizes))
    padded = torch.cat([data, data.new_zeros(longest - len(data))])
    parts = [torch.empty_like(padded) for _ in sizes]
    _wait(dist.all_gather(parts, padded, async_op=True))
    return [_unpickled(part[: int(size)]) for part, size in zip(parts, sizes, strict=True)]


def _pickled(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def _unpickled(data: Tensor) -> Any:
    # The bytes come from a process of the same job.
    return pickle.loads(data.numpy().tobytes())  # noqa: S301


def _wait(work: dist.Work) -> None:
    """Wait until all processes have taken part, and let Python handle signals in between."""
    # A process that waits inside gloo's own code would not run Python's signal handlers.
    while not work.is_completed():
        try:
            work.wait(timedelta(seconds=SIGNAL_INTERVAL))
        except RuntimeError:
            # Time is up, or the connection has failed; the last wait raises in the second case.
            continue
    work.wait()


def barrier() -> None:
    """Wait until every process has called this function."""
    all_gather_object(None)


def all_reduce_max(number: int) -> int:
    """Return the largest number of all ranks, on every rank."""
    if world_size() == 1:
        return number
    tensor = torch.tensor(number)
    _wait(dist.all_reduce(tensor, dist.ReduceOp.MAX, async_op=True))
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
    """Call `function` on rank 0 only, and return its value on every rank.

    If it raises a `ProjectError`, the other ranks end silently with the same exit code.
    """
    if world_size() == 1:
        return function()
    failure = None
    value = None
    if is_primary():
        try:
            value = function()
        except ProjectError as error:
            failure = error
    exit_code = 0 if failure is None else failure.exit_code
    data = _pickled((exit_code, value))
    size = torch.tensor([len(data)])
    _wait(dist.broadcast(size, 0, async_op=True))
    if not is_primary():
        data = torch.empty(int(size), dtype=torch.uint8)
    _wait(dist.broadcast(data, 0, async_op=True))
    if failure is not None:
        raise failure
    if not is_primary():
        exit_code, value = _unpickled(data)
        if exit_code:
            exit_unless_primary(exit_code)
    return value


def exit_unless_primary(exit_code: int) -> None:
    """End this process silently with an exit code, unless it is rank 0, which prints the reason."""
    if not is_primary():
        raise SystemExit(exit_code)


@torch.no_grad()
def broadcast(tensors: Sequence[Tensor]) -> None:
    """Overwrite tensors by those of rank 0, in one message per dtype.

    Their shapes must be the same on every rank.
    """
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        of_type = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.flatten() for tensor in of_type])
        if flat.device.type == "cpu":
            _wait(dist.broadcast(flat, 0, async_op=True))
        else:
            dist.broadcast(flat, 0)
        sizes = [tensor.numel() for tensor in of_type]
        parts = zip(of_type, flat.split(sizes), strict=True)
        # One kernel on a GPU, instead of one for each tensor.
        torch._foreach_copy_(of_type, [values.view_as(tensor) for tensor, values in parts])
