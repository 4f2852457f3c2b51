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

    What the caller has set does not count inside, such as `torch.no_grad()`, an autocast or a
    default dtype; only a `with torch.device(...)` does. After the context all settings are as they
    were, and so are torch's global generators of the devices that were in use before.
    """
    generators = get_rng_state()
    try:
        with (
            _determinism_restored(),
            _callers_defaults_off(),
            full_precision(),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            set_determinism(system.deterministic, system.num_threads)
            yield
    finally:
        set_rng_state(generators)


def set_machine(system: SystemConfig) -> None:
    """Compute as a config says, in this process from here on. This is for commands; other programs
    use `machine_settings`."""
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


@contextmanager
def _callers_defaults_off() -> Iterator[None]:
    """Take back the caller's default dtype, default device and cache of autocast, inside the
    context."""
    cpu = torch.device("cpu")
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    caching = torch.is_autocast_cache_enabled()
    torch.set_default_dtype(torch.float32)
    if device != cpu:
        torch.set_default_device(None)
    # A context of the caller's, `with torch.device(...)`, stays.
    had_default = torch.get_default_device() != device
    # A step that uses its weights twice casts them once, and adds up their gradients in bfloat16.
    torch.set_autocast_cache_enabled(True)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(caching)
        if had_default:
            torch.set_default_device(device)
        torch.set_default_dtype(dtype)
