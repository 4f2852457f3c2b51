"""The device, the precision and the memory that a process computes with."""

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from base.errors import ConfigError
from base.text import one_line

NO_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|std::bad_alloc", re.IGNORECASE
)
"""What torch says, of any device, when it gets no memory."""


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on `device`, for which the host does not wait: a copy to a CUDA device
    from ordinary memory waits for everything that the device still has to do."""
    return (
        tensor.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda"
        else tensor.to(device)
    )


def choose_device(device: str, n_gpu: int = 1) -> torch.device:
    """The `torch.device` for the config's `system.device` and `n_gpu`.

    `"auto"` takes the first CUDA device, then Apple's, then the CPU; `n_gpu` 0 asks for the CPU.
    Under torchrun each process takes its own CUDA device, for `"cuda"`, too.

    Raises:
        ConfigError: the device is named but is not there.
    """
    own = os.environ.get("LOCAL_RANK")
    if device == "auto":
        if n_gpu > 0 and torch.cuda.is_available():
            return torch.device("cuda", int(own or "0") % torch.cuda.device_count())
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
            f"system.device: {device!r} asked for, but {torch.cuda.device_count()} CUDA devices are visible"
        )
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("system.device: 'mps' asked for, but this machine has none")
    return (
        torch.device("cuda", int(own) % torch.cuda.device_count())
        if device == "cuda" and own
        else chosen
    )


def choose_precision(precision: str, device: torch.device) -> str:
    """`"fp32"` or `"bf16"` for the config's `system.precision`; `"auto"` is bf16 where the hardware
    multiplies it natively."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())
    return "bf16" if native else "fp32"


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """The context in which forward passes run: bf16 autocast, or nothing for fp32."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def set_determinism(deterministic: bool, num_threads: int | None) -> None:
    """Apply `system.deterministic` and `system.num_threads` to this process. Float32 then means
    float32 on every device: torch would convolve in TF32, which keeps 10 bits of 23."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    if deterministic:
        # without it cuBLAS has no deterministic algorithms
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic, warn_only=False)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic


@contextmanager
def determinism_explained() -> Iterator[None]:
    """Turn torch's refusal of an operation, where `system.deterministic` is true, into one line.

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
            f"system.deterministic: {match[1]} has no deterministic algorithm here; false allows it"
        ) from None


@contextmanager
def memory_explained(key: str, batch_size: int) -> Iterator[None]:
    """Turn the failure to get memory, on any device, into one line.

    Args:
        key: the config key or flag that decides how much is needed.
        batch_size: its value.

    Raises:
        ConfigError: naming `key`.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and NO_MEMORY.search(str(error)) is None:
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{key}: batches of {batch_size} images do not fit into memory: {one_line(reason, 200)}"
        ) from None
