"""Which convolutions and linear layers a network calls, in which order, at which input size, with
which batch norm behind."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@dataclass(frozen=True)
class LayerCall:
    """A linear layer at the place where a forward pass calls it.

    Attributes:
        name: of the module.
        layer: a convolution or a linear layer of the network itself.
        input_shape: of one input, without the batch: `(C, H, W)`, or `(features,)` for a linear
            layer.
        batch_norm_scale: `max |gamma| / sqrt(var + eps)`, the spectral norm of the batch norm
            behind the layer in evaluation mode (a diagonal map); None where no batch norm takes the
            layer's output.
    """

    name: str
    layer: nn.Module
    input_shape: tuple[int, ...]
    batch_norm_scale: float | None


def linear_calls(model: nn.Module, image_shape: tuple[int, ...]) -> list[LayerCall]:
    """Every call of a convolution or linear layer in one forward pass (evaluation mode, one black
    image), in its order.

    A `ConvNorm2d` gives two: the convolution with its scaling in the frequency domain, and its
    `bpconv`, under that name. It is known by its parts, as an installed `conv_norm` has a class of
    its own.

    Args:
        model: any network on images; left as it was.
        image_shape: `(C, H, W)`.
    """
    trace, handles = _Trace(), []
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            handles.append(module.register_forward_pre_hook(trace.enter_linear))
            handles.append(module.register_forward_hook(trace.leave_linear))
        elif isinstance(module, _BatchNorm):
            handles.append(module.register_forward_hook(trace.leave_batch_norm))
    modes = {module: module.training for module in model.modules()}
    like = next(model.parameters(), torch.empty(0))
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *image_shape, device=like.device, dtype=like.dtype))
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    names = {module: name for name, module in model.named_modules()}
    scales = [None if scale is None else float(scale.abs().max()) for scale in trace.scales]
    calls = zip(trace.layers, trace.input_shapes, scales, strict=True)
    return [LayerCall(names[layer], layer, shape, scale) for layer, shape, scale in calls]


class _Trace:
    """Hooks that write down the linear layers of a forward pass, and which of them each batch norm
    follows.

    A batch norm follows a layer if it takes the very tensor that the layer gave, unchanged, or that
    another one gave which follows the layer. Inside a `ConvNorm2d` without `bpconv` no layer gives
    that tensor; there its batch norm, a part of the layer, follows the layer itself."""

    def __init__(self) -> None:
        self.layers: list[nn.Module] = []
        self.input_shapes: list[tuple[int, ...]] = []
        self.scales: list[Tensor | None] = []
        # holds the tensors, as an id could come again
        self._given: dict[int, tuple[Tensor, int, int]] = {}

    def enter_linear(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.layers.append(layer)
        self.input_shapes.append(tuple(inputs[0].shape[1:]))
        self.scales.append(None)

    def leave_linear(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if id(output) not in self._given:  # that of a ConvNorm2d is its bpconv's or batch norm's
            self._give(output, self._last_call(layer))

    def leave_batch_norm(
        self, norm: _BatchNorm, inputs: tuple[Tensor, ...], output: Tensor
    ) -> None:
        tensor, version, call = self._given.get(id(inputs[0]), (None, 0, None))
        if tensor is None:
            owners = [layer for layer in self.layers if norm in layer.children()]
            call = self._last_call(owners[0]) if owners else None
        elif tensor._version != version:  # an activation has written into it
            return
        if call is None or norm.running_var is None:
            return
        scale = (norm.running_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
        self.scales[call] = scale if self.scales[call] is None else self.scales[call] * scale
        self._give(output, call)

    def _give(self, tensor: Tensor, call: int) -> None:
        self._given[id(tensor)] = (tensor, tensor._version, call)

    def _last_call(self, layer: nn.Module) -> int:
        return max(number for number, known in enumerate(self.layers) if known is layer)
