"""Several processes for one command: torchrun's launcher, started from within, and the device of
each process."""

import os
import sys
from typing import NoReturn

import torch

from base.config import Config
from base.device import choose_device
from base.distributed.process_group import world_size
from base.errors import ConfigError


def launch(config: Config) -> NoReturn:
    """Run this process's own command in `n_gpu` processes, as `torchrun --standalone
    --nproc_per_node N` does, and exit as the first of them that failed.

    Raises:
        ConfigError: there are fewer devices.
    """
    refuse_missing_devices(config, config.n_gpu, "n_gpu")
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cpus() // config.n_gpu)))
    words = ["--standalone", "--nproc_per_node", str(config.n_gpu), *sys.argv]
    try:
        run.run(run.get_args_parser().parse_args(words))
    except ChildFailedError as error:  # the process has said why, or torchrun's log has
        number, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(
                f"rank {number} was ended by signal {-failure.exitcode}: all have been stopped",
                file=sys.stderr,
            )
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
    except SignalException as error:
        sys.exit(128 + error.sigval.value)
    sys.exit(0)


def available_cpus() -> int:
    """How many CPUs this process may use, which are fewer than the machine has where SLURM or
    taskset say so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def refuse_missing_devices(config: Config, processes: int, key: str) -> None:
    """Refuse more processes on this machine than it has CUDA devices, for training and evaluation.
    On the CPU any number goes; `n_gpu` has to be told so by `system.device`.

    Raises:
        ConfigError: naming `key`, which asks for them, or `system.device`.
    """
    device = choose_device(config.system.device, config.n_gpu)
    if device.type == "cuda" and config.system.device not in ("auto", "cuda") and processes > 1:
        raise ConfigError(
            f"system.device: {config.system.device} is one device, {key} asks for {processes} processes "
            "(system.device=cuda gives each its own)"
        )
    if device.type == "cpu" and (config.system.device == "cpu" or key != "n_gpu"):
        return
    devices = torch.cuda.device_count() if device.type == "cuda" else 0
    if devices < processes:
        raise ConfigError(
            f"{key}: asks for {processes} processes, but {devices} CUDA devices are visible (system.device=cpu takes the CPU)"
        )


def own_device(config: Config) -> torch.device:
    """The device of this process, which CUDA then takes for the current one.

    Raises:
        ConfigError: it is not there, or not for this process alone.
    """
    if world_size() > 1:
        refuse_missing_devices(config, int(os.environ.get("LOCAL_WORLD_SIZE", "1")), "torchrun")
    device = choose_device(config.system.device, config.n_gpu)
    if device.type == "cuda" and world_size() > 1:
        torch.cuda.set_device(device)
    return device
