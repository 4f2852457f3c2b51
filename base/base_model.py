"""BaseModel: what every network of this project is."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from base.errors import ConfigError
from base.registry import ACTIVATION_LAYERS, CONV_LAYERS, LINEAR_LAYERS, NORM_LAYERS, lookup


class BaseModel(nn.Module, ABC):
    """A network that maps pixels to logits and is built from four layer types.

    `images` float `(B, C, H, W)` in `[0, 1]` -> `logits` float `(B, num_classes)`. The model normalises the pixels itself,
    `(images - mean) / std` per channel, so nothing outside it ever sees a mean or a std. Both are non-persistent buffers: they
    follow the model to a device but are no part of its state dict, whose keys stay those of the original ConvNorm models.

    The four names are resolved once, here, into `conv_layer`, `norm_layer`, `linear_layer` and `activation_layer`; blocks
    receive these constructors, never names.

    Args:
        norm_layer_type: a name in `base.registry.NORM_LAYERS`.
        conv_layer_type: a name in `base.registry.CONV_LAYERS`.
        linear_layer_type: a name in `base.registry.LINEAR_LAYERS`.
        activation_layer_type: a name in `base.registry.ACTIVATION_LAYERS`.
        oni_rule: of "oni_conv", where a layer has more output channels than inputs: "paper" (the
            default) or "original", as checkpoints of the original ConvNorm need it; see
            `models.layers.oni`.
        norm_groups: groups of a group normalisation; other norms ignore it.
        in_channels: C, the channels of the images, which the first convolution takes.
        mean: per-channel mean of the data set's pixels, in `[0, 1]`; None for 0.
        std: per-channel standard deviation of the data set's pixels, in `[0, 1]`; None for 1.

    Raises:
        ConfigError: a name is not in its table, `oni_rule` is given for other convolutions, or
            `mean` or `std` has not one value per channel.
    """

    in_channels: int
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        norm_layer_type: str = "bn",
        conv_layer_type: str = "conv",
        linear_layer_type: str = "linear",
        activation_layer_type: str = "relu",
        *,
        oni_rule: str | None = None,
        norm_groups: int = 32,
        in_channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.conv_layer = lookup(CONV_LAYERS, conv_layer_type, "arch.args.conv_layer_type")
        if oni_rule is not None:
            if conv_layer_type != "oni_conv":
                raise ConfigError(
                    f"arch.args.oni_rule: only oni_conv takes it, not {conv_layer_type}"
                )
            self.conv_layer = partial(self.conv_layer, rule=oni_rule)
        self.norm_layer = partial(lookup(NORM_LAYERS, norm_layer_type, "arch.args.norm_layer_type"), norm_groups=norm_groups)
        self.linear_layer = lookup(LINEAR_LAYERS, linear_layer_type, "arch.args.linear_layer_type")
        self.activation_layer = lookup(ACTIVATION_LAYERS, activation_layer_type, "arch.args.activation_layer_type")
        self.in_channels = in_channels
        self.register_buffer("mean", _per_channel("mean", mean, 0.0, in_channels), persistent=False)
        self.register_buffer("std", _per_channel("std", std, 1.0, in_channels), persistent=False)

    def normalize(self, images: Tensor) -> Tensor:
        """`(images - mean) / std`, the only place in the project where images are normalised."""
        return (images - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(B, num_classes)` of `images` `(B, C, H, W)` in `[0, 1]`."""
        return self.forward_normalized(self.normalize(images))

    @abstractmethod
    def forward_normalized(self, inputs: Tensor) -> Tensor:
        """Logits of inputs that are already normalised."""

    def num_parameters(self) -> int:
        """The number of trainable parameters."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)


def _per_channel(
    name: str, values: Sequence[float] | None, default: float, channels: int
) -> Tensor:
    """`values`, or `default` for every channel, as float32 `(1, C, 1, 1)`."""
    numbers = [default] * channels if values is None else list(values)
    if len(numbers) != channels:
        raise ConfigError(
            f"data_loader.args.{name}: {len(numbers)} values for images of {channels} channels"
        )
    return torch.tensor(numbers, dtype=torch.float32).reshape(1, -1, 1, 1)
