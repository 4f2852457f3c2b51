"""A cheaper backward pass for batch norms of a frozen network on the CPU."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from attacks.classifier import Model
from attacks.replaced_forward import replaced_forward

LAYERS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
DTYPES = (torch.float32, torch.float64)


def cheap_batch_norm(model: Model) -> AbstractContextManager[None]:
    """Within the context, batch norms of a frozen model compute no gradients of their parameters.

    In evaluation mode a batch norm scales each channel by `gamma / sqrt(var + eps)`, so its
    backward pass only has to scale the gradient in the same way. On the CPU torch also computes the
    gradients of gamma and beta, even if they are not needed, which takes most of the time. Outputs
    are the same bits, and so are gradients if the output's gradient has the output's memory format.

    Torch's own method is used in training mode, on other devices and in low precision; for
    subclasses and for layers whose weights are no longer those with which the context began; for
    functions; and for models with a part that is compiled or `nn.DataParallel`.

    Args:
        model: a module, frozen (see `attacks.frozen.frozen`), or a function.
    """
    return replaced_forward(model, lambda module: type(module) in LAYERS, _CheapForward)


class _CheapForward:
    """The forward method of a batch norm."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.frozen = self._values()

    def __call__(self, input: Tensor) -> Tensor:
        layer = self.layer
        if not self._scales(input):
            return type(layer).forward(layer, input)
        layer._check_input_dim(input)
        return _BatchNorm.apply(
            input, layer.running_mean, layer.running_var, layer.weight, layer.bias, layer.eps
        )

    def _values(self) -> dict[str, Tensor | None]:
        layer = self.layer
        return {
            name: getattr(layer, name) for name in ("running_mean", "running_var", "weight", "bias")
        }

    def _scales(self, input: Tensor) -> bool:
        """Return whether the layer only scales and shifts, with weights that need no gradients."""
        if self.layer.training or input.device.type != "cpu" or input.dtype not in DTYPES:
            return False
        values = self._values()
        # Other tensors come from torch.func.functional_call, for example
        if values["running_var"] is None or any(
            value is not self.frozen[name] for name, value in values.items()
        ):
            return False
        given = [value for value in values.values() if value is not None]
        return all(value.dtype == input.dtype and not value.requires_grad for value in given)


class _BatchNorm(torch.autograd.Function):
    """Batch norm with running statistics, differentiable in its input only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor,
        mean: Tensor,
        variance: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        return torch.nn.functional.batch_norm(input, mean, variance, weight, bias, eps=eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, variance, weight, _, eps = inputs
        ctx.save_for_backward(variance, weight)
        ctx.save_for_forward(variance, weight)
        ctx.eps = eps

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        variance, weight = ctx.saved_tensors
        return _scaled(gradient, variance, weight, ctx.eps), None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        variance, weight = ctx.saved_tensors
        return _scaled(tangent, variance, weight, ctx.eps)


def _scaled(values: Tensor, variance: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Return `values` `(B, C, ...)` times the factors of a batch norm's channels."""
    per_channel = (-1, *[1] * (values.ndim - 2))
    # As torch does: 1 / sqrt in float64, rounded, and then two products
    deviation = 1 / (variance.double() + eps).sqrt()
    scaled = values * deviation.to(values.dtype).reshape(per_channel)
    if weight is not None:
        scaled *= weight.reshape(per_channel)
    return scaled
