"""The device and the precision that a process computes with, and errors that explain them."""

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from base.errors import ConfigError
from base.text import first_line, one_line

NO_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|std::bad_alloc", re.IGNORECASE
)
"""torch's messages, for any device, when an allocation fails."""


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a CPU tensor on `device`, without waiting for the copy."""
    if device.type != "cuda":
        return tensor.to(device)
    # A copy from memory that is not pinned would wait for all work that the device still has.
    return tensor.pin_memory().to(device, non_blocking=True)


def choose_device(device: str, n_gpu: int = 1) -> torch.device:
    """Return the `torch.device` for the config's `system.device` and `n_gpu`.

    `"auto"` takes the first CUDA device, then Apple's, then the CPU; an `n_gpu` of 0 means the CPU.
    Under torchrun, `"auto"` and `"cuda"` give each process its own CUDA device.

    Raises:
        ConfigError: this machine does not have the device, or it is not supported.
    """
    local_rank = os.environ.get("LOCAL_RANK")
    if device == "auto":
        if n_gpu > 0 and torch.cuda.is_available():
            return torch.device("cuda", int(local_rank or "0") % torch.cuda.device_count())
        if n_gpu > 0 and torch.backends.mps.is_available():
            return torch.device("mps")
        return torch.device("cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ConfigError(
            f"system.device: {device!r} is not a device; expected auto, cpu, cuda, cuda:N or mps"
        ) from None
    if chosen.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(
            f"system.device: {device!r} is not supported; expected auto, cpu, cuda, cuda:N or mps"
        )
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"system.device: {device!r} is asked for, but {torch.cuda.device_count()} CUDA devices"
            " are visible"
        )
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("system.device: 'mps' is asked for, but this machine has none")
    if device == "cuda" and local_rank:
        return torch.device("cuda", int(local_rank) % torch.cuda.device_count())
    return chosen


def choose_precision(precision: str, device: torch.device) -> str:
    """Return `"fp32"` or `"bf16"` for the config's `system.precision`.

    `"auto"` is bf16 if the hardware multiplies it natively.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())
    return "bf16" if native else "fp32"


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Return the context in which forward passes run: bf16 autocast, or nothing for fp32."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def set_determinism(deterministic: bool, num_threads: int | None) -> None:
    """Apply `system.deterministic` and `system.num_threads`, and switch off TF32."""
    # By default torch convolves float32 in TF32, which keeps 10 of its 23 bits.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    if deterministic:
        # Without it cuBLAS has no deterministic algorithms.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # 0: not asked for; 1: warnings; 2: errors.
    if torch.get_deterministic_debug_mode() != (2 if deterministic else 0):
        # Only where it changes something: torch imports its compiler for this, in seconds.
        torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic


@contextmanager
def determinism_explained() -> Iterator[None]:
    """Turn torch's error about an operation without a deterministic algorithm into one line.

    Raises:
        ConfigError: naming the operation.
    """
    try:
        yield
    except RuntimeError as error:
        match = re.match(r"(\S+) does not have a deterministic implementation", str(error))
        if match is None:
            raise
        raise ConfigError(
            f"system.deterministic: {match[1]} has no deterministic algorithm on this device;"
            " set it to false"
        ) from None


@contextmanager
def memory_explained(key: str, batch_size: int) -> Iterator[None]:
    """Turn a failed allocation, on any device, into one line.

    Args:
        key: the config key or flag of the batch size.
        batch_size: its value.

    Raises:
        ConfigError: naming `key`.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and NO_MEMORY.search(str(error)) is None:
            raise
        reason = one_line(first_line(error), 200)
        raise ConfigError(
            f"{key}: batches of {batch_size} images do not fit into memory: {reason}"
        ) from None
