"""ConvNorm: convolutions in which the operator of each output channel is orthogonal.

The package needs torch alone. It may be copied, or installed by itself as `conv_norm`:

    from conv_norm import ConvNorm2d, replace_with_conv_norm

    # in place of nn.Conv2d and nn.BatchNorm2d
    layer = ConvNorm2d(64, 128, kernel_size=3, stride=2, padding=1)
    # in place of every nn.Conv2d of a network and the nn.BatchNorm2d behind it
    model = replace_with_conv_norm(torchvision.models.resnet18())
"""

from .layer import ConvNorm2d
from .replace import replace_with_conv_norm

__all__ = ["ConvNorm2d", "replace_with_conv_norm"]
