"""The convolutions and linear layers that a network calls: order, input size, batch norm behind."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from attacks.frozen import frozen


@dataclass(frozen=True)
class LayerCall:
    """A linear layer at the place where a forward pass calls it.

    Attributes:
        name: the name of the module.
        layer: a convolution or a linear layer of the network itself.
        input_shape: the shape of one input, without the batch: `(C, H, W)`, or `(features,)` for a
            linear layer.
        batch_norm_scale: `max |gamma| / sqrt(var + eps)`, the spectral norm of the batch norm
            behind the layer in evaluation mode (a diagonal map); None if no batch norm takes the
            layer's output.
    """

    name: str
    layer: nn.Module
    input_shape: tuple[int, ...]
    batch_norm_scale: float | None


def linear_calls(model: nn.Module, image_shape: tuple[int, ...]) -> list[LayerCall]:
    """Return every call of a convolution or linear layer in one forward pass (evaluation mode, one
    black image), in order.

    A `ConvNorm2d` gives two calls: the convolution with its scaling in the frequency domain, and
    its `bpconv`, under that name.

    Args:
        model: any network on images; left as it was.
        image_shape: `(C, H, W)`.
    """
    trace = _Trace()
    handles = []
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            handles.append(module.register_forward_pre_hook(trace.enter_linear))
            handles.append(module.register_forward_hook(trace.leave_linear))
        elif isinstance(module, _BatchNorm):
            handles.append(module.register_forward_hook(trace.leave_batch_norm))
    like = next(model.parameters(), torch.empty(0, dtype=torch.float32))
    try:
        with torch.no_grad(), frozen(model, training=False):
            model(torch.zeros(1, *image_shape, device=like.device, dtype=like.dtype))
    finally:
        for handle in handles:
            handle.remove()
    names = {module: name for name, module in model.named_modules()}
    calls = []
    for layer, shape, scale in zip(trace.layers, trace.input_shapes, trace.scales, strict=True):
        largest = None
        if scale is not None:
            largest = float(scale.abs().max())
        calls.append(LayerCall(names[layer], layer, shape, largest))
    return calls


class _Trace:
    """Hooks that record the linear layers of a forward pass, and which of them each batch norm
    follows.

    A batch norm follows a layer if its input is the output of that layer, unchanged, or the output
    of another batch norm that follows the layer. Inside a `ConvNorm2d` without `bpconv` no layer
    returns that tensor; there the batch norm, a part of the layer, follows the layer itself.
    """

    def __init__(self) -> None:
        self.layers: list[nn.Module] = []
        self.input_shapes: list[tuple[int, ...]] = []
        self.scales: list[Tensor | None] = []
        # Id of an output -> the output, its version, and the call that made it. The tensor is held
        # so that no other tensor can get its id.
        self._outputs: dict[int, tuple[Tensor, int, int]] = {}

    def enter_linear(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.layers.append(layer)
        self.input_shapes.append(tuple(inputs[0].shape[1:]))
        self.scales.append(None)

    def leave_linear(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # The output of a ConvNorm2d is recorded already, as that of its bpconv or batch norm.
        if id(output) not in self._outputs:
            self._record(output, self._last_call(layer))

    def leave_batch_norm(
        self, norm: _BatchNorm, inputs: tuple[Tensor, ...], output: Tensor
    ) -> None:
        call = self._call_before(norm, inputs[0])
        # Without running statistics the scale depends on the batch
        if call is None or norm.running_var is None:
            return
        scale = (norm.running_var + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight
        before = self.scales[call]
        if before is not None:
            scale = before * scale
        self.scales[call] = scale
        self._record(output, call)

    def _call_before(self, norm: _BatchNorm, tensor: Tensor) -> int | None:
        """Return the call whose output a batch norm takes; None if there is none."""
        if id(tensor) in self._outputs:
            output, version, call = self._outputs[id(tensor)]
            # An activation in place has written into it.
            if output._version != version:
                return None
            return call
        # A ConvNorm2d is known by its parts: an installed `conv_norm` has another class.
        owners = [layer for layer in self.layers if norm in layer.children()]
        if not owners:
            return None
        return self._last_call(owners[0])

    def _record(self, tensor: Tensor, call: int) -> None:
        self._outputs[id(tensor)] = (tensor, tensor._version, call)

    def _last_call(self, layer: nn.Module) -> int:
        return max(number for number, known in enumerate(self.layers) if known is layer)
