"""The names by which a config may refer to the values that an epoch logs."""

from base.registry import METRICS

# val_ last, because the others begin with it
PREFIXES = ("val_clean_", "val_ema_", "val_")
ALWAYS = ("top1", "top5")
"""Metrics that are logged even if the config does not ask for them."""


def metric_name(name: str) -> str:
    """Return the name under which a metric is logged."""
    # ConvNorm's my_metric and top1 are one function; its first name in the table is canonical
    function = METRICS.get(name)
    return next((other for other in METRICS if METRICS[other] is function), name)


def logged_value(name: str) -> str | None:
    """Return the canonical name of a value that epochs can log; None if it is unknown.

    ConvNorm's `val_my_metric` becomes `val_top1`.
    """
    prefix, rest = _split(name)
    if rest == "loss":
        return name
    # Robust accuracy is measured in validation only, and not a second time against clean labels
    if rest == "robust_top1" and prefix in ("val_", "val_ema_"):
        return name
    if rest in METRICS:
        return prefix + metric_name(rest)
    return None


def metric_of(value: str) -> str | None:
    """Return the metric of a logged value; None for losses and robust accuracy."""
    _, rest = _split(value)
    return None if rest in ("loss", "robust_top1") else rest


def describe_logged_values() -> str:
    """Return a list of everything that epochs can log, for messages."""
    metrics = ", ".join(dict.fromkeys(map(metric_name, METRICS)))
    return (
        f"loss, {metrics}, alone or after val_, val_clean_ or val_ema_,"
        " and val_robust_top1, val_ema_robust_top1 (never the test set)"
    )


def _split(name: str) -> tuple[str, str]:
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return prefix, name.removeprefix(prefix)
    return "", name
