"""Half precisions are too coarse for losses and statistics."""

import torch
from torch import Tensor


def widened(values: Tensor) -> Tensor:
    """Return `values` in float32, or float64 if they are in that."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
