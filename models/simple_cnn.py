"""The two small networks of the ConvNorm repository, for quick experiments."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base.base_model import BaseModel


class SimpleCNN(BaseModel):
    """Six 3x3 convolutions of 8 to 32 channels with norm and activation, a 2x2 maximum after every
    second one, one linear layer.

    The state dict has the keys of the original. Deviation: features of another size than 4x4
    (images of another size than 32x32) are averaged to 4x4. Plain and ONI convolutions have a bias,
    as in the original, which does not ask for none.

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
        out = self.features(inputs)
        # the pooling has no deterministic backward pass on CUDA, so it is left out where it does
        # nothing
        if out.shape[-2:] != (4, 4):
            out = F.adaptive_avg_pool2d(out, 4)
        return self.classifier(torch.flatten(out, 1))


class SimpleCNN2(BaseModel):
    """Four convolutions without padding, C -> 6 -> 16 -> 20 -> 32 channels, with norm and
    activation; a 2x2 maximum after the first, second and fourth; one linear layer.

    The state dict has the keys of the original. Deviations: `activation_layer_type` is obeyed (the
    original always takes ReLU), and the features are averaged to 1x1, so images larger than 32x32
    work, too.

    Args:
        num_classes: the number of logits.
        layer_types: the arguments of `BaseModel`.

    Raises:
        ConfigError: a layer type is unknown.
    """

    def __init__(self, num_classes: int = 10, **layer_types: Any) -> None:
        super().__init__(**layer_types)
        sizes = ((self.in_channels, 6, 5), (6, 16, 3), (16, 20, 3), (20, 32, 3))
        for number, (in_channels, channels, kernel_size) in enumerate(sizes, start=1):
            self.add_module(
                f"conv{number}", self.conv_layer(in_channels, channels, kernel_size, bias=False)
            )
            self.add_module(f"norm{number}", self.norm_layer(channels))
            self.add_module(f"relu{number}", self.activation_layer(channels))
        self.pool = nn.MaxPool2d(2)
        self.fc = self.linear_layer(32, num_classes)

    def forward_normalized(self, inputs: Tensor) -> Tensor:
        """Logits `(B, num_classes)` of normalized images `(B, C, H, W)`."""
        out = self.pool(self.relu1(self.norm1(self.conv1(inputs))))
        out = self.pool(self.relu2(self.norm2(self.conv2(out))))
        out = self.relu3(self.norm3(self.conv3(out)))
        out = self.pool(self.relu4(self.norm4(self.conv4(out))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(out, 1), 1))
