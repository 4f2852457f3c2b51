"""Processes that share the work, as torchrun starts them; without torchrun there is one, rank 0 of 1."""

import gc
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from time import sleep
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor

from base.errors import ProjectError

T = TypeVar("T")


def rank() -> int:
    """The number of this process, from 0 on."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many processes share the work."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def started_processes() -> int:
    """How many processes torchrun has started, whether they have met yet or not; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def ranks(training: bool = False) -> Iterator[None]:
    """Join the other processes that torchrun has started, for as long as the context lasts.

    Plain values and tensors on the CPU are exchanged by gloo, which serves every device; `training` adds NCCL for gradients on
    CUDA devices.

    Raises:
        ProjectError: another process has ended in the middle of the work, or the connection has failed.
    """
    if started_processes() == 1:
        yield
        return
    with_cuda = training and torch.cuda.is_available() and dist.is_nccl_available()
    store, number, size = next(dist.rendezvous("env://"))
    # the first to finish its share waits for the last, however long that takes; torchrun ends all when a process dies, but for
    # a machine that vanishes without closing its connections they wait until this timeout
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if with_cuda else "gloo",
        store=_meet(store, number, size),
        rank=number,
        world_size=size,
        timeout=timedelta(days=7),
    )
    try:
        yield
    except RuntimeError as error:
        if is_of_connection(error):
            raise ProjectError(f"rank {number}: {_explained(error)}") from error
        raise
    except SystemExit as leaving:  # see `leave_the_word_to_the_first`; at once, as the group's threads may abort a slow goodbye
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_wait_for_the_first(number, int(leaving.code or 0)))
    except ProjectError:
        if not with_cuda:  # NCCL would wait for the others
            _part()
        raise
    gather(None)
    _part()


def _part() -> None:
    gc.collect()  # models in reference cycles hold on to the group
    dist.destroy_process_group()


def _meet(store: dist.Store, number: int, size: int) -> dist.Store:
    """A part of `store` that nobody has written to before.

    torchrun keeps its store when it starts processes anew (`--max-restarts`), with the addresses of those that died, and a
    process that reads before the new address is written would call a dead one. So all agree on a fresh name first: each asks
    with a token of its own, and rank 0 answers, perhaps the tokens of the dead, too, until all have taken up its name.
    """
    if number > 0:
        token = uuid4().hex
        store.set(f"asks {number}", token)
        name = store.get(f"answer {token}").decode()
        store.set(f"{name} {number}", "")
        return dist.PrefixStore(name, store)
    name = uuid4().hex
    while not all(store.check([f"{name} {other}"]) for other in range(1, size)):
        for other in range(1, size):
            if store.check([f"asks {other}"]):
                store.set(f"answer {store.get(f'asks {other}').decode()}", name)
        sleep(0.05)
    return dist.PrefixStore(name, store)


def gather(value: T) -> list[T]:
    """The values of all ranks, in their order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def largest(number: int) -> int:
    """The largest of all ranks' numbers, on every rank."""
    if world_size() == 1:
        return number
    tensor = torch.tensor(number)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def from_first(function: Callable[[], T]) -> T:
    """What `function` returns on rank 0, where alone it is called, on every rank; where it raises a `ProjectError` there, the
    other ranks leave without a word."""
    if world_size() == 1:
        return function()
    failure, value = None, None
    if rank() == 0:
        try:
            value = function()
        except ProjectError as error:
            failure = error
    outcome: list[Any] = [failure and failure.exit_code, value]
    dist.broadcast_object_list(outcome)
    if outcome[0]:
        leave_the_word_to_the_first(outcome[0])
        raise failure
    return outcome[1]


def leave_the_word_to_the_first(exit_code: int) -> None:
    """On every rank but 0: end this process quietly, because rank 0 says why all end, with this exit code (see
    `_wait_for_the_first`)."""
    if rank() > 0:
        raise SystemExit(exit_code)


