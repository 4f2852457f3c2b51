"""Wide ResNet.

Sergey Zagoruyko, Nikos Komodakis: "Wide Residual Networks", BMVC 2016, arXiv:1605.07146.
"""

from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from base.base_model import BaseModel
from base.errors import ConfigError
from base.registry import Constructor


class WideBlock(nn.Module):
    """Norm, activation and 3x3 convolution, twice, with dropout in between, beside a shortcut.

    Where the shape changes, the shortcut is a 1x1 convolution of the activated input, without a
    norm.

    Args:
        in_planes: channels of the input.
        planes: channels of both convolutions and of the output.
        stride: of the first convolution and of the shortcut.
        dropout: probability in [0, 1).
        conv, norm, act: constructors of the layers, as `BaseModel` resolves them.
    """

    branch_end = "conv2"

    def __init__(
        self,
        in_planes: int,
        planes: int,
        stride: int,
        dropout: float,
        conv: Constructor,
        norm: Constructor,
        act: Constructor,
    ) -> None:
        super().__init__()
        self.bn1 = norm(in_planes)
        # Not in place: where the norm is the identity, it would overwrite the shortcut's input.
        self.relu1 = act(in_planes, inplace=False)
        self.conv1 = conv(in_planes, planes, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = norm(planes)
        self.relu2 = act(planes)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv(planes, planes, kernel_size=3, stride=1, padding=1, bias=False)
        self.convShortcut = None
        if stride != 1 or in_planes != planes:
            self.convShortcut = conv(
                in_planes, planes, kernel_size=1, stride=stride, padding=0, bias=False
            )

    def forward(self, x: Tensor) -> Tensor:
        """`(B, in_planes, H, W)` -> `(B, planes, H / stride, W / stride)`."""
        activated = self.relu1(self.bn1(x))
        shortcut = x
        if self.convShortcut is not None:
            shortcut = self.convShortcut(activated)
        out = self.conv1(activated)
        out = self.bn2(out)
        out = self.relu2(out)
        out = self.dropout(out)
        out = self.conv2(out)
        return out + shortcut


class WideStage(nn.Module):
    """The blocks of one width; the first one has the stride and changes the width.

    A module and not a plain `nn.Sequential`, for the keys `block1.layer.0...` of published
    checkpoints.
    """

    def __init__(
        self, blocks: int, in_planes: int, planes: int, stride: int, *block_args: Any
    ) -> None:
        super().__init__()
        layers = [WideBlock(in_planes, planes, stride, *block_args)]
        for _ in range(blocks - 1):
            layers.append(WideBlock(planes, planes, 1, *block_args))
        self.layer = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, in_planes, H, W)` -> `(B, planes, H / stride, W / stride)`."""
        return self.layer(x)


class WideResNet(BaseModel):
    """Pre-activation ResNet with three stages of `(depth - 4) / 6` blocks, `16, 32, 64` times
    `widen_factor` channels wide.

    The state dict has the keys that TRADES and RobustBench use. The initial weights are
    PyTorch's; `models.initialization.initialize_he` gives those of TRADES.

    Args:
        depth: the number of layers, `6 n + 4`.
        widen_factor: how much wider than a plain ResNet.
        num_classes: the number of logits.
        dropout: probability in [0, 1) of dropping an activation between a block's two convolutions,
            in training.
        layer_types: the arguments of `BaseModel`.

    Raises:
        ConfigError: `depth` or `dropout` is invalid, or a layer type is unknown.
    """

    # TRADES' code registers another stage like the first one. Its forward pass never calls it, but
    # its checkpoints contain it.
    unused_modules: ClassVar = {"sub_block1": "block1"}

    def __init__(
        self,
        depth: Annotated[int, Field(ge=1, le=10_000)] = 28,
        widen_factor: Annotated[int, Field(ge=1, le=1000)] = 10,
        num_classes: int = 10,
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        **layer_types: Any,
    ) -> None:
        super().__init__(**layer_types)
        if depth < 10 or depth % 6 != 4:
            raise ConfigError(
                f"arch.args.depth: {depth} is not 6 n + 4 with n >= 1 (10, 16, 22, 28, 34, 40 ...)"
            )
        if not 0 <= dropout < 1:
            raise ConfigError(f"arch.args.dropout: {dropout} is not in [0, 1)")
        blocks = (depth - 4) // 6
        widths = [16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
        block_args = (dropout, self.conv_layer, self.norm_layer, self.activation_layer)
        self.conv1 = self.conv_layer(
            self.in_channels, 16, kernel_size=3, stride=1, padding=1, bias=False
        )
        self.block1 = WideStage(blocks, 16, widths[0], 1, *block_args)
        self.block2 = WideStage(blocks, widths[0], widths[1], 2, *block_args)
        self.block3 = WideStage(blocks, widths[1], widths[2], 2, *block_args)
        self.bn1 = self.norm_layer(widths[2])
        self.relu = self.activation_layer(widths[2])
        self.fc = self.linear_layer(widths[2], num_classes)

    def forward_normalized(self, inputs: Tensor) -> Tensor:
        """Logits `(B, num_classes)` of normalized images `(B, C, H, W)`."""
        x = self.conv1(inputs)
        x = self.block1(x)
        x = self.block2(x)
        x = self.block3(x)
        x = self.bn1(x)
        x = self.relu(x)
        x = F.adaptive_avg_pool2d(x, 1)
        return self.fc(torch.flatten(x, 1))
