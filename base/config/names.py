"""The names a config can choose from. What they stand for lies in tables in other rooms, which a test holds equal to these."""

from typing import Literal

ArchName = Literal[
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "preact_resnet18",
    "wide_resnet", "wide_resnet28_10", "wide_resnet34_10", "vgg11", "vgg13", "vgg16", "vgg19", "simpleCNN", "simpleCNN2",
]  # fmt: skip
ConvName = Literal["conv", "prec_conv", "conv_norm", "sn_conv", "oni_conv", "own_conv"]
CONV_NORM = ("prec_conv", "conv_norm")
"""Convolutions that normalize what they put out, so that no norm layer is needed behind them."""
WEIGHTS_NORMALIZED = ("sn_conv", "oni_conv", "own_conv")
"""Convolutions that normalize their weights: with and without a norm layer behind them they are in use."""
NormName = Literal["bn", "gn", "in", "no"]
ActivationName = Literal["relu", "srelu"]
DataLoaderName = Literal["CIFAR10DataLoader", "CIFAR100DataLoader", "ImageFolderDataLoader", "DigitsDataLoader"]
MetricName = Literal["top1", "top5", "my_metric", "my_metric2"]
METRIC_ALIASES = {"my_metric": "top1", "my_metric2": "top5"}

LOGGED_VALUES = (
    "loss, top1, top5, alone or after val_, val_clean_ or val_ema_, and val_robust_top1, val_ema_robust_top1"
    " (never the test set)"
)


def logged_value(name: str) -> str | None:
    """The canonical name of a value that epochs log, such as `val_top1` for ConvNorm's `val_my_metric`; None if unknown."""
    prefix = next((prefix for prefix in ("val_clean_", "val_ema_", "val_") if name.startswith(prefix)), "")
    rest = name.removeprefix(prefix)
    rest = METRIC_ALIASES.get(rest, rest)
    known = ("loss", "top1", "top5", "robust_top1") if prefix in ("val_", "val_ema_") else ("loss", "top1", "top5")
    return prefix + rest if rest in known else None
