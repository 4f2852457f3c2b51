"""VGG with norms and a single linear layer.

Karen Simonyan, Andrew Zisserman: "Very Deep Convolutional Networks for Large-Scale Image
Recognition", arXiv:1409.1556."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base.base_model import BaseModel

STAGES = {
    "vgg11": ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    "vgg13": ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512)),
    "vgg16": ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)),
    "vgg19": (
        (64, 64),
        (128, 128),
        (256, 256, 256, 256),
        (512, 512, 512, 512),
        (512, 512, 512, 512),
    ),
}
"""Channels of the 3x3 convolutions in each stage; every stage ends with a 2x2 maximum."""


class VGG(BaseModel):
    """VGG for images of at least 32x32 pixels.

    The state dict has the keys of the original ConvNorm models. Deviation: the features are
    averaged to 1x1, so images larger than 32x32 work, too. Plain and ONI convolutions have a bias,
    as in the original, which does not ask for none.

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
                layers += [
                    self.conv_layer(in_channels, channels, kernel_size=3, padding=1),
                    self.norm_layer(channels),
                    self.activation_layer(channels),
                    nn.Identity(),  # the original has a 1x1 average here; it counts in the keys
                ]
                in_channels = channels
            layers += [nn.MaxPool2d(2), nn.Identity()]
        self.features = nn.Sequential(*layers)
        self.classifier = self.linear_layer(in_channels, num_classes)

    def forward_normalized(self, inputs: Tensor) -> Tensor:
        """Logits `(B, num_classes)` of normalized images `(B, C, H, W)`."""
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(self.features(inputs), 1), 1))
