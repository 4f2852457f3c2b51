"""Initial weights other than PyTorch's own.

Kaiming He, Xiangyu Zhang, Shaoqing Ren, Jian Sun: "Delving Deep into Rectifiers", arXiv:1502.01852;
for branches that begin at zero, Priya Goyal et al.: "Accurate, Large Minibatch SGD",
arXiv:1706.02677, section 5.1."""

import torch
from torch import nn

from base.errors import ConfigError


def initialize_he(model: nn.Module) -> None:
    """Plain convolutions by He's law, the biases of linear layers zero: the initial weights of the
    wide ResNets of TRADES and of the overfitting study (arXiv:2002.11569).
    """
    _initialize_convolutions(model)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


@torch.no_grad()
def initialize_he_zero_gn(model: nn.Module) -> None:
    """Plain convolutions by He's law, and weight 0 in every GroupNorm that ends a residual branch:
    the initial weights of the ResNets of the study of BatchNorm against GroupNorm.

    With BatchNorm its residual branches begin with weight 1. A branch that ends in a convolution,
    as in pre-activation networks, keeps all its norms, too: there, a norm of weight 0 would hold
    the activation behind it at its kink, and the branch could never learn."""
    _initialize_convolutions(model)
    for end in _branch_ends(model):
        if isinstance(end, nn.GroupNorm):
            nn.init.zeros_(end.weight)


@torch.no_grad()
def zero_residual_branches(model: nn.Module, name: str) -> None:
    """Make every residual block begin as its shortcut: the last layer of the branch beside it gets
    the weight zero.

    In a ResNet that is the block's last norm. In a pre-activation block it is the last convolution:
    were it the norm before it, the activation behind that would be at its kink, where its gradient
    is 0, and the branch could never learn.

    Args:
        model: the network; its blocks name that layer in `branch_end`.
        name: what an error calls the network.

    Raises:
        ConfigError: the network has no residual blocks, or their last layer has no weight that may
            be zero: there is no norm, or the convolution divides by the size of its kernel.
    """
    ends = _branch_ends(model)
    if not ends:
        raise ConfigError(f"arch.args.zero_init_residual: {name} has no residual blocks")
    for end in ends:
        if getattr(end, "weight", None) is None or normalizes_weights(end):
            reason = (
                f"blocks of {name} end in {type(end).__name__}, whose weight cannot begin at zero"
            )
            raise ConfigError(f"arch.args.zero_init_residual: {reason}")
        nn.init.zeros_(end.weight)


def normalizes_weights(layer: nn.Module) -> bool:
    """Whether a layer normalizes its weights, so that neither their size nor zero means anything; a
    property of its class, see `base.registry.CONV_LAYERS`."""
    return getattr(layer, "normalizes_weights", False)


def _initialize_convolutions(model: nn.Module) -> None:
    """Plain convolutions from the normal law with variance `2 / (k_h * k_w * C_out)`.

    Convolutions that normalize their own kernels, and depthwise ones, keep what they have.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and not normalizes_weights(module) and module.groups == 1:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _branch_ends(model: nn.Module) -> list[nn.Module]:
    """The last layer of every residual branch."""
    blocks = [module for module in model.modules() if hasattr(module, "branch_end")]
    return [getattr(block, block.branch_end) for block in blocks]
