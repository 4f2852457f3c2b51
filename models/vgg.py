"""VGG with norms and a single linear layer.

Karen Simonyan, Andrew Zisserman: "Very Deep Convolutional Networks for Large-Scale Image
Recognition", arXiv:1409.1556.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base.base_model import BaseModel

STAGES = {
    "vgg11": ([64], [128], [256] * 2, [512] * 2, [512] * 2),
    "vgg13": ([64] * 2, [128] * 2, [256] * 2, [512] * 2, [512] * 2),
    "vgg16": ([64] * 2, [128] * 2, [256] * 3, [512] * 3, [512] * 3),
    "vgg19": ([64] * 2, [128] * 2, [256] * 4, [512] * 4, [512] * 4),
}
"""Channels of the 3x3 convolutions in each stage; every stage ends with a 2x2 max pooling."""


class VGG(BaseModel):
    """VGG for images of at least 32x32 pixels.

    The state dict has the keys of the original ConvNorm models. Deviation: the features are
    averaged to 1x1, so images larger than 32x32 work, too.

    Args:
        name: a name in `STAGES`.
        num_classes: the number of logits.
        layer_types: the arguments of `BaseModel`.

    Raises:
        ConfigError: a layer type is unknown.
    """

    def __init__(self, name: str, num_classes: int = 10, **layer_types: Any) -> None:
        super().__init__(**layer_types)
        layers: list[nn.Module] = []
        in_channels = self.in_channels
        for stage in STAGES[name]:
            for channels in stage:
                # `bias` is left at the layer's default, as in the original: plain, ONI and OWN
                # convolutions have one although a norm follows.
                layers += [
                    self.conv_layer(in_channels, channels, kernel_size=3, padding=1),
                    self.norm_layer(channels),
                    self.activation_layer(channels),
                    # The original has a 1x1 average here, which counts in the keys.
                    nn.Identity(),
                ]
                in_channels = channels
            layers += [nn.MaxPool2d(2), nn.Identity()]
        self.features = nn.Sequential(*layers)
        self.classifier = self.linear_layer(in_channels, num_classes)

    def forward_normalized(self, inputs: Tensor) -> Tensor:
        """Logits `(B, num_classes)` of normalized images `(B, C, H, W)`."""
        x = self.features(inputs)
        x = F.adaptive_avg_pool2d(x, 1)
        return self.classifier(torch.flatten(x, 1))
