"""ResNet and pre-activation ResNet.

Kaiming He, Xiangyu Zhang, Shaoqing Ren, Jian Sun: "Deep Residual Learning for Image Recognition",
arXiv:1512.03385, and "Identity Mappings in Deep Residual Networks", arXiv:1603.05027.
"""

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base.base_model import BaseModel
from base.errors import ConfigError
from base.registry import Constructor, lookup, not_one_of

STEMS = {
    "cifar": {"kernel_size": 3, "stride": 1, "padding": 1},
    "imagenet": {"kernel_size": 7, "stride": 2, "padding": 3},
}
"""The first convolution. After the ImageNet one, a 3x3 max pooling with stride 2 follows."""

SHORTCUT_INPUTS = ("activated", "raw")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut.

    Args:
        in_planes: channels of the input.
        planes: channels of both convolutions and of the output.
        stride: of the first convolution and of the shortcut.
        conv, norm, act: constructors of the layers, as `BaseModel` resolves them.
    """

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
        # Both activations are one layer, as in the original: an SReLU's threshold is shared.
        self.relu = act(planes)
        self.conv2 = conv(planes, planes, kernel_size=3, stride=1, padding=1, bias=False)
        self.norm2 = norm(planes)
        self.shortcut = _projection(in_planes, planes, stride, conv, norm)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, in_planes, H, W)` -> `(B, planes, H / stride, W / stride)`."""
        out = self.conv1(x)
        out = self.norm1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.norm2(out)
        return self.relu(out + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut.

    Args:
        in_planes: channels of the input.
        planes: channels between the convolutions; the output has four times as many.
        stride: of the 3x3 convolution and of the shortcut.
        conv, norm, act: constructors of the layers, as `BaseModel` resolves them.
    """

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
        # The original uses `relu` here, too. That fails for an activation with parameters, because
        # the sum has four times as many channels.
        self.relu_out = act(out_planes)
        self.shortcut = _projection(in_planes, out_planes, stride, conv, norm)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, in_planes, H, W)` -> `(B, 4 * planes, H / stride, W / stride)`."""
        out = self.conv1(x)
        out = self.norm1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.norm2(out)
        out = self.relu(out)
        out = self.conv3(out)
        out = self.norm3(out)
        return self.relu_out(out + self.shortcut(x))


class ResNet(BaseModel):
    """ResNet for images of 32x32 (`stem="cifar"`) or of about 224x224 (`stem="imagenet"`) pixels.

    The state dict has the keys of the original ConvNorm models. Deviation: the features are
    averaged over the whole image, whatever its size; the original averages 4x4 and takes 32x32
    images only.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        num_blocks: the number of blocks in each of the four stages.
        num_classes: the number of logits.
        stem: first layers: a 3x3 convolution (cifar), or one of 7x7 with stride and pooling
            (imagenet).
        layer_types: the arguments of `BaseModel`.

    Raises:
        ConfigError: `stem` or a layer type is unknown.
    """

    # The names in pytorch-cifar, which TRADES, RobustBench and MadryLab's robustness share.
    other_names: ClassVar = {"bn1": "norm1", "bn2": "norm2", "bn3": "norm3"}

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        num_blocks: tuple[int, int, int, int],
        num_classes: int = 10,
        stem: Literal["cifar", "imagenet"] = "cifar",
        **layer_types: Any,
    ) -> None:
        super().__init__(**layer_types)
        first = lookup(STEMS, stem, "arch.args.stem")
        self.conv1 = self.conv_layer(self.in_channels, 64, bias=False, **first)
        self.norm1 = self.norm_layer(64)
        self.relu = self.activation_layer(64)
        self.maxpool = nn.Identity()
        if stem == "imagenet":
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        layers = (self.conv_layer, self.norm_layer, self.activation_layer)
        width = block.expansion
        self.layer1 = _make_stage(block, num_blocks[0], 64, 64, 1, *layers)
        self.layer2 = _make_stage(block, num_blocks[1], 64 * width, 128, 2, *layers)
        self.layer3 = _make_stage(block, num_blocks[2], 128 * width, 256, 2, *layers)
        self.layer4 = _make_stage(block, num_blocks[3], 256 * width, 512, 2, *layers)
        self.linear = self.linear_layer(512 * width, num_classes)

    def forward_normalized(self, inputs: Tensor) -> Tensor:
        """Logits `(B, num_classes)` of normalized images `(B, C, H, W)`."""
        x = self.conv1(inputs)
        x = self.norm1(x)
        x = self.relu(x)
        x = self.maxpool(x)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        x = F.adaptive_avg_pool2d(x, 1)
        return self.linear(torch.flatten(x, 1))


