"""Processes that share the work, as torchrun starts them; without torchrun there is one, rank 0 of 1."""

import gc
import os
import pickle
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from time import sleep
from typing import Any, NoReturn, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor

from base.errors import ProjectError

T = TypeVar("T")
LOOK_EVERY = 0.5
"""Seconds between two looks at signals, where a process waits for others."""
_store: dist.Store | None = None
"""What all processes of the job can write to and read, as long as they are joined."""


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
    """Join the other processes that torchrun has started, for as long as the context lasts; inside another such context
    nothing is left to do.

    Plain values and tensors on the CPU are exchanged by gloo, which serves every device; `training` adds NCCL for gradients on
    CUDA devices.

    Where one of them fails, all end with its exit code.

    Raises:
        ProjectError: another process has ended in the middle of the work, or the connection has failed.
    """
    if started_processes() == world_size():
        yield
        return
    with_cuda = training and torch.cuda.is_available() and dist.is_nccl_available()
    global _store
    rendezvous, number, size = next(dist.rendezvous("env://"))
    _store = _meet(rendezvous, number, size)
    # the first to finish its share waits for the last, however long that takes; torchrun ends all when a process dies, but for
    # a machine that vanishes without closing its connections they wait until this timeout
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if with_cuda else "gloo",
        store=_store,
        rank=number,
        world_size=size,
        timeout=timedelta(days=7),
    )
    try:
        # Where it raises, the group stays until the process ends: the others take that for the
        # sign that all is said.
        yield
    except RuntimeError as error:
        if not is_of_connection(error):
            raise
        exit_code = _told("failed")
        if exit_code:  # and the process that has failed has said why
            end_process(exit_code)
        raise ProjectError(f"rank {number}: {_explained(error)}") from error
    except SystemExit as leaving:  # see `leave_the_word_to_the_first`
        _wait_for_the_word_of(0)
        end_process(int(leaving.code or 0))
    except ProjectError as error:
        _tell("failed", error.exit_code)
        speaker = _first_to_fail(number)
        if speaker != number:
            # all have read the same file or command line, and one of them says what is wrong
            _wait_for_the_word_of(speaker)
            end_process(error.exit_code)
        raise
    gather(None)
    gc.collect()  # models in reference cycles hold on to the group
    dist.destroy_process_group()


def end_process(code: int) -> NoReturn:
    """Exit at once: a group whose work was broken off has threads that wait for the others, and Python
    would wait for them."""
    for stream in (sys.stdout, sys.stderr):
        # None where it was closed before Python began
        if stream is not None:
            stream.flush()
    os._exit(code)


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


def largest(number: int) -> int:
    """The largest of all ranks' numbers, on every rank."""
    if world_size() == 1:
        return number
    tensor = torch.tensor(number)
    _finish(dist.all_reduce(tensor, dist.ReduceOp.MAX, async_op=True))
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
    words = _as_bytes((failure and failure.exit_code, value))
    size = torch.tensor([len(words)])
    _finish(dist.broadcast(size, 0, async_op=True))
    if rank() > 0:
        words = torch.empty(int(size), dtype=torch.uint8)
    _finish(dist.broadcast(words, 0, async_op=True))
    exit_code, value = _from_bytes(words)
    if exit_code:
        leave_the_word_to_the_first(exit_code)
    if failure is not None:
        raise failure
    return value


def leave_the_word_to_the_first(exit_code: int) -> None:
    """On every rank but 0: end this process quietly, because rank 0 says why all end, with this exit code (see
    `_wait_for_the_word_of`)."""
    if rank() > 0:
        raise SystemExit(exit_code)


def _wait_for_the_word_of(speaker: int) -> None:
    """Wait until this rank has said why all end: torchrun ends it in the middle of its sentence when another process fails, and
    ends this one when the speaker has failed."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    with suppress(RuntimeError):  # it sends nothing, and its connection closes when it ends
        dist.irecv(torch.empty(1), src=speaker).wait(timedelta(minutes=1))
    sleep(1)  # until torchrun has seen that it has


def _first_to_fail(number: int) -> int:
    """The first rank that has asked this; `number` is this one's. Where torchrun does not keep the
    store, each is the first: to ask a store that has ended makes torch print its own stack."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        with suppress(RuntimeError):
            return int(_store.compare_set("first to fail", "", str(number)))
    return number


def ask_all_to_stop(number: int) -> None:
    """Tell the other processes of the signal that has reached this one; see `asked_to_stop`."""
    _tell("stop", number)


def asked_to_stop() -> int:
    """The number of the signal that has reached any process; 0 as long as none has. Waits for nobody."""
    return _told("stop")


def tell_failure(exit_code: int) -> None:
    """Let the processes that lose their connection to this one end with the same exit code, and
    without a word: this one has said why."""
    _tell("failed", exit_code)


def _tell(what: str, number: int) -> None:
    """Let all processes know a number; see `_told`."""
    if _store is not None:
        with suppress(RuntimeError):  # whoever keeps the store has ended
            _store.set(what, str(number))


def _told(what: str) -> int:
    """The number that a process has told last; 0 where none has. Waits for nobody."""
    with suppress(RuntimeError):
        if _store is not None and _store.check([what]):
            return int(_store.get(what))
    return 0


def moments_computed(more: int) -> int:
    """How often any process has said that it still computes; `more` is 1 to say so, 0 to ask. Waits for nobody."""
    with suppress(RuntimeError):
        return 0 if _store is None else _store.add("computed", more)
    return 0


def quiet() -> bool | None:
    """tqdm's `disable`: bars are drawn by rank 0, and by it only on a terminal."""
    return None if rank() == 0 else True


@torch.no_grad()
def take_from_first(tensors: Sequence[Tensor]) -> None:
    """Overwrite these tensors, which are of the same shapes on every rank, by those of rank 0, in one message per type."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        of_type = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.flatten() for tensor in of_type])
        if flat.device.type == "cpu":
            _finish(dist.broadcast(flat, 0, async_op=True))
        else:
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
