"""The device and the precision that a process computes with, and errors that explain them."""

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path

import torch

from base.errors import ConfigError
from base.text import first_line, one_line

NO_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|std::bad_alloc|_ALLOC(ATION)?_FAILED",
    re.IGNORECASE,
)
"""Messages of torch, cuBLAS and cuDNN, for any device, when an allocation fails."""

NO_ENGINE = "unable to find an engine to execute this computation"
"""A message of torch when cuDNN can run none of its convolutions. Often there is too little memory
for any of them; it can also have no kernel for the card or the dtype."""

AMPERE = (8, 0)
"""The lowest compute capability of CUDA devices that multiply bfloat16 and TF32 natively."""

DRIVER = Path("/proc/driver/nvidia/version")
"""Where NVIDIA's driver on Linux says its version."""


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on `device`, without waiting for the copy."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    # torch copies tensors with gaps, such as every second row, by way of memory that is not pinned.
    if not torch.ops.aten.is_non_overlapping_and_dense(tensor):
        tensor = tensor.contiguous()
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
    reason = None
    if chosen.type == "cuda":
        # The number of devices does not tell whether their driver works.
        reason = cuda_unavailable()
        if reason is None and (chosen.index or 0) >= torch.cuda.device_count():
            reason = f"the last CUDA device is cuda:{torch.cuda.device_count() - 1}"
    elif chosen.type == "mps" and not torch.backends.mps.is_available():
        reason = "torch finds no such device"
    if reason is not None:
        raise ConfigError(f"system.device: {device!r} cannot be used: {reason}")
    if device == "cuda" and local_rank:
        return torch.device("cuda", int(local_rank) % torch.cuda.device_count())
    return chosen


def cuda_unavailable() -> str | None:
    """Return why torch finds no CUDA device on this machine; None if it finds one."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return "torch is built without CUDA"
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides every CUDA device"
    try:
        # It raises what `is_available` keeps to itself, such as a driver that is too old.
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return first_line(error).split(". ")[0].rstrip(".")
    return "torch finds no CUDA device"


def nvidia_driver() -> str | None:
    """Return the version of NVIDIA's driver; None if Linux has loaded none."""
    try:
        first = DRIVER.read_text().splitlines()[0]
    except (OSError, IndexError):
        return None
    match = re.search(r"\d+\.\d+(\.\d+)?", first)
    return match and match[0]


def explain_device(device: torch.device, n_gpu: int = 1) -> tuple[str, bool] | None:
    """Return why `system.device` `"auto"` became the CPU, and whether that is worth a warning;
    None if it became another device.

    It is worth a warning if a driver is loaded, because this machine then has a card that torch
    cannot use.
    """
    if device.type != "cpu":
        return None
    if n_gpu == 0:
        return "n_gpu is 0", False
    reason = cuda_unavailable()
    if reason is None:
        return None
    return reason, nvidia_driver() is not None


def choose_precision(precision: str, device: torch.device) -> str:
    """Return `"fp32"`, `"tf32"` or `"bf16"` for the config's `system.precision`.

    `"auto"` is bf16 if the hardware multiplies it natively. `"tf32"` is fp32 on a device without
    TF32; see `precision_warning`.
    """
    if precision == "auto":
        return "bf16" if has_bf16(device) else "fp32"
    if precision == "tf32" and not has_tf32(device):
        return "fp32"
    return precision


def has_bf16(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 natively."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= AMPERE
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())


def has_tf32(device: torch.device) -> bool:
    """Return whether a device multiplies in TF32."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= AMPERE


def precision_warning(precision: str, device: torch.device) -> str | None:
    """Return a warning that a device has no hardware for the config's `system.precision`."""
    if precision == "bf16" and not has_bf16(device):
        return (
            f"system.precision: {device} has no hardware for bf16 and emulates it, which is slow:"
            ' "auto" takes fp32 there'
        )
    if precision == "tf32" and not has_tf32(device):
        return f"system.precision: {device} has no TF32: it computes in fp32"
    return None


@contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[AbstractContextManager]:
    """Run forward passes in bf16, in TF32 or in fp32, inside the context.

    Autocast of a caller ends here: a precision that is not bf16 switches it off.
    """
    if precision == "bf16":
        lowered = torch.autocast(device.type, dtype=torch.bfloat16)
    else:
        lowered = torch.autocast(device.type, enabled=False)
    products = tf32() if precision == "tf32" else nullcontext()
    with products, lowered:
        yield lowered


