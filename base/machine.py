"""How torch computes in this process: threads, determinism, the precision of float32, gradients."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from base.config.config import SystemConfig
from base.precision import full_precision, set_full_precision
from base.seeding import get_rng_state, set_rng_state

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
"""The environment variable without which cuBLAS has no deterministic algorithms."""


@contextmanager
def machine_settings(system: SystemConfig) -> Iterator[None]:
    """Compute as a config says, inside the context, and with gradients.

    What the caller has set does not count inside, such as `torch.no_grad()`. After the context all
    settings and torch's global generators are as they were before.
    """
    generators = get_rng_state()
    try:
        with (
            _determinism_restored(),
            full_precision(),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            set_determinism(system.deterministic, system.num_threads)
            yield
    finally:
        set_rng_state(generators)


def set_machine(system: SystemConfig) -> None:
    """Compute as a config says, in this process from here on. This is for commands, and for loops
    of your own over the parts of an experiment."""
    set_full_precision()
    set_determinism(system.deterministic, system.num_threads)


def set_determinism(deterministic: bool, num_threads: int | None) -> None:
    """Apply `system.deterministic` and `system.num_threads`."""
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    if deterministic:
        os.environ.setdefault(CUBLAS, ":4096:8")
    # 0: not asked for; 1: warnings; 2: errors.
    if torch.get_deterministic_debug_mode() != (2 if deterministic else 0):
        # Only if the mode changes: torch imports its compiler for this, which takes seconds.
        torch.use_deterministic_algorithms(deterministic)
    # torch would fill every new tensor with NaN, to expose reads of memory that was never written
    torch.utils.deterministic.fill_uninitialized_memory = not deterministic
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic


@contextmanager
def _determinism_restored() -> Iterator[None]:
    """Restore after the context what `set_determinism` changes."""
    threads = torch.get_num_threads()
    mode = torch.get_deterministic_debug_mode()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    cudnn = torch.backends.cudnn
    flags = (cudnn.deterministic, cudnn.benchmark)
    workspace = os.environ.get(CUBLAS)
    try:
        yield
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if torch.get_deterministic_debug_mode() != mode:
            torch.use_deterministic_algorithms(mode > 0, warn_only=mode == 1)
        torch.utils.deterministic.fill_uninitialized_memory = fill
        cudnn.deterministic, cudnn.benchmark = flags
        if workspace is None:
            os.environ.pop(CUBLAS, None)
        else:
            os.environ[CUBLAS] = workspace
