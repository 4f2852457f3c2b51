"""ConvNorm: convolutions whose output channels are orthogonal, and what brings them into a network.

A package of torch alone, which may be installed by itself, as `conv_norm`, or copied:

    from conv_norm import ConvNorm2d, replace_with_conv_norm

    layer = ConvNorm2d(64, 128, kernel_size=3, stride=2, padding=1)  # in place of Conv2d and BatchNorm2d
    model = replace_with_conv_norm(torchvision.models.resnet18())  # every Conv2d and the BatchNorm2d behind it
"""

from .layer import ConvNorm2d
from .replace import replace_with_conv_norm

__all__ = ["ConvNorm2d", "replace_with_conv_norm"]
