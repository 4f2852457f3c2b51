"""Joining the processes that torchrun has started, and ending together when one of them fails."""

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
from base.stopping import STOPPING

NCCL_TIMEOUT = timedelta(minutes=30)
"""How long a collective on CUDA may take before NCCL ends the process. Nobody waits on CUDA for
another process's validation or attack, but only for its next gradient."""

_store: dist.Store | None = None
"""A key-value store that all processes of the job read and write; None before a session."""


@contextmanager
def distributed_session(training: bool = False) -> Iterator[None]:
    """Join the other processes that torchrun has started; they part when the context ends.

    Inside another session, or without torchrun, it does nothing. If one process fails, all of them
    end with its exit code.

    Args:
        training: use NCCL, if there is CUDA, for gradients on CUDA devices. Plain values and
            tensors on the CPU always go through gloo.

    Raises:
        ProjectError: another process has ended, or the connection has failed.
    """
    if started_processes() == world_size():
        yield
        return
    with_cuda = training and torch.cuda.is_available() and dist.is_nccl_available()
    global _store
    rendezvous, number, size = next(dist.rendezvous("env://"))
    _store = _fresh_store(rendezvous, number, size)
    # The first process to finish its shard waits for the last, which may take hours: it does so in
    # gloo. torchrun ends all when a process dies; the timeout is only for a machine that vanishes
    # without closing its connections.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if with_cuda else "gloo",
        store=_store,
        rank=number,
        world_size=size,
        timeout=timedelta(days=7),
    )
    if with_cuda:
        _limit_nccl(dist.group.WORLD)
    try:
        # After an error the group is not destroyed before the process ends: the others take a
        # closed connection for the sign that the message has been printed.
        yield
        # A process that has finished meets those that fail in the end here.
        barrier()
    except RuntimeError as error:
        if not is_connection_error(error):
            raise
        exit_code = _read_number("failed")
        if exit_code:
            # The process that failed has printed why.
            end_process(exit_code)
        raise ProjectError(f"rank {number}: {_explain(error)}") from error
    except SystemExit as leaving:
        # Raised by `exit_unless_primary`: rank 0 prints why all end.
        _wait_until_reported(0)
        end_process(int(leaving.code or 0))
    except ProjectError as error:
        _write_number("failed", error.exit_code)
        reporter = _first_to_fail(number)
        if reporter != number:
            # All read the same file or command line, and one message about it is enough.
            _wait_until_reported(reporter)
            end_process(error.exit_code)
        raise
    # Models in reference cycles hold on to the group, which would then never close.
    gc.collect()
    dist.destroy_process_group()


def _limit_nccl(group: dist.ProcessGroup) -> None:
    """Let collectives on CUDA fail after `NCCL_TIMEOUT`; those of gloo keep the group's."""
    backend = group._get_backend(torch.device("cuda"))
    if hasattr(backend, "set_timeout"):
        backend.set_timeout(NCCL_TIMEOUT)
    else:
        # The name before torch 2.14.
        backend._set_default_timeout(NCCL_TIMEOUT)


def end_process(code: int) -> NoReturn:
    """Exit at once, without Python's clean-up.

    A group whose work was broken off has threads that wait for other processes, and Python would
    wait for these threads.
    """
    for stream in (sys.stdout, sys.stderr):
        # It is None if it was closed before Python began.
        if stream is not None:
            stream.flush()
    os._exit(code)


def _fresh_store(store: dist.Store, number: int, size: int) -> dist.Store:
    """Return a part of `store` that nobody has written to before.

    torchrun keeps its store when it restarts processes (`--max-restarts`), with the addresses of
    the dead ones. A process that reads before the new address is written would call a dead process.
    So all agree on a fresh prefix first. Each process asks with its own token, and rank 0 answers
    (perhaps the tokens of dead processes, too) until all have confirmed its prefix.
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


def _wait_until_reported(reporter: int) -> None:
    """Wait until a rank has printed why all processes end."""
    if threading.current_thread() is threading.main_thread():
        # torchrun sends a signal as soon as one process has failed.
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)
    # The rank sends nothing. Waiting ends with an error when its connection closes as it ends.
    with suppress(RuntimeError):
        dist.irecv(torch.empty(1), src=reporter).wait(timedelta(minutes=1))
    # torchrun reports the process that it sees failing first; let that be the reporter.
    sleep(1)


def _first_to_fail(number: int) -> int:
    """Return the first rank that has called this function; `number` is this process's rank."""
    # If torchrun does not keep the store, it may have ended, and asking it would make torch print
    # a stack trace. Then every rank reports its own error.
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        with suppress(RuntimeError):
            return int(_store.compare_set("first to fail", "", str(number)))
    return number


def request_stop(signal_number: int) -> None:
    """Tell the other processes that this one has received a signal; see `requested_stop`."""
    _write_number("stop", signal_number)


def requested_stop() -> int:
    """Return the number of the signal that any process has received, or 0. It does not wait."""
    return _read_number("stop")


def announce_failure(exit_code: int) -> None:
    """Let the processes that lose their connection to this one end silently with its exit code,
    because this process has printed the error."""
    _write_number("failed", exit_code)


def count_activity() -> None:
    """Tell the other processes that this one is computing; see `activity`."""
    _add_activity(1)


def activity() -> int:
    """Return how often any process has called `count_activity`. It does not wait."""
    return _add_activity(0)


def _add_activity(amount: int) -> int:
    if _store is not None:
        with suppress(RuntimeError):
            return _store.add("computed", amount)
    return 0


def _write_number(key: str, number: int) -> None:
    """Write a number for all processes; see `_read_number`."""
    if _store is not None:
        # The process that keeps the store may have ended.
        with suppress(RuntimeError):
            _store.set(key, str(number))


def _read_number(key: str) -> int:
    """Return the number that a process has written last, or 0. It does not wait."""
    with suppress(RuntimeError):
        if _store is not None and _store.check([key]):
            return int(_store.get(key))
    return 0


def is_connection_error(error: Exception) -> bool:
    """Whether gloo, NCCL or torch's store raised an error."""
    # gloo raises plain `RuntimeError`s, which name a file of its source.
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _explain(error: Exception) -> str:
    """Return the cause of a connection error in one line."""
    # What follows is a stack trace of torch's C++ code.
    text = str(error).partition("Exception raised from")[0]
    lines = [re.sub(r"^\[[^]]*\] ", "", line).strip() for line in text.splitlines() if line.strip()]
    if not lines:
        lines = [type(error).__name__]
    another_ended = re.search(
        "closed by peer|reset by peer|broken pipe|remote process|remote error", text, re.IGNORECASE
    )
    if another_ended:
        reason = lines[0].split(". This")[0].rstrip(".")
        return f"another process has ended ({reason}), so this one ends, too"
    return f"the processes cannot communicate: {' '.join(lines)}"
