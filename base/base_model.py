"""BaseModel: the base class of every network."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from base.config.arguments import Choice
from base.config.config import LAYER_CHOICES
from base.errors import ConfigError
from base.registry import Constructor, did_you_mean, lookup


class BaseModel(nn.Module, ABC):
    """A network that maps pixels to logits and is built from four layer types.

    `images` float `(B, C, H, W)` in `[0, 1]` -> `logits` float `(B, num_classes)`. The model
    normalizes the pixels itself, `(images - mean) / std` per channel, so nothing outside of it
    needs mean or std.

    The constructor resolves the four names into `conv_layer`, `norm_layer`, `linear_layer` and
    `activation_layer`; blocks receive these constructors, never names.

    Args:
        norm_layer_type: a name in `base.registry.NORM_LAYERS`.
        conv_layer_type: a name in `base.registry.CONV_LAYERS`.
        linear_layer_type: a name in `base.registry.LINEAR_LAYERS`.
        activation_layer_type: a name in `base.registry.ACTIVATION_LAYERS`.
        in_channels: C, the number of channels of the images.
        mean: per-channel mean of the data set's pixels, in `[0, 1]`; None for 0.
        std: per-channel standard deviation of the data set's pixels, in `[0, 1]`; None for 1.
        layer_arguments: the layers' own arguments under their config keys, such as `norm_groups` of
            "gn". Each is passed to those of the chosen layers that take it. An argument that only
            other layers take has no effect.

    Raises:
        ConfigError: a name is not in its table, no layer takes an argument, or `mean` or
            `std` does not have one value per channel.
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
        in_channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **layer_arguments: Any,
    ) -> None:
        super().__init__()
        # In the order of LAYER_CHOICES
        names = (norm_layer_type, conv_layer_type, linear_layer_type, activation_layer_type)
        self.norm_layer, self.conv_layer, self.linear_layer, self.activation_layer = (
            _layer(choice, name, layer_arguments)
            for choice, name in zip(LAYER_CHOICES, names, strict=True)
        )
        known = {key for choice in LAYER_CHOICES for key in choice.known_keys()}
        for key in layer_arguments:
            if key not in known:
                raise ConfigError(
                    f"arch.args.{key}: not an argument of any layer{did_you_mean(key, known)}"
                )
        self.in_channels = in_channels
        # Not persistent: the keys of the state dict stay those of the original ConvNorm models
        self.register_buffer("mean", _per_channel("mean", mean, 0.0, in_channels), persistent=False)
        self.register_buffer("std", _per_channel("std", std, 1.0, in_channels), persistent=False)

    def normalize(self, images: Tensor) -> Tensor:
        """Return `(images - mean) / std`. Images are normalized nowhere else in the project."""
        return (images - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `(B, num_classes)` of `images` `(B, C, H, W)` in `[0, 1]`."""
        return self.forward_normalized(self.normalize(images))

    @abstractmethod
    def forward_normalized(self, inputs: Tensor) -> Tensor:
        """Return logits `(B, num_classes)` of normalized images `(B, C, H, W)`."""

    def num_parameters(self) -> int:
        """Return the number of trainable parameters."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)


def _layer(choice: Choice, name: str, arguments: Mapping[str, Any]) -> Constructor:
    """Return the constructor of a layer type, with those of the arguments that it takes."""
    constructor = lookup(choice.table, name, choice.key)
    taken = {
        argument.name: arguments[key]
        for key, argument in choice.arguments(name).items()
        if arguments.get(key) is not None
    }
    if not taken:
        return constructor
    return partial(constructor, **taken)


def _per_channel(
    name: str, values: Sequence[float] | None, default: float, channels: int
) -> Tensor:
    """Return `values`, or `default` for every channel, as float32 `(1, C, 1, 1)`."""
    if values is None:
        values = [default] * channels
    if len(values) != channels:
        raise ConfigError(
            f"data_loader.args.{name}: {len(values)} values for images of {channels} channels"
        )
    return torch.tensor(list(values), dtype=torch.float32).reshape(1, -1, 1, 1)
