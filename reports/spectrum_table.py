"""Spectra of a network's layers as text: a table, and a summary of one line."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, TypedDict

from base.text import text_table


class LayerRow(TypedDict):
    """The spectrum of one layer; see `evaluation.spectral_norm.Spectrum`."""

    name: str
    input_shape: Sequence[int]
    norm: float
    residual: float
    converged: bool
    mean_square: float
    orthogonality_error: float
    spread: float
    standard_errors: Mapping[str, float] | None
    batch_norm_scale: float | None


HEADS = ("layer", "input", "norm", "residual", "mean s^2", "error", "spread", "batch norm")


def spectrum_table(layers: Sequence[LayerRow]) -> str:
    """Write a line per layer, in depth order.

    A `!` behind a residual says that the power iteration stopped before it reached its tolerance, a
    `~` before a number that it is estimated from random vectors.

    Args:
        layers: as in `evaluation.NetworkSpectra.as_dict()`.
    """
    return text_table(HEADS, [_row(layer) for layer in layers])


def spectrum_summary(values: Mapping[str, Any]) -> str:
    """Write the spectra in one line."""
    layers: list[LayerRow] = values["layers"]
    norms = [layer["norm"] for layer in layers]
    errors = [layer["orthogonality_error"] for layer in layers]
    spreads = [layer["spread"] for layer in layers]
    summary = (
        f"{len(layers)} layers: spectral norm {min(norms):.4g} to {max(norms):.4g},"
        f" median {median(norms):.4g};"
        f" orthogonality error, median {median(errors):.4g}, up to a scale {median(spreads):.4g};"
        f" product of spectral norms {_power(values['log10_product_of_norms'])},"
        f" with batch norms {_power(values['log10_product_with_batch_norms'])}"
    )
    standard_errors = [
        layer["standard_errors"]["orthogonality_error"]
        for layer in layers
        if layer["standard_errors"] is not None
    ]
    if standard_errors:
        largest = max(standard_errors)
        summary += f"; ~ estimated, the error with a standard error of up to {largest:.2g}"
    unfinished = sum(not layer["converged"] for layer in layers)
    if unfinished:
        summary += f"; {unfinished} norms not to the tolerance"
    return summary


def _row(layer: LayerRow) -> list[str]:
    residual = f"{layer['residual']:.0e}"
    if not layer["converged"]:
        residual += " !"
    mark = "" if layer["standard_errors"] is None else "~"
    return [
        layer["name"],
        "x".join(map(str, layer["input_shape"])),
        _number(layer["norm"]),
        residual,
        mark + _number(layer["mean_square"]),
        mark + _number(layer["orthogonality_error"]),
        mark + _number(layer["spread"]),
        _number(layer["batch_norm_scale"]),
    ]


def _number(value: float | None) -> str:
    # None: no batch norm follows the layer
    if value is None:
        return "-"
    return f"{value:.3f}"


def _power(log10: float | None) -> str:
    # The product of the norms of a deep network overflows, so its logarithm is stored. It is None
    # for a product of zero.
    if log10 is None:
        return "0"
    return f"10^{log10:.2f}"
