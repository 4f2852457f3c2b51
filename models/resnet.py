"""ResNet and pre-activation ResNet.

Kaiming He, Xiangyu Zhang, Shaoqing Ren, Jian Sun: "Deep Residual Learning for Image Recognition",
arXiv:1512.03385, and "Identity Mappings in Deep Residual Networks", arXiv:1603.05027."""

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base.base_model import BaseModel
from base.errors import ConfigError
from base.registry import Constructor, lookup

STEMS = {
    "cifar": {"kernel_size": 3, "stride": 1, "padding": 1},
    "imagenet": {"kernel_size": 7, "stride": 2, "padding": 3},
}
"""The first convolution; after the ImageNet one a 3x3 maximum with stride 2 follows."""


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut. Both activations are one layer, as in the
    original."""

    expansion = 1
    branch_end = "norm2"

    def __init__(
        self,
        in_planes: int,
        planes: int,
        stride: int,
        conv: Constructor,
        norm: Constructor,
        act: Constructor,
    ) -> None:
        super().__init__()
        self.conv1 = conv(in_planes, planes, kernel_size=3, stride=stride, padding=1, bias=False)
        self.norm1 = norm(planes)
        self.relu = act(planes)
        self.conv2 = conv(planes, planes, kernel_size=3, stride=1, padding=1, bias=False)
        self.norm2 = norm(planes)
        self.shortcut = _projection(in_planes, planes, stride, conv, norm)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, in_planes, H, W)` -> `(B, planes, H / stride, W / stride)`."""
        out = self.relu(self.norm1(self.conv1(x)))
        return self.relu(self.norm2(self.conv2(out)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut.

    `relu_out` follows the sum: it has four times the channels of `relu`, and the original, which
    uses one layer for both, cannot be built with an activation that has parameters."""

    expansion = 4
    branch_end = "norm3"

    def __init__(
        self,
        in_planes: int,
        planes: int,
        stride: int,
        conv: Constructor,
        norm: Constructor,
        act: Constructor,
    ) -> None:
        super().__init__()
        out_planes = self.expansion * planes
        self.conv1 = conv(in_planes, planes, kernel_size=1, bias=False)
        self.norm1 = norm(planes)
        self.conv2 = conv(planes, planes, kernel_size=3, stride=stride, padding=1, bias=False)
        self.norm2 = norm(planes)
        self.conv3 = conv(planes, out_planes, kernel_size=1, bias=False)
        self.norm3 = norm(out_planes)
        self.relu = act(planes)
        self.relu_out = act(out_planes)
        self.shortcut = _projection(in_planes, out_planes, stride, conv, norm)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, in_planes, H, W)` -> `(B, 4 * planes, H / stride, W / stride)`."""
        out = self.relu(self.norm1(self.conv1(x)))
        out = self.relu(self.norm2(self.conv2(out)))
        return self.relu_out(self.norm3(self.conv3(out)) + self.shortcut(x))


class ResNet(BaseModel):
    """ResNet for images of 32x32 (`stem="cifar"`) or of about 224x224 (`stem="imagenet"`) pixels.

    The state dict has the keys of the original ConvNorm models. Deviation: the features are
    averaged over the whole image, whatever its size; the original averages 4x4 and takes 32x32
    images only.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        num_blocks: how many blocks each of the four stages has.
        num_classes: the number of logits.
        stem: first layers: a 3x3 convolution (cifar), or one of 7x7 with stride and pooling
            (imagenet).
        layer_types: the arguments of `BaseModel`.

    Raises:
        ConfigError: `stem` or a layer type is unknown.
    """

    other_names: ClassVar = {"bn1": "norm1", "bn2": "norm2", "bn3": "norm3"}
    """pytorch-cifar's names, which TRADES, RobustBench and MadryLab's robustness share."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        num_blocks: tuple[int, int, int, int],
        num_classes: int = 10,
        stem: Literal["cifar", "imagenet"] = "cifar",
        **layer_types: Any,
    ) -> None:
        super().__init__(**layer_types)
        self.conv1 = self.conv_layer(
            self.in_channels, 64, bias=False, **lookup(STEMS, stem, "arch.args.stem")
        )
        self.norm1 = self.norm_layer(64)
        self.relu = self.activation_layer(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if stem == "imagenet" else nn.Identity()
        in_planes = 64
        for stage, (planes, blocks) in enumerate(
            zip((64, 128, 256, 512), num_blocks, strict=True), start=1
        ):
            layers = []
            for position in range(blocks):
                stride = 2 if stage > 1 and position == 0 else 1
                layers.append(
                    block(
                        in_planes,
                        planes,
                        stride,
                        self.conv_layer,
                        self.norm_layer,
                        self.activation_layer,
                    )
                )
                in_planes = block.expansion * planes
            self.add_module(f"layer{stage}", nn.Sequential(*layers))
        self.linear = self.linear_layer(in_planes, num_classes)

    def forward_normalized(self, inputs: Tensor) -> Tensor:
        """Logits `(B, num_classes)` of normalized images `(B, C, H, W)`."""
        out = self.maxpool(self.relu(self.norm1(self.conv1(inputs))))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(out, 1), 1))


SHORTCUT_INPUTS = ("activated", "raw")


class PreActBlock(nn.Module):
    """Norm, activation and 3x3 convolution, twice; the shortcut's 1x1 convolution has no norm, and
    sees the activated input or, with `shortcut_input="raw"`, the input itself."""

    branch_end = "conv2"

    def __init__(
        self,
        in_planes: int,
        planes: int,
        stride: int,
        conv: Constructor,
        norm: Constructor,
        act: Constructor,
        shortcut_input: str = "activated",
    ) -> None:
        super().__init__()
        self.shortcut_input = shortcut_input
        self.bn1 = norm(in_planes)
        # the input is also the shortcut, even where the norm is the identity
        self.relu1 = act(in_planes, inplace=False)
        self.conv1 = conv(in_planes, planes, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = norm(planes)
        self.relu2 = act(planes)
        self.conv2 = conv(planes, planes, kernel_size=3, stride=1, padding=1, bias=False)
        self.shortcut = None
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(
                conv(in_planes, planes, kernel_size=1, stride=stride, bias=False)
            )

    def forward(self, x: Tensor) -> Tensor:
        """`(B, in_planes, H, W)` -> `(B, planes, H / stride, W / stride)`."""
        out = self.relu1(self.bn1(x))
        shortcut = x
        if self.shortcut is not None:
            shortcut = self.shortcut(x if self.shortcut_input == "raw" else out)
        return self.conv2(self.relu2(self.bn2(self.conv1(out)))) + shortcut


class PreActResNet(BaseModel):
    """Pre-activation ResNet-18 in the layout that the literature on adversarial training uses
    (Rice, Wong, Kolter, arXiv:2002.11569): `conv1`, four stages, a last norm `bn` and activation,
    the average, `linear`.

    Networks of that literature have these shapes and differ in what the 1x1 convolution of a
    shortcut sees, which no key of a checkpoint tells. The weights of one mean nothing in the other:

    - "activated", `relu(bn(x))`: robust_overfitting (Rice et al., arXiv:2002.11569), AWP (Wu et
      al., arXiv:2004.05884), RobustBench's `PreActBlockV2`; also kuangliu's pytorch-cifar, where
      the layout comes from.
    - "raw", `x`: fast_adversarial (Wong et al., arXiv:2001.03994), GradAlign (Andriushchenko,
      Flammarion, arXiv:2007.02617), RobustBench's `PreActBlock`, to which its Wong2020Fast belongs.

    GradAlign's network also ends without the last norm and activation: `final_norm=False`.

    Args:
        num_blocks: how many blocks each of the four stages has.
        num_classes: the number of logits.
        shortcut_input: what the shortcuts see: relu(bn(x)) (activated) or x itself (raw).
        final_norm: whether a norm and an activation stand before the average.
        layer_types: the arguments of `BaseModel`.

    Raises:
        ConfigError: a layer type or `shortcut_input` is unknown.
    """

    untold: ClassVar = {
        "shortcut_input": (
            "activated",
            "as robust_overfitting and AWP have it; --set arch.args.shortcut_input=raw for fast_adversarial and GradAlign",
        )
    }

    def __init__(
        self,
        num_blocks: tuple[int, int, int, int],
        num_classes: int = 10,
        shortcut_input: Literal["activated", "raw"] = "activated",
        final_norm: bool = True,
        **layer_types: Any,
    ) -> None:
        super().__init__(**layer_types)
        if shortcut_input not in SHORTCUT_INPUTS:
            expected = " or ".join(SHORTCUT_INPUTS)
            raise ConfigError(f"arch.args.shortcut_input: {shortcut_input!r}, expected {expected}")
        self.conv1 = self.conv_layer(
            self.in_channels, 64, kernel_size=3, stride=1, padding=1, bias=False
        )
        in_planes = 64
        for stage, (planes, blocks) in enumerate(
            zip((64, 128, 256, 512), num_blocks, strict=True), start=1
        ):
            layers = []
            for position in range(blocks):
                stride = 2 if stage > 1 and position == 0 else 1
                layer_types = (self.conv_layer, self.norm_layer, self.activation_layer)
                layers.append(PreActBlock(in_planes, planes, stride, *layer_types, shortcut_input))
                in_planes = planes
            self.add_module(f"layer{stage}", nn.Sequential(*layers))
        self.bn = self.norm_layer(in_planes) if final_norm else nn.Identity()
        self.relu = self.activation_layer(in_planes) if final_norm else nn.Identity()
        self.linear = self.linear_layer(in_planes, num_classes)

    def forward_normalized(self, inputs: Tensor) -> Tensor:
        """Logits `(B, num_classes)` of normalized images `(B, C, H, W)`."""
        out = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(inputs)))))
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(self.relu(self.bn(out)), 1), 1))


def _projection(
    in_planes: int, planes: int, stride: int, conv: Constructor, norm: Constructor
) -> nn.Sequential:
    """The shortcut: nothing where shapes agree, else a strided 1x1 convolution and its norm."""
    if stride == 1 and in_planes == planes:
        return nn.Sequential()
    return nn.Sequential(
        conv(in_planes, planes, kernel_size=1, stride=stride, bias=False), norm(planes)
    )
