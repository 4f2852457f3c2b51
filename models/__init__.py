"""Networks by name: `build_model` turns the config's `arch` into a model."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from base.base_model import BaseModel
from base.config.arguments import arguments_of as constructor_arguments
from base.config.arguments import hands_on
from base.config.config import LAYER_CHOICES, LAYER_TYPES, ArchArgs
from base.errors import ConfigError
from base.registry import MODELS, did_you_mean, lookup
from models import layers as layers  # fills the layer tables that the models resolve their names in
from models.initialization import initialize_he, initialize_he_zero_gn, zero_residual_branches
from models.resnet import BasicBlock, Bottleneck, PreActResNet, ResNet
from models.simple_cnn import SimpleCNN, SimpleCNN2
from models.vgg import VGG
from models.wide_resnet import WideResNet

__all__ = ["MODELS", "build_model"]

_NETWORKS: dict[str, Callable[..., BaseModel]] = {
    "resnet18": partial(ResNet, BasicBlock, (2, 2, 2, 2)),
    "resnet34": partial(ResNet, BasicBlock, (3, 4, 6, 3)),
    "resnet50": partial(ResNet, Bottleneck, (3, 4, 6, 3)),
    "resnet101": partial(ResNet, Bottleneck, (3, 4, 23, 3)),
    "resnet152": partial(ResNet, Bottleneck, (3, 8, 36, 3)),
    "preact_resnet18": partial(PreActResNet, (2, 2, 2, 2)),
    "wide_resnet": WideResNet,
    "wide_resnet34_10": partial(WideResNet, 34, 10),
    "wide_resnet28_10": partial(WideResNet, 28, 10),
    "vgg11": partial(VGG, "vgg11"),
    "vgg13": partial(VGG, "vgg13"),
    "vgg16": partial(VGG, "vgg16"),
    "vgg19": partial(VGG, "vgg19"),
    "simpleCNN": SimpleCNN,
    "simpleCNN2": SimpleCNN2,
}
MODELS.update(_NETWORKS)

INITIALIZATION = ("init", "zero_init_residual")
"""The `arch.args` of every model that its constructor does not take: they say with which weights it
begins."""


def build_model(
    arch: Mapping[str, Any], mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> BaseModel:
    """The network that the config's `arch` describes, with fresh weights.

    Args:
        arch: `{"type": a name in MODELS, "args": {...}}`; an argument that is None counts as not
            given.
        mean: per-channel mean of the data set's pixels, in `[0, 1]`; None for 0.
        std: per-channel standard deviation of the data set's pixels, in `[0, 1]`; None for 1.

    Raises:
        ConfigError: the model, one of its layers or one of its arguments is unknown. Layer types at
            their defaults are not arguments for a network that does not take them.
    """
    name = arch.get("type")
    model = lookup(MODELS, name, "arch.type")
    args = {key: value for key, value in (arch.get("args") or {}).items() if value is not None}
    init, zero_init_residual = (args.pop(key, None) for key in INITIALIZATION)
    known, own = arguments_of(model), constructor_arguments(model)
    # every config names layer types; a network that has none to choose takes none
    defaults = {key: ArchArgs.model_fields[key].default for key in LAYER_TYPES if key not in known}
    args = {
        key: value for key, value in args.items() if key not in defaults or value != defaults[key]
    }
    of_layers = (
        {key for choice in LAYER_CHOICES for key in choice.known_keys()}
        if hands_on(model)
        else set()
    )
    for key in args:
        if key not in known and key not in of_layers:
            takes = ", ".join(known)
            raise ConfigError(
                f"arch.args.{key}: {name} takes no such argument; it takes: {takes}{did_you_mean(key, known)}"
            )
    named = {own[key].name if key in own else key: value for key, value in args.items()}
    pixels = {
        key: value for key, value in (("mean", mean), ("std", std)) if key in own or hands_on(model)
    }
    network = model(**named, **pixels)
    if init == "he":
        initialize_he(network)
    if init == "he_zero_gn":
        initialize_he_zero_gn(network)
    if zero_init_residual:
        zero_residual_branches(network, name)
    return network


def arguments_of(model: Callable[..., BaseModel]) -> list[str]:
    """The `arch.args` that an entry of MODELS takes: its own, those it passes on to `BaseModel`,
    and INITIALIZATION."""
    return [
        *(key for key in constructor_arguments(model) if key not in ("mean", "std")),
        *INITIALIZATION,
    ]
