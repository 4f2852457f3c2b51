"""Batch normalization folded into the convolution before it, for attacks that ask a frozen network
again and again."""

from collections import Counter
from copy import deepcopy
from math import isfinite

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from attacks.attack import frozen
from attacks.classifier import Model, ask

TOLERANCE = 1e-4
"""Largest difference between logits of the two networks, as a share of the largest logit; rounding
makes about 1e-6."""


def folded(model: Model, images: Tensor) -> Model:
    """A copy of `model` for evaluation, without the batch norms that stand right behind a
    convolution; or `model` itself.

    With running statistics `bn(w * x + b) = (s w) * x + s (b - mean) + beta` per output channel, `s
    = gamma / sqrt(var + eps)`: another convolution, which saves two passes over the layer's output
    in each direction. Logits and gradients differ from the model's by rounding, so verdicts are for
    the model itself to give.

    A pair is folded if, in the autograd graph of one forward pass, nothing but the batch norm takes
    what the convolution makes. Modules that are used twice or have hooks, and convolutions that
    compute their weights in every pass (subclasses, parametrisations), stay. `model` comes back
    where there is nothing to fold, where it cannot be copied, where the copy answers otherwise or
    with numbers that are not finite, and where it is compiled, which a copy would not be.

    Args:
        model: any module, whose weights and modes are not changed, or a function, which comes back.
        images: `(B, C, H, W)`, a few on which the two are compared.
    """
    if not isinstance(model, nn.Module):
        return model
    with torch.inference_mode(False), frozen(model, training=False):
        images = images.detach().clone()
        pairs = [] if _compiled(model) else _pairs(model, images)
        if not pairs:
            return model
        try:
            copy = deepcopy(model).eval()
        except (
            RuntimeError,
            TypeError,
        ):  # it holds what cannot be copied: a lock, a tensor of a graph
            return model
        with torch.no_grad():
            for convolution, norm in pairs:
                _fold(copy.get_submodule(convolution), copy.get_submodule(norm))
                copy.set_submodule(norm, nn.Identity())
            expected, found = ask(model, images), ask(copy, images)
        largest = float(expected.abs().max())
        if not isfinite(largest):
            return model
        same = torch.allclose(found, expected, rtol=0, atol=TOLERANCE * largest)
        return copy if same else model


def _compiled(model: nn.Module) -> bool:
    """Whether `torch.compile` was asked for the model or a part of it."""
    return any(
        module._compiled_call_impl is not None or hasattr(module, "_orig_mod")
        for module in model.modules()
    )


def _pairs(model: nn.Module, images: Tensor) -> list[tuple[str, str]]:
    """Names of a convolution and of the batch norm that alone takes its output, for each pair that
    can be folded."""
    convolutions: dict[str, list[Node | None]] = {}
    norms: dict[str, list[Node | None]] = {}
    hooks = []
    for name, module in model.named_modules():
        kind = convolutions if type(module) is nn.Conv2d else norms if _folds_away(module) else None
        if kind is not None and not module._forward_hooks and not module._forward_pre_hooks:
            kind[name] = []
            hooks.append(
                module.register_forward_hook(
                    lambda *call, made=kind[name]: made.append(call[2].grad_fn)
                )
            )
    try:
        with torch.enable_grad():
            logits = ask(model, images.clone().requires_grad_())
    finally:
        for hook in hooks:
            hook.remove()
    uses = _uses(logits.grad_fn)
    makers = {
        made[0]: name
        for name, made in convolutions.items()
        if len(made) == 1 and uses[made[0]] == 1
    }
    sources = {
        name: made[0].next_functions[0][0]
        for name, made in norms.items()
        if len(made) == 1 and made[0] is not None
    }
    return [(makers[source], name) for name, source in sources.items() if source in makers]


def _folds_away(module: nn.Module) -> bool:
    return isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) and module.running_mean is not None


def _uses(last: Node | None) -> Counter[Node]:
    """How many nodes of the graph that ends in `last` take what a node makes."""
    uses: Counter[Node] = Counter()
    left = [] if last is None else [last]
    while left:
        for source, _ in left.pop().next_functions:
            if source is not None:
                uses[source] += 1
                if uses[source] == 1:
                    left.append(source)
    return uses


def _fold(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Give the convolution the weights and the bias with which it does what both did."""
    scale = (_exact(norm.running_var) + norm.eps).rsqrt()
    shift = -_exact(norm.running_mean)
    if convolution.bias is not None:
        shift += _exact(convolution.bias)
    if norm.weight is not None:
        scale *= _exact(norm.weight)
    shift *= scale
    if norm.bias is not None:
        shift += _exact(norm.bias)
    weight = convolution.weight
    convolution.weight = nn.Parameter(
        (_exact(weight) * scale.reshape(-1, 1, 1, 1)).to(weight), requires_grad=False
    )
    convolution.bias = nn.Parameter(shift.to(weight), requires_grad=False)


def _exact(values: Tensor) -> Tensor:
    """In float64, which not every device has."""
    return values.detach().cpu().double()