class PreActBlock(nn.Module):
    """Norm, activation and 3x3 convolution, twice, beside a shortcut.

    Where the shape changes, the shortcut is a 1x1 convolution without a norm.

    Args:
        in_planes: channels of the input.
        planes: channels of both convolutions and of the output.
        stride: of the first convolution and of the shortcut.
        conv, norm, act: constructors of the layers, as `BaseModel` resolves them.
        shortcut_input: input of the 1x1 convolution: relu(bn(x)) (activated) or x itself (raw).
    """

    expansion = 1
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
        # Not in place: where the norm is the identity, it would overwrite the shortcut's input.
        self.relu1 = act(in_planes, inplace=False)
        self.conv1 = conv(in_planes, planes, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = norm(planes)
        self.relu2 = act(planes)
        self.conv2 = conv(planes, planes, kernel_size=3, stride=1, padding=1, bias=False)
        self.shortcut = None
        if stride != 1 or in_planes != planes:
            # A Sequential of one layer, for the key `shortcut.0.weight` of published checkpoints.
            self.shortcut = nn.Sequential(
                conv(in_planes, planes, kernel_size=1, stride=stride, bias=False)
            )

    def forward(self, x: Tensor) -> Tensor:
        """`(B, in_planes, H, W)` -> `(B, planes, H / stride, W / stride)`."""
        activated = self.relu1(self.bn1(x))
        if self.shortcut is None:
            shortcut = x
        elif self.shortcut_input == "raw":
            shortcut = self.shortcut(x)
        else:
            shortcut = self.shortcut(activated)
        out = self.conv1(activated)
        out = self.bn2(out)
        out = self.relu2(out)
        out = self.conv2(out)
        return out + shortcut


class PreActResNet(BaseModel):
    """Pre-activation ResNet-18 in the layout that the literature on adversarial training uses
    (Rice, Wong, Kolter, arXiv:2002.11569): `conv1`, four stages, a last norm `bn` and activation,
    the average, `linear`.

    Published networks of this layout differ in the input of the shortcuts' 1x1 convolutions. A
    checkpoint does not show which one it was trained with, and its weights are useless with the
    other:

    - "activated", `relu(bn(x))`: robust_overfitting (Rice et al., arXiv:2002.11569), AWP (Wu et
      al., arXiv:2004.05884), RobustBench's `PreActBlockV2`; also kuangliu's pytorch-cifar, where
      the layout comes from.
    - "raw", `x`: fast_adversarial (Wong et al., arXiv:2001.03994), GradAlign (Andriushchenko,
      Flammarion, arXiv:2007.02617), RobustBench's `PreActBlock`, which its Wong2020Fast uses.

    GradAlign's network also ends without the last norm and activation: `final_norm=False`.

    Args:
        num_blocks: the number of blocks in each of the four stages.
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
            "as robust_overfitting and AWP have it; --set arch.args.shortcut_input=raw for"
            " fast_adversarial and GradAlign",
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
            problem = not_one_of(shortcut_input, SHORTCUT_INPUTS)
            raise ConfigError(f"arch.args.shortcut_input: {problem}")
        self.conv1 = self.conv_layer(
            self.in_channels, 64, kernel_size=3, stride=1, padding=1, bias=False
        )
        block_args = (self.conv_layer, self.norm_layer, self.activation_layer, shortcut_input)
        self.layer1 = _make_stage(PreActBlock, num_blocks[0], 64, 64, 1, *block_args)
        self.layer2 = _make_stage(PreActBlock, num_blocks[1], 64, 128, 2, *block_args)
        self.layer3 = _make_stage(PreActBlock, num_blocks[2], 128, 256, 2, *block_args)
        self.layer4 = _make_stage(PreActBlock, num_blocks[3], 256, 512, 2, *block_args)
        self.bn = nn.Identity()
        self.relu = nn.Identity()
        if final_norm:
            self.bn = self.norm_layer(512)
            self.relu = self.activation_layer(512)
        self.linear = self.linear_layer(512, num_classes)

    def forward_normalized(self, inputs: Tensor) -> Tensor:
        """Logits `(B, num_classes)` of normalized images `(B, C, H, W)`."""
        x = self.conv1(inputs)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        x = self.bn(x)
        x = self.relu(x)
        x = F.adaptive_avg_pool2d(x, 1)
        return self.linear(torch.flatten(x, 1))


def _make_stage(
    block: type[BasicBlock] | type[Bottleneck] | type[PreActBlock],
    num_blocks: int,
    in_planes: int,
    planes: int,
    stride: int,
    *block_args: Any,
) -> nn.Sequential:
    """The blocks of one width; the first one has the stride and changes the width."""
    blocks = [block(in_planes, planes, stride, *block_args)]
    for _ in range(num_blocks - 1):
        blocks.append(block(block.expansion * planes, planes, 1, *block_args))
    return nn.Sequential(*blocks)


def _projection(
    in_planes: int, planes: int, stride: int, conv: Constructor, norm: Constructor
) -> nn.Sequential:
    """The shortcut: the identity if no shape changes, otherwise a 1x1 convolution and its norm."""
    if stride == 1 and in_planes == planes:
        return nn.Sequential()
    return nn.Sequential(
        conv(in_planes, planes, kernel_size=1, stride=stride, bias=False), norm(planes)
    )