def _wait_for_the_first(number: int, exit_code: int) -> int:
    """Keep torchrun from ending rank 0 in the middle of its sentence, which it does when another process fails; returns the
    exit code to leave with.

    Beside rank 0 that is 0: one failure is enough for their machine. On another machine torchrun would take 0 for success and
    not take part in a restart, so it is `exit_code`, when rank 0 has left.
    """
    if number == int(os.environ.get("LOCAL_RANK", number)):  # ranks are given out machine by machine
        return 0
    with suppress(RuntimeError):  # rank 0 sends nothing, and closes the connection in the end, unless NCCL waits in its turn
        dist.irecv(torch.empty(1), src=0).wait(timedelta(minutes=1))
    sleep(1)  # it speaks after that
    return exit_code


def quiet() -> bool | None:
    """tqdm's `disable`: bars are drawn by rank 0, and by it only on a terminal."""
    return None if rank() == 0 else True


@torch.no_grad()
def take_from_first(tensors: Sequence[Tensor]) -> None:
    """Overwrite these tensors, which are of the same shapes on every rank, by those of rank 0, in one message per type."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        of_type = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.flatten() for tensor in of_type])
        dist.broadcast(flat, 0)
        for tensor, values in zip(of_type, flat.split([tensor.numel() for tensor in of_type]), strict=True):
            tensor.copy_(values.view_as(tensor))


@dataclass(frozen=True)
class Share:
    """The part of a minibatch that this process computes on: every `processes`-th image from number `rank` on.

    A minibatch with fewer images than processes is computed as a whole by each of them, so that none has nothing to do (and
    nothing to bring to the statistics of batch normalisation), and counted by rank 0 only. (Synchronised batch normalisation
    then sees each image several times, which changes nothing but the n / (n - 1) of its running variance.)

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
        """The images that only this process has; none where there are fewer images than processes before it."""
        return slice(self.rank, self.total, self.processes)

    @property
    def counts(self) -> bool:
        """Whether what this process computes belongs into sums over all processes."""
        return self.rank == 0 or not self.copied

    def mean(self, losses: Tensor) -> Tensor:
        """What this process contributes to the minibatch's mean of `losses` `(B,)`: the average over all processes, which
        DistributedDataParallel takes of its gradients, is the mean over the whole minibatch, however uneven the shares are."""
        if self.processes == 1 or self.copied:
            return losses.mean()
        return losses.sum() * (self.processes / self.total)


def share_of(total: int) -> Share:
    """This process's share of a minibatch of `total` images."""
    return Share(total, rank(), world_size())


@dataclass(frozen=True)
class SharedGenerator:
    """Draws for a whole minibatch, from the same state in every process, of which each takes its share's part: the number of
    processes then changes no draw."""

    generator: torch.Generator
    share: Share

    def draw(self, distribution: Callable[..., Tensor], shape: Sequence[int]) -> Tensor:
        """`distribution((B, *shape), generator=...)` of the share's images."""
        return distribution((self.share.total, *shape), generator=self.generator)[self.share.part]


def is_of_connection(error: Exception) -> bool:
    """Whether gloo, NCCL or torch's store raised it; gloo's are plain `RuntimeError`s that name their place."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _explained(error: Exception) -> str:
    """What gloo or NCCL say, in one line: in short where another process is the cause, all that they know otherwise."""
    text = str(error).partition("Exception raised from")[0]  # and then come places in their own code
    lines = [re.sub(r"^\[[^]]*\] ", "", line).strip() for line in text.splitlines() if line.strip()]
    lines = lines or [type(error).__name__]
    if re.search("closed by peer|reset by peer|broken pipe|remote process|remote error", text, re.IGNORECASE):
        return f"another process has ended ({lines[0].split('. This')[0].rstrip('.')}): this one ends, too"
    return f"the processes cannot work together: {' '.join(lines)}"
