"""The precision that a process computes with.

Half precisions are too coarse for losses and statistics, which are `widened`.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress

import torch
from torch import Tensor

AMPERE = (8, 0)
"""The lowest compute capability of CUDA devices that multiply bfloat16 and TF32 natively."""


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
    try:
        with products, lowered:
            yield lowered
    finally:
        # torch keeps the casts of weights until the outermost context ends, which may be one of the
        # caller's, around updates of these weights
        torch.clear_autocast_cache()


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
    with _float32_restored(), ExitStack() as stack:
        for kind in ("cpu", "cuda", "mps"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
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


def widened(values: Tensor) -> Tensor:
    """Return `values` in float32, or float64 if they are in that."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