@contextmanager
def tf32() -> Iterator[None]:
    """Multiply and convolve float32 in TF32 on CUDA, inside the context.

    TF32 keeps 10 of the 23 bits of a factor; sums are float32.
    """
    with _float32_restored():
        _set_float32("tf32", "tf32", "tf32")
        yield


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 in float32, inside the context, also inside autocast of a caller."""
    without_autocast = (torch.autocast(kind, enabled=False) for kind in ("cpu", "cuda", "mps"))
    with _float32_restored(), ExitStack() as stack:
        for context in without_autocast:
            stack.enter_context(context)
        set_full_precision()
        yield


def set_full_precision() -> None:
    """Compute float32 in float32 in this process: by default torch convolves in TF32 on CUDA, and a
    user's own code may have asked for less on the CPU, too."""
    torch.set_float32_matmul_precision("highest")
    _set_float32("ieee", "ieee", "ieee")


@contextmanager
def _float32_restored() -> Iterator[None]:
    """Give float32 the precision back that it had before the context."""
    operations = (
        torch.backends.cuda.matmul,
        torch.backends.cudnn.conv,
        torch.backends.cudnn.rnn,
        torch.backends.mkldnn.matmul,
    )
    before = [operation.fp32_precision for operation in operations]
    asked = None
    # An error if older and newer settings disagree already
    with suppress(RuntimeError):
        asked = torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        _set_float32(*before[:3])
        if asked is not None:
            torch.set_float32_matmul_precision(asked)
        # Last, because the older setting changes them
        for operation, precision in zip(operations, before, strict=True):
            operation.fp32_precision = precision


def _set_float32(products: str, convolutions: str, recurrences: str) -> None:
    """Set the precision of float32 on CUDA, as torch's `fp32_precision` names it."""
    matmul = torch.backends.cuda.matmul
    cudnn = torch.backends.cudnn
    # The older flags first: torch raises an error if they disagree with the newer keys.
    matmul.allow_tf32 = products == "tf32"
    cudnn.allow_tf32 = convolutions == "tf32"
    matmul.fp32_precision = products
    cudnn.conv.fp32_precision = convolutions
    cudnn.rnn.fp32_precision = recurrences


def set_determinism(deterministic: bool, num_threads: int | None) -> None:
    """Apply `system.deterministic` and `system.num_threads`."""
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    if deterministic:
        # Without it cuBLAS has no deterministic algorithms.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # 0: not asked for; 1: warnings; 2: errors.
    if torch.get_deterministic_debug_mode() != (2 if deterministic else 0):
        # Only if the mode changes: torch imports its compiler for this, which takes seconds.
        torch.use_deterministic_algorithms(deterministic)
    # torch would fill every new tensor with NaN, to expose reads of memory that was never written
    torch.utils.deterministic.fill_uninitialized_memory = not deterministic
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic


@contextmanager
def kernels_explained(device: torch.device) -> Iterator[None]:
    """Turn torch's errors about an operation that the device cannot run into one line.

    Raises:
        ConfigError: naming the operation without a deterministic algorithm, or the card that torch
            is not built for.
    """
    try:
        yield
    except RuntimeError as error:
        match = re.match(r"(\S+) does not have a deterministic implementation", str(error))
        if match is not None:
            raise ConfigError(
                f"system.deterministic: {match[1]} has no deterministic algorithm on this device;"
                " set it to false"
            ) from None
        if "no kernel image is available" not in str(error):
            raise
        major, minor = torch.cuda.get_device_capability(device)
        raise ConfigError(
            f"system.device: {device} is a {torch.cuda.get_device_name(device)} of compute"
            f" capability {major}.{minor}, and torch {torch.__version__} is built for"
            f" {', '.join(torch.cuda.get_arch_list())} only: install another build of torch, or"
            " take the CPU with system.device=cpu"
        ) from None


@contextmanager
def memory_explained(
    key: str, batch_size: int, device: torch.device | None = None
) -> Iterator[None]:
    """Turn a failed allocation, on any device, into one line.

    Args:
        key: the config key or flag of the batch size.
        batch_size: its value.
        device: where the batches are; None for the current CUDA device, or another device if CUDA
            is not in use.

    Raises:
        ConfigError: naming `key`, and `device` and its free memory as far as they are known.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = one_line(first_line(error), 200)
        raise ConfigError(
            f"{key}: batches of {batch_size} images do not fit into {_memory_of(device)}: {reason}"
        ) from None


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error says that an allocation failed, on any device."""
    return isinstance(error, MemoryError) or NO_MEMORY.search(str(error)) is not None


def _memory_of(device: torch.device | None) -> str:
    if device is None and torch.cuda.is_initialized():
        device = torch.device("cuda", torch.cuda.current_device())
    if device is None:
        return "memory"
    if device.type != "cuda":
        return f"the memory of {device}"
    try:
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError:
        # A broken CUDA context answers no question
        return f"the memory of {device}"
    return f"the memory of {device} ({free / 2**30:.1f} of {total / 2**30:.1f} GiB are free)"
