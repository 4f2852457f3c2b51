"""Where infinite and NaN numbers began: what a stopped run says about the minibatch that stopped
it."""

import torch
from torch import Tensor, nn


def first_bad_layer(model: nn.Module, images: Tensor | None) -> str | None:
    """Where, on the way from the pixels to the logits and back, numbers first were infinite or NaN.

    The images go through the network once more, which leaves no trace in it: the first layer to
    answer with bad numbers is named. Where all layers answer well, or there are no images, the
    gradients that are there are asked, from the loss down.

    Args:
        model: after the backward pass.
        images: `(B, C, H, W)` of the minibatch. In adversarial training, where bad numbers may
            begin at perturbed images only, they are the clean ones; in training with mixup those
            before it.

    Returns:
        Such as `the output of layer1.0.bn1 (BatchNorm2d)`; None where all is well.
    """
    output = None if images is None else first_bad_output(model, images)
    if output is not None:
        return output
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return f"the gradient of {name}"
    return None


def first_bad_weight(model: nn.Module) -> str | None:
    """The first parameter, or else buffer, that holds an infinite number or a NaN; None where all
    are well."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not torch.isfinite(tensor).all():
            return name
    return None


@torch.no_grad()
def first_bad_output(model: nn.Module, images: Tensor) -> str | None:
    """The first layer without layers in it, in the model's present mode, whose output for these
    images `(B, C, H, W)` is not finite, such as `the output of conv1 (Conv2d)`; None where all are
    well. The pass leaves no trace in the model."""
    bad: list[str] = []

    def looks_at(name: str) -> torch.utils.hooks.RemovableHandle:
        def look(module: nn.Module, inputs: object, output: object) -> None:
            if not bad and isinstance(output, Tensor) and not torch.isfinite(output).all():
                bad.append(name)

        return model.get_submodule(name).register_forward_hook(look)

    leaves = [name for name, module in model.named_modules() if name and not any(module.children())]
    handles = [looks_at(name) for name in leaves]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    generators = torch.get_rng_state()
    try:
        model.forward(images)  # not the compiled one, which calls no hooks
    finally:
        for handle in handles:
            handle.remove()
        for buffer, before in buffers:
            buffer.copy_(before)
        torch.set_rng_state(generators)
    return f"the output of {bad[0]} ({type(model.get_submodule(bad[0])).__name__})" if bad else None
