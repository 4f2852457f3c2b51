"""Turns any network's convolutions into ConvNorm."""

from torch import nn

from models.layers.conv_norm import ConvNorm2d


def replace_with_conv_norm(module: nn.Module) -> nn.Module:
    """Swap every plain `nn.Conv2d` of a network, with the batch norm behind it, for a `ConvNorm2d`, in place.

    The batch norm behind a convolution is the next module registered beside it, if that is an `nn.BatchNorm2d` with as many
    channels; it moves, with everything it learned, into the new layer, and an `nn.Identity` takes its place. A convolution
    without one gets a `ConvNorm2d` with `bn=False`. The convolution's own parameters move too (they stay the same objects), and
    so do device, dtype and train or eval mode. `bpconv` is new and random.

    Subclasses of `nn.Conv2d` (`ConvNorm2d` and its inside, the spectral and orthogonal convolutions) and convolutions whose
    weight is computed by a hook stay as they are, so a second call changes nothing.

    Args:
        module: any network, torchvision's included, or a single convolution.

    Returns:
        `module` itself; the new layer where `module` is a convolution.
    """
    return _replace(module, {}) if not _is_plain_conv(module) else _conv_norm_from(module, None)


def _replace(parent: nn.Module, replaced: dict[nn.Module, nn.Module]) -> nn.Module:
    if isinstance(parent, nn.Conv2d):
        return parent
    children = list(parent._modules.items())  # with repetitions, which named_children() leaves out
    for position, (name, child) in enumerate(children):
        if child is None:
            continue
        if child in replaced:  # a layer that is used in two places stays one layer
            parent._modules[name] = replaced[child]
        elif _is_plain_conv(child):
            following = children[position + 1] if position + 1 < len(children) else ("", None)
            batch_norm = following[1] if _is_batch_norm(following[1], child.out_channels) else None
            replaced[child] = parent._modules[name] = _conv_norm_from(child, batch_norm)
            if batch_norm is not None:
                replaced[batch_norm] = parent._modules[following[0]] = nn.Identity()
        else:
            _replace(child, replaced)
    return parent


def _is_plain_conv(module: nn.Module) -> bool:
    return type(module) is nn.Conv2d and "weight" in module._parameters


def _is_batch_norm(module: nn.Module | None, channels: int) -> bool:
    return type(module) is nn.BatchNorm2d and module.num_features == channels


def _conv_norm_from(conv: nn.Conv2d, batch_norm: nn.BatchNorm2d | None) -> ConvNorm2d:
    layer = ConvNorm2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        conv.bias is not None,
        conv.padding_mode,
        bn=False,
    )
    layer.to(device=conv.weight.device, dtype=conv.weight.dtype).train(conv.training)
    layer.weight, layer.bias = conv.weight, conv.bias
    if batch_norm is not None:
        layer.bn = True
        layer.batch_norm = batch_norm
    return layer
