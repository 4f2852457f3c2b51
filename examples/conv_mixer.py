"""A small ConvMixer (Trockman and Kolter 2022, arXiv:2201.09792) as a network."""

from typing import Any

from torch import Tensor, nn

from base.base_model import BaseModel
from base.config.section import Positive
from base.registry import MODELS


class Residual(nn.Sequential):
    """`x + layers(x)`."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class ConvMixer(BaseModel):
    """Patches, then blocks that mix pixels and channels in turn, then an average and a linear
    layer.

    Args:
        num_classes: the number of logits.
        width: channels of every layer.
        depth: the number of blocks.
        patch_size: side of a patch in pixels.
        kernel_size: side of the kernels that mix pixels; an odd number.
        options: the arguments of `BaseModel`.
    """

    def __init__(
        self,
        num_classes: int = 10,
        width: Positive = 32,
        depth: Positive = 2,
        patch_size: Positive = 4,
        kernel_size: Positive = 3,
        **options: Any,
    ) -> None:
        super().__init__(**options)

        def activated(conv: nn.Module) -> nn.Sequential:
            # In this order, as in the paper
            return nn.Sequential(conv, self.activation_layer(width), self.norm_layer(width))

        self.patches = activated(
            self.conv_layer(self.in_channels, width, patch_size, stride=patch_size)
        )
        self.blocks = nn.Sequential()
        for _ in range(depth):
            depthwise = self.conv_layer(
                width, width, kernel_size, padding=kernel_size // 2, groups=width
            )
            pointwise = self.conv_layer(width, width, 1)
            self.blocks.append(Residual(activated(depthwise)))
            self.blocks.append(activated(pointwise))
        self.classifier = self.linear_layer(width, num_classes)

    def forward_normalized(self, inputs: Tensor) -> Tensor:
        """Return logits `(B, num_classes)` of normalized images `(B, C, H, W)`."""
        features = self.blocks(self.patches(inputs))
        return self.classifier(features.mean(dim=(2, 3)))


MODELS["conv_mixer"] = ConvMixer
