"""Cast frozen weights once per attack, instead of in every forward pass under autocast."""

from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.classifier import Model
from attacks.replaced_forward import replaced_forward

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""Layers that use weight and bias for a single product, which autocast computes in low
precision."""
METHODS = ("forward", "_conv_forward")


def cast_once(model: Model) -> AbstractContextManager[None]:
    """Within the context, convolutions and linear layers of a frozen model keep the low-precision
    copies of their weights from one forward pass to the next.

    Autocast keeps copies only of weights that require gradients, so it would make them again in
    every pass of an attack. The copies here are the same, and so are logits and gradients, bit by
    bit. Parameters, their gradients and modes are not touched, and whoever reads a weight gets the
    weight itself.

    Left to autocast are layers that compute their weights in each pass (subclasses with a forward
    method of their own, parametrizations), functions, models with a part that is compiled, and
    `nn.DataParallel`.

    Args:
        model: a module, frozen (see `attacks.frozen.frozen`), or a function.
    """
    return replaced_forward(model, _uses_its_weight_once, _CastingForward)


def _uses_its_weight_once(module: nn.Module) -> bool:
    """Return whether the module is one of `LAYERS`, with their forward method and a weight that is
    a parameter."""
    for plain in LAYERS:
        if not isinstance(module, plain):
            continue
        own = (getattr(type(module), name, None) for name in METHODS)
        usual = (getattr(plain, name, None) for name in METHODS)
        changed = tuple(own) != tuple(usual)
        return not changed and module._parameters.get("weight") is not None
    return False


class _CastingForward:
    """The forward method of one of `LAYERS` that keeps the copies of weight and bias."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.frozen = dict(layer._parameters)
        self.copies: dict[str, tuple[tuple[int, int, torch.dtype], Tensor]] = {}

    def __call__(self, input: Tensor) -> Tensor:
        layer = self.layer
        device = input.device.type
        if not torch.is_autocast_enabled(device):
            return type(layer).forward(layer, input)
        dtype = torch.get_autocast_dtype(device)
        weight = self._cast("weight", dtype)
        bias = self._cast("bias", dtype)
        if isinstance(layer, nn.Linear):
            return F.linear(input, weight, bias)
        return layer._conv_forward(input, weight, bias)

    def _cast(self, name: str, dtype: torch.dtype) -> Tensor | None:
        """Return the copy of a parameter, or the parameter if autocast has to cast it."""
        values = getattr(self.layer, name)
        # Another tensor comes from torch.func.functional_call, for example
        if values is None or values is not self.frozen[name]:
            return values
        if values.dtype != torch.float32 or values.requires_grad or values.is_inference():
            return values
        # A model may write into its weights, or replace their memory, in a forward pass
        state = (values._version, values.data_ptr(), dtype)
        kept = self.copies.get(name)
        if kept is not None and kept[0] == state:
            return kept[1]
        # In inference mode the copy could not take part in a gradient later
        with torch.inference_mode(False):
            copy = values.detach().to(dtype)
        self.copies[name] = (state, copy)
        return copy
