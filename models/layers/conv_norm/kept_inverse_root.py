"""V of fixed weights, which is computed once instead of in every forward pass."""

from typing import Any

import torch
from torch import Tensor, nn

from .kernel_energy import inverse_root_energy


class KeptInverseRoot:
    """V of one parameter for the input size it was asked for last.

    V is computed again if the parameter requires gradients, has been changed in place, or has got
    other memory or another dtype, and if another tensor takes its place
    (`torch.func.functional_call`, a parametrization). torch does not count writes through
    `parameter.data` and those of fused optimizers, so they go unnoticed between two passes without
    gradients. A copy of this object, also by pickle, is None.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        # One attribute, as threads may share this object.
        self._kept: tuple[tuple[Any, ...], Tensor] | None = None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        # A copy of the layer may be trained, and its weights then begin at the same version.
        return type(None), ()

    def inverse_root(
        self, weight: Tensor, size: tuple[int, int], dilation: tuple[int, int]
    ) -> Tensor:
        """Return `inverse_root_energy(weight, size, dilation)`, which nobody may write into."""
        # Tensors of inference mode have no version.
        fixed = weight is self._weight and isinstance(weight, nn.Parameter)
        if not fixed or weight.requires_grad or weight.is_inference():
            self._kept = None
            return inverse_root_energy(weight, size, dilation)
        state = (weight._version, weight.data_ptr(), weight.dtype, *size, *dilation)
        kept = self._kept
        if kept is None or kept[0] != state:
            # A tensor of inference mode could not take part in a gradient later.
            with torch.inference_mode(False), torch.no_grad():
                kept = (state, inverse_root_energy(weight, size, dilation))
            self._kept = kept
        return kept[1]
