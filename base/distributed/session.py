"""Joining and leaving the processes that torchrun has started, and ending together when one
fails."""

import gc
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from time import sleep
from typing import NoReturn
from uuid import uuid4

import torch
import torch.distributed as dist

from base.distributed.collectives import barrier
from base.distributed.process_group import started_processes, world_size
from base.errors import ProjectError

_store: dist.Store | None = None
"""What all processes of the job can write to and read, as long as they are joined."""


@contextmanager
def distributed_session(training: bool = False) -> Iterator[None]:
    """Join the other processes that torchrun has started, for as long as the context lasts; inside
    another such context nothing is left to do.

    Plain values and tensors on the CPU are exchanged by gloo, which serves every device; `training`
    adds NCCL for gradients on CUDA devices.

    Where one of them fails, all end with its exit code.

    Raises:
        ProjectError: another process has ended in the middle of the work, or the connection has
            failed.
    """
    if started_processes() == world_size():
        yield
        return
    with_cuda = training and torch.cuda.is_available() and dist.is_nccl_available()
    global _store
    rendezvous, number, size = next(dist.rendezvous("env://"))
    _store = _meet(rendezvous, number, size)
    # the first to finish its shard waits for the last, however long that takes; torchrun ends all
    # when a process dies, but for a machine that vanishes without closing its connections they wait
    # until this timeout
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
    except SystemExit as leaving:  # see `exit_unless_primary`
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
    barrier()
    gc.collect()  # models in reference cycles hold on to the group
    dist.destroy_process_group()


def end_process(code: int) -> NoReturn:
    """Exit at once: a group whose work was broken off has threads that wait for the others, and
    Python would wait for them."""
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


def _wait_for_the_word_of(speaker: int) -> None:
    """Wait until this rank has said why all end: torchrun ends it in the middle of its sentence
    when another process fails, and ends this one when the speaker has failed."""
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
    """The number of the signal that has reached any process; 0 as long as none has. Waits for
    nobody."""
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
    """How often any process has said that it still computes; `more` is 1 to say so, 0 to ask. Waits
    for nobody."""
    with suppress(RuntimeError):
        return 0 if _store is None else _store.add("computed", more)
    return 0


def is_of_connection(error: Exception) -> bool:
    """Whether gloo, NCCL or torch's store raised it; gloo's are plain `RuntimeError`s that name
    their place."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _explained(error: Exception) -> str:
    """What gloo or NCCL say, in one line: in short where another process is the cause, all that
    they know otherwise."""
    # and then come places in their own code
    text = str(error).partition("Exception raised from")[0]
    lines = [re.sub(r"^\[[^]]*\] ", "", line).strip() for line in text.splitlines() if line.strip()]
    lines = lines or [type(error).__name__]
    if re.search(
        "closed by peer|reset by peer|broken pipe|remote process|remote error", text, re.IGNORECASE
    ):
        return f"another process has ended ({lines[0].split('. This')[0].rstrip('.')}): this one ends, too"
    return f"the processes cannot work together: {' '.join(lines)}"
