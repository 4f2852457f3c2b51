"""ConvNorm: convolutions whose output channels are orthogonal, and what brings them into a network."""

from models.layers.conv_norm.layer import ConvNorm2d
from models.layers.conv_norm.replace import replace_with_conv_norm

__all__ = ["ConvNorm2d", "replace_with_conv_norm"]
