"""The picture and the table of a network's layers show every layer's numbers."""

import pytest

from base.output import save_figure
from reports.spectrum_figure import spectrum_figure
from reports.spectrum_table import spectrum_summary, spectrum_table


def layer(name, norm, scale=None, **others):
    found = {
        "residual": 5e-4,
        "converged": True,
        "mean_square": 0.5,
        "orthogonality_error": 0.25,
        "spread": 0.0,
        "standard_errors": None,
    }
    return {
        "name": name,
        "input_shape": [3, 8, 8],
        "norm": norm,
        "batch_norm_scale": scale,
        **found,
        **others,
    }


ERRORS = {"mean_square": 0.01, "orthogonality_error": 0.0123, "spread": 0.02}
LAYERS = [
    layer("conv1", 2.0),
    layer("conv1.bpconv", 4.0, 3.0),
    layer("$fc$", 0.5, residual=0.02, converged=False, standard_errors=ERRORS),
]


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_every_format(tmp_path, suffix):
    path = tmp_path / "new" / f"spectrum.{suffix}"
    save_figure(spectrum_figure(LAYERS, "a model"), path)
    assert path.read_bytes().startswith(
        {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[suffix]
    )
    # Publishers do not accept the fonts of Type 3 that matplotlib would write
    assert b"/Type3" not in path.read_bytes()


def test_the_picture_shows_norms_with_and_without_batch_norm_in_depth_order():
    upper, lower = spectrum_figure(LAYERS, "a model").axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in upper.lines}
    assert drawn["spectral norm"] == [[0, 2], [2, 0.5]]
    assert drawn["spectral norm, bpconv"] == [[1, 4]]
    assert drawn["times the scale of its batch norm, bpconv"] == [[1, 12]]
    assert {line.get_label() for line in lower.lines} == {
        f"{kind}{part}"
        for kind in ("distance from orthogonal", "from a multiple of orthogonal")
        for part in ("", ", bpconv")
    }
    assert [label.get_text() for label in lower.get_xticklabels()] == ["conv1", "bpconv", "$fc$"]


def test_more_layers_than_names_that_fit():
    lower = spectrum_figure([layer(f"conv{number}", 1.0) for number in range(400)], "a model").axes[
        1
    ]
    assert [label.get_text() for label in lower.get_xticklabels()][:2] == ["conv0", "conv3"]


def test_the_table_and_its_last_line():
    lines = spectrum_table(LAYERS).splitlines()
    assert lines[0].split() == [
        "layer",
        "input",
        "norm",
        "residual",
        "mean",
        "s^2",
        "error",
        "spread",
        "batch",
        "norm",
    ]
    assert lines[2].split() == [
        "conv1.bpconv",
        "3x8x8",
        "4.000",
        "5e-04",
        "0.500",
        "0.250",
        "0.000",
        "3.000",
    ]
    assert lines[3].split() == [
        "$fc$",
        "3x8x8",
        "0.500",
        "2e-02",
        "!",
        "~0.500",
        "~0.250",
        "~0.000",
        "-",
    ]
    assert len({len(line) for line in lines}) == 1
    values = {
        "layers": LAYERS,
        "log10_product_of_norms": 0.602,
        "log10_product_with_batch_norms": None,
    }
    assert spectrum_summary(values) == (
        "3 layers: spectral norm 0.5 to 4, median 2;"
        " orthogonality error, median 0.25, up to a scale 0;"
        " product of spectral norms 10^0.60, with batch norms 0;"
        " ~ estimated, the error with a standard error of up to 0.012; 1 norms not to the tolerance"
    )
