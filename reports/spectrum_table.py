"""The spectra of a network's layers as a table and one line."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from reports.text_table import text_table

HEADS = ("layer", "input", "norm", "residual", "mean s^2", "error", "spread", "batch norm")


def spectrum_table(layers: Sequence[Mapping[str, Any]]) -> str:
    """A line per layer, in depth order; `layers` as in `evaluation.NetworkSpectra.as_dict()`.

    A `!` behind a residual says that the power iteration stopped before its tolerance.
    """
    return text_table(HEADS, [_row(layer) for layer in layers])


def spectrum_summary(values: Mapping[str, Any]) -> str:
    """The report in one line."""
    layers = values["layers"]
    norms = [layer["norm"] for layer in layers]
    errors, spreads = (
        [layer[key] for layer in layers] for key in ("orthogonality_error", "spread")
    )
    unfinished = sum(not layer["converged"] for layer in layers)
    return (
        f"{len(layers)} layers: spectral norm {min(norms):.4g} to {max(norms):.4g}, median {median(norms):.4g};"
        f" orthogonality error, median {median(errors):.4g}, up to a scale {median(spreads):.4g};"
        f" product of spectral norms {_power(values['log10_product_of_norms'])},"
        f" with batch norms {_power(values['log10_product_with_batch_norms'])}"
        + (f"; {unfinished} norms not to the tolerance" if unfinished else "")
    )


def _row(layer: Mapping[str, Any]) -> list[str]:
    return [
        layer["name"],
        "x".join(map(str, layer["input_shape"])),
        _number(layer["norm"]),
        f"{layer['residual']:.0e}" + ("" if layer["converged"] else " !"),
        *(
            _number(layer[key])
            for key in ("mean_square", "orthogonality_error", "spread", "batch_norm_scale")
        ),
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _power(log10: float | None) -> str:
    return "0" if log10 is None else f"10^{log10:.2f}"
