"""Switches autocast off, for computations on weights for which bf16 is too coarse."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """A context in which operations on `tensor`'s device keep the precision of their operands."""
    # The meta device has no autocast to switch off.
    if tensor.device.type == "meta":
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)
