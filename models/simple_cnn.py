"""The two small networks of the ConvNorm repository, for quick experiments."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base.base_model import BaseModel


class SimpleCNN(BaseModel):
    """Six 3x3 convolutions of 8 to 32 channels with norm and activation, a 2x2 max pooling after
    every second one, and one linear layer.

    The state dict has the keys of the original. Deviation: features of another size than 4x4
    (images of another size than 32x32) are averaged to 4x4.

    Args:
        num_classes: the number of logits.
        layer_types: the arguments of `BaseModel`.

    Raises:
        ConfigError: a layer type is unknown.
    """

    def __init__(self, num_classes: int = 10, **layer_types: Any) -> None:
        super().__init__(**layer_types)
        layers: list[nn.Module] = []
        in_channels = self.in_channels
        for channels in (8, 16, 32):
            for _ in range(2):
                # `bias` is left at the layer's default, as in the original: plain, ONI and OWN
                # convolutions have one although a norm follows.
                layers += [
                    self.conv_layer(in_channels, channels, kernel_size=3, padding=1),
                    self.norm_layer(channels),
                    self.activation_layer(channels),
                ]
                in_channels = channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = self.linear_layer(32 * 4 * 4, num_classes)

    def forward_normalized(self, inputs: Tensor) -> Tensor:
        """Logits `(B, num_classes)` of normalized images `(B, C, H, W)`."""
        x = self.features(inputs)
        # Adaptive pooling has no deterministic backward pass on CUDA, so it is left out where it
        # changes nothing.
        if x.shape[-2:] != (4, 4):
            x = F.adaptive_avg_pool2d(x, 4)
        return self.classifier(torch.flatten(x, 1))


class SimpleCNN2(BaseModel):
    """Four convolutions without padding, C -> 6 -> 16 -> 20 -> 32 channels, with norm and
    activation; a 2x2 max pooling after the first, second and fourth; one linear layer.

    The state dict has the keys of the original. Deviations: the activation is the one of
    `activation_layer_type` (the original always takes ReLU), and the features are averaged to 1x1,
    so images larger than 32x32 work, too.

    Args:
        num_classes: the number of logits.
        layer_types: the arguments of `BaseModel`.

    Raises:
        ConfigError: a layer type is unknown.
    """

    def __init__(self, num_classes: int = 10, **layer_types: Any) -> None:
        super().__init__(**layer_types)
        self.conv1 = self.conv_layer(self.in_channels, 6, 5, bias=False)
        self.norm1 = self.norm_layer(6)
        self.relu1 = self.activation_layer(6)
        self.conv2 = self.conv_layer(6, 16, 3, bias=False)
        self.norm2 = self.norm_layer(16)
        self.relu2 = self.activation_layer(16)
        self.conv3 = self.conv_layer(16, 20, 3, bias=False)
        self.norm3 = self.norm_layer(20)
        self.relu3 = self.activation_layer(20)
        self.conv4 = self.conv_layer(20, 32, 3, bias=False)
        self.norm4 = self.norm_layer(32)
        self.relu4 = self.activation_layer(32)
        self.pool = nn.MaxPool2d(2)
        self.fc = self.linear_layer(32, num_classes)

    def forward_normalized(self, inputs: Tensor) -> Tensor:
        """Logits `(B, num_classes)` of normalized images `(B, C, H, W)`."""
        x = self.pool(self.relu1(self.norm1(self.conv1(inputs))))
        x = self.pool(self.relu2(self.norm2(self.conv2(x))))
        x = self.relu3(self.norm3(self.conv3(x)))
        x = self.pool(self.relu4(self.norm4(self.conv4(x))))
        x = F.adaptive_avg_pool2d(x, 1)
        return self.fc(torch.flatten(x, 1))
