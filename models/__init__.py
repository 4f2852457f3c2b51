"""Networks by name: `build_model` turns the config's `arch` into a model."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from base.base_model import BaseModel
from base.config.arguments import accepts_any_keyword, arguments_of
from base.config.config import LAYER_CHOICES, LAYER_TYPES, ArchArgs
from base.errors import ConfigError
from base.registry import MODELS, did_you_mean, lookup

# Importing the layers fills the tables in which the models look up layer types.
from models import layers as layers
from models.initialization import initialize_he, initialize_he_zero_gn, zero_residual_branches
from models.resnet import BasicBlock, Bottleneck, PreActResNet, ResNet
from models.simple_cnn import SimpleCNN, SimpleCNN2
from models.vgg import VGG
from models.wide_resnet import WideResNet

__all__ = ["MODELS", "build_model", "model_arguments"]

MODELS.update(
    {
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
)

INITIALIZATION = ("init", "zero_init_residual")
"""The `arch.args` that choose the initial weights: every model has them, and no constructor takes
them.
"""


def build_model(
    arch: Mapping[str, Any], mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> BaseModel:
    """Build the network that the config's `arch` describes, with initial weights.

    Args:
        arch: `{"type": a name in MODELS, "args": {...}}`. Arguments that are None are left out, and
            so are layer types at their defaults for a network that does not take them.
        mean: per-channel mean of the data set's pixels, in `[0, 1]`; None for 0.
        std: per-channel standard deviation of the data set's pixels, in `[0, 1]`; None for 1.

    Raises:
        ConfigError: the model, one of its layers or one of its arguments is unknown, or the network
            is not a `BaseModel`.
    """
    name = arch.get("type")
    model = lookup(MODELS, name, "arch.type")
    args = {key: value for key, value in (arch.get("args") or {}).items() if value is not None}
    init = args.pop("init", None)
    zero_init_residual = args.pop("zero_init_residual", None)
    args = _check_arguments(model, name, args)
    own = arguments_of(model)
    # A network gets those of the project's arguments that it takes (see `base.registry.MODELS`).
    for key, value in (("mean", mean), ("std", std)):
        if key in own or accepts_any_keyword(model):
            args[key] = value
    # A config may use other names than the constructor, as for layers (`config_names`).
    network = model(**{own[key].name if key in own else key: args[key] for key in args})
    if not isinstance(network, BaseModel):
        raise ConfigError(
            f"arch.type: {name} makes a {type(network).__name__}, which is not a"
            " base.base_model.BaseModel; see docs/extending.md"
        )
    if init == "he":
        initialize_he(network)
    if init == "he_zero_gn":
        initialize_he_zero_gn(network)
    if zero_init_residual:
        zero_residual_branches(network, name)
    return network


def model_arguments(model: Callable[..., BaseModel]) -> list[str]:
    """The `arch.args` that an entry of MODELS takes: its own, those that it passes on to
    `BaseModel`, and INITIALIZATION.
    """
    own = [key for key in arguments_of(model) if key not in ("mean", "std")]
    return [*own, *INITIALIZATION]


def _check_arguments(
    model: Callable[..., BaseModel], name: str, args: dict[str, Any]
) -> dict[str, Any]:
    """The arguments without the default layer types that the constructor does not take.

    Raises:
        ConfigError: an argument is unknown.
    """
    known = model_arguments(model)
    # Every config names layer types, so their defaults are dropped where a network has no choice.
    defaults = {key: ArchArgs.model_fields[key].default for key in LAYER_TYPES if key not in known}
    args = {
        key: value for key, value in args.items() if key not in defaults or value != defaults[key]
    }
    of_layers: set[str] = set()
    if accepts_any_keyword(model):
        of_layers = {key for choice in LAYER_CHOICES for key in choice.known_keys()}
    for key in args:
        if key not in known and key not in of_layers:
            raise ConfigError(
                f"arch.args.{key}: {name} takes no such argument; it takes: {', '.join(known)}"
                f"{did_you_mean(key, known)}"
            )
    return args
