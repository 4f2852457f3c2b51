"""Starting several processes for one command, and the device of each process."""

import math
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

import torch

from base.config import Config
from base.device import choose_device
from base.distributed.process_group import world_size
from base.errors import ConfigError

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Linux, control groups of version 2: the quota of this container."""


def launch(config: Config) -> NoReturn:
    """Run the command line of this process in `n_gpu` processes, and exit with their code.

    It does what `torchrun --standalone --nproc_per_node N` does. The exit code is that of the first
    process that failed.

    Raises:
        ConfigError: there are fewer devices.
    """
    check_device_count(config, config.n_gpu, "n_gpu")
    # These imports are slow, and only this function needs them.
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        # Under nohup; torch would handle SIGHUP nevertheless, and pass it on to the processes.
        os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGQUIT")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cpus() // config.n_gpu)))
    words = ["--standalone", "--nproc_per_node", str(config.n_gpu), *sys.argv]
    try:
        run.run(run.get_args_parser().parse_args(words))
    except ChildFailedError as error:
        number, failure = error.get_first_failure()
        if failure.exitcode > 0:
            # The process itself has printed why.
            sys.exit(failure.exitcode)
        print(
            f"error: rank {number} was ended by signal {-failure.exitcode}: all have been stopped",
            file=sys.stderr,
        )
        sys.exit(128 - failure.exitcode)
    except SignalException as error:
        sys.exit(128 + error.sigval.value)
    sys.exit(0)


def available_cpus() -> int:
    """Return how many CPUs this process may use, at least 1.

    SLURM and taskset may allow fewer than there are. A container's quota of time on them counts
    as that many CPUs, rounded up.
    """
    cpus = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cpus = len(os.sched_getaffinity(0))
    return min(cpus, _cpu_quota() or cpus)


def _cpu_quota() -> int | None:
    """Return the container's quota of CPUs, rounded up; None without one, and elsewhere."""
    try:
        # Microseconds of CPU time in a period and the period, such as "150000 100000"; no limit
        # is "max 100000".
        quota, period = CPU_QUOTA.read_text().split()
        return math.ceil(int(quota) / int(period))
    except (OSError, ValueError):
        return None


def check_device_count(config: Config, processes: int, key: str) -> None:
    """Check that this machine has a CUDA device for each process.

    On the CPU any number of processes may run. If `n_gpu` asks for them, `system.device` has to
    name the CPU.

    Args:
        config: the resolved config.
        processes: on this machine.
        key: what asks for them, for the message: `"n_gpu"` or `"torchrun"`.

    Raises:
        ConfigError: naming `key` or `system.device`.
    """
    device = choose_device(config.system.device, config.n_gpu)
    if device.type == "cuda" and config.system.device not in ("auto", "cuda") and processes > 1:
        raise ConfigError(
            f"system.device: {config.system.device} is one device, but {key} asks for {processes}"
            " processes (system.device=cuda gives each its own)"
        )
    if device.type == "cpu" and (config.system.device == "cpu" or key != "n_gpu"):
        return
    devices = torch.cuda.device_count() if device.type == "cuda" else 0
    if devices < processes:
        raise ConfigError(
            f"{key}: asks for {processes} processes, but {devices} CUDA devices are visible"
            " (system.device=cpu takes the CPU)"
        )


def local_device(config: Config) -> torch.device:
    """Return the device of this process, and make it CUDA's current device.

    Raises:
        ConfigError: this machine does not have it, or other processes need it, too.
    """
    if world_size() > 1:
        check_device_count(config, int(os.environ.get("LOCAL_WORLD_SIZE", "1")), "torchrun")
    device = choose_device(config.system.device, config.n_gpu)
    if device.type == "cuda" and world_size() > 1:
        # NCCL and torch's caching allocator use the current device, which is cuda:0 by default.
        torch.cuda.set_device(device)
    return device
