"""The layers that a config can name; importing this fills the tables of `base.registry`."""

from torch import nn

from base.registry import ACTIVATION_LAYERS, CONV_LAYERS, LINEAR_LAYERS, NORM_LAYERS
from models.layers.activations import SReLU, relu
from models.layers.conv_norm.layer import ConvNorm2d
from models.layers.conv_norm.replace import replace_with_conv_norm
from models.layers.norms import batch_norm, group_norm, instance_norm, no_norm
from models.layers.oni import ONIConv2d
from models.layers.own import OWNConv2d
from models.layers.spectral import SpectralNormConv2d

__all__ = [
    "ConvNorm2d",
    "ONIConv2d",
    "OWNConv2d",
    "SReLU",
    "SpectralNormConv2d",
    "replace_with_conv_norm",
]

CONV_LAYERS.update(
    conv=nn.Conv2d,
    prec_conv=ConvNorm2d,
    conv_norm=ConvNorm2d,
    sn_conv=SpectralNormConv2d,
    oni_conv=ONIConv2d,
    own_conv=OWNConv2d,
)
NORM_LAYERS.update({"bn": batch_norm, "gn": group_norm, "in": instance_norm, "no": no_norm})
ACTIVATION_LAYERS.update(relu=relu, srelu=SReLU)
LINEAR_LAYERS.update(linear=nn.Linear)
