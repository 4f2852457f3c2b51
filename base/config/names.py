"""The names that a config may use for what an epoch logs."""

from base.registry import METRICS

PREFIXES = ("val_clean_", "val_ema_", "val_")
ALWAYS = ("top1", "top5")
"""Metrics that are logged whatever the config asks for."""


def metric_name(name: str) -> str:
    """The name under which a metric is logged: the first of those that its function has in
    `METRICS`."""
    function = METRICS.get(name)
    return next((other for other in METRICS if METRICS[other] is function), name)


def logged_value(name: str) -> str | None:
    """The canonical name of a value that epochs can log, such as `val_top1` for ConvNorm's
    `val_my_metric`; None if unknown."""
    prefix, rest = _parts(name)
    if rest == "loss" or (rest == "robust_top1" and prefix in ("val_", "val_ema_")):
        return name
    return prefix + metric_name(rest) if rest in METRICS else None


def metric_of(value: str) -> str | None:
    """The metric that a logged value is of; None for losses and robust accuracy."""
    _, rest = _parts(value)
    return None if rest in ("loss", "robust_top1") else rest


def logged_values() -> str:
    """What epochs can log, in words."""
    metrics = dict.fromkeys(map(metric_name, METRICS))
    return (
        f"loss, {', '.join(metrics)}, alone or after val_, val_clean_ or val_ema_, and val_robust_top1, val_ema_robust_top1"
        " (never the test set)"
    )


def _parts(name: str) -> tuple[str, str]:
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
    return prefix, name.removeprefix(prefix)
