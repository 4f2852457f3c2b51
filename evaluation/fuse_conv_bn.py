"""Fuse batch norms into the convolutions before them, for attacks on a frozen network."""

from collections import Counter
from copy import deepcopy
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.utils.fusion import fuse_conv_bn_weights

from attacks.classifier import Model, checked_logits
from attacks.frozen import frozen
from attacks.replaced_forward import is_compiled

TOLERANCE = 1e-4
"""The largest difference between the logits of the two networks, as a share of the largest logit;
rounding makes about 1e-6."""


def fuse_conv_bn(model: Model, images: Tensor) -> Model:
    """Return a copy of `model` for evaluation, without the batch norms that directly follow a
    convolution; or `model` itself.

    With running statistics a batch norm scales each output channel by
    `s = gamma / sqrt(var + eps)`, and `bn(w * x + b) = (s w) * x + s (b - mean) + beta` is another
    convolution. That saves two passes over the layer's output in each direction. Logits and
    gradients differ from the model's by rounding, so the model itself has to give the verdicts.

    A pair is fused if, in the autograd graph of one forward pass, only the batch norm takes the
    output of the convolution. Modules that are called twice or have hooks are left alone, and so
    are convolutions that compute their weights in every pass (subclasses, parametrizations). The
    result is `model` itself if there is nothing to fuse, if it cannot be copied, if the logits of
    the copy differ or are not finite, or if it is compiled, which a copy would not be.

    Args:
        model: any module, whose weights and modes are not changed, or a function, which is
            returned.
        images: `(B, C, H, W)`, a few images on which the two are compared.
    """
    if not isinstance(model, nn.Module) or any(map(is_compiled, model.modules())):
        return model
    with torch.inference_mode(False), frozen(model, training=False):
        images = images.detach().clone()
        pairs = _pairs(model, images)
        if not pairs:
            return model
        try:
            copy = deepcopy(model).eval()
        # The model holds something that cannot be copied: a lock, a tensor of a graph.
        except (RuntimeError, TypeError):
            return model
        with torch.no_grad():
            for convolution, norm in pairs:
                _fuse(copy.get_submodule(convolution), copy.get_submodule(norm))
                copy.set_submodule(norm, nn.Identity())
            expected = checked_logits(model, images)
            found = checked_logits(copy, images)
        largest = float(expected.abs().max())
        if isfinite(largest) and torch.allclose(found, expected, rtol=0, atol=TOLERANCE * largest):
            return copy
        return model


def _pairs(model: nn.Module, images: Tensor) -> list[tuple[str, str]]:
    """Return the pairs that can be fused: the name of a convolution, and that of the batch norm
    which alone takes its output."""
    # Name of a module -> the nodes of the graph that its calls end in.
    convolutions: dict[str, list[Node | None]] = {}
    norms: dict[str, list[Node | None]] = {}
    hooks = []
    for name, module in model.named_modules():
        # A hook may read or change the output that fusing removes.
        if module._forward_hooks or module._forward_pre_hooks:
            continue
        nodes: list[Node | None] = []
        # Subclasses of Conv2d, such as ConvNorm2d, do more than apply their weight.
        if type(module) is nn.Conv2d:
            convolutions[name] = nodes
        elif _can_be_fused(module):
            norms[name] = nodes
        else:
            continue

        def record(_: nn.Module, __: Any, output: Tensor, nodes: list[Node | None] = nodes) -> None:
            nodes.append(output.grad_fn)

        hooks.append(module.register_forward_hook(record))
    try:
        with torch.enable_grad():
            logits = checked_logits(model, images.clone().requires_grad_())
    finally:
        for hook in hooks:
            hook.remove()
    uses = _uses(logits.grad_fn)
    makers: dict[Node | None, str] = {}
    for name, nodes in convolutions.items():
        if len(nodes) == 1 and uses[nodes[0]] == 1:
            makers[nodes[0]] = name
    pairs = []
    for name, nodes in norms.items():
        if len(nodes) == 1 and nodes[0] is not None:
            # The first input of a batch norm's node is the tensor that it normalizes.
            source = nodes[0].next_functions[0][0]
            if source in makers:
                pairs.append((makers[source], name))
    return pairs


def _can_be_fused(module: nn.Module) -> bool:
    # Without running statistics a batch norm uses those of the batch, and is not a linear map.
    return isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) and module.running_mean is not None


def _uses(last: Node | None) -> Counter[Node]:
    """Return how many nodes of the graph that ends in `last` take the output of each node."""
    uses: Counter[Node] = Counter()
    stack = []
    if last is not None:
        stack.append(last)
    while stack:
        for source, _ in stack.pop().next_functions:
            if source is None:
                continue
            uses[source] += 1
            # Its own inputs count once, however many nodes take its output.
            if uses[source] == 1:
                stack.append(source)
    return uses


def _fuse(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Give the convolution the weight and bias with which it computes what both did."""
    weight, bias = fuse_conv_bn_weights(
        _exact(convolution.weight),
        _exact(convolution.bias),
        _exact(norm.running_mean),
        _exact(norm.running_var),
        norm.eps,
        _exact(norm.weight),
        _exact(norm.bias),
    )
    convolution.bias = nn.Parameter(bias.to(convolution.weight), requires_grad=False)
    convolution.weight = nn.Parameter(weight.to(convolution.weight), requires_grad=False)


def _exact(values: Tensor | None) -> Tensor | None:
    # float64, so that fusing rounds once; on the CPU, as not every device has it
    if values is None:
        return None
    return values.detach().cpu().double()
