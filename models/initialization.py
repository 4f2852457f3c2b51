"""Initial weights other than PyTorch's own.

Kaiming He, Xiangyu Zhang, Shaoqing Ren, Jian Sun: "Delving Deep into Rectifiers", arXiv:1502.01852;
for branches that begin at zero, Priya Goyal et al.: "Accurate, Large Minibatch SGD",
arXiv:1706.02677, section 5.1.
"""

import torch
from torch import nn

from base.errors import ConfigError


def initialize_he(model: nn.Module) -> None:
    """Draw the weights of plain convolutions from He's distribution, and set the biases of linear
    layers to zero.

    These are the initial weights of the wide ResNets of TRADES and of the overfitting study
    (arXiv:2002.11569).
    """
    _initialize_convolutions(model)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


@torch.no_grad()
def initialize_he_zero_gn(model: nn.Module) -> None:
    """Draw the weights of plain convolutions from He's distribution, and set the weight of every
    GroupNorm that ends a residual branch to zero.

    These are the initial weights of the ResNets of the study of BatchNorm against GroupNorm. With
    BatchNorm the residual branches begin with weight 1.
    """
    _initialize_convolutions(model)
    for end in _branch_ends(model):
        # Branches of pre-activation networks end in a convolution and keep all their norms: a norm
        # of weight 0 would hold the activation behind it at its kink, where its gradient is 0, and
        # the branch could never learn.
        if isinstance(end, nn.GroupNorm):
            nn.init.zeros_(end.weight)


@torch.no_grad()
def zero_residual_branches(model: nn.Module, name: str) -> None:
    """Set the weight of the last layer of every residual branch to zero, so that each block begins
    as its shortcut.

    The last layer is a norm in a ResNet, and a convolution in a pre-activation network.

    Args:
        model: the network; its blocks name that layer in `branch_end`.
        name: what an error calls the network.

    Raises:
        ConfigError: the network has no residual blocks, or the weight of their last layer cannot be
            zero: the layer has no weight, or it normalizes its weight.
    """
    ends = _branch_ends(model)
    if not ends:
        raise ConfigError(f"arch.args.zero_init_residual: {name} has no residual blocks")
    for end in ends:
        if getattr(end, "weight", None) is None or normalizes_weights(end):
            raise ConfigError(
                f"arch.args.zero_init_residual: blocks of {name} end in {type(end).__name__}, whose"
                " weight cannot begin at zero"
            )
        nn.init.zeros_(end.weight)


def normalizes_weights(layer: nn.Module) -> bool:
    """Whether a layer normalizes its weights, so that their scale has no effect.

    It is a property of the layer's class; see `base.registry.CONV_LAYERS`.
    """
    return getattr(layer, "normalizes_weights", False)


def _initialize_convolutions(model: nn.Module) -> None:
    """Draw the weights of plain convolutions from the normal distribution with variance `2 / (k_h *
    k_w * C_out)`.
    """
    for module in model.modules():
        # A convolution that normalizes its weights does not depend on their variance. ConvNorm's
        # depthwise `bpconv` is an affine map, not a layer before a ReLU.
        is_plain = isinstance(module, nn.Conv2d) and not normalizes_weights(module)
        if is_plain and module.groups == 1:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _branch_ends(model: nn.Module) -> list[nn.Module]:
    """The last layer of every residual branch."""
    blocks = [module for module in model.modules() if hasattr(module, "branch_end")]
    return [getattr(block, block.branch_end) for block in blocks]
