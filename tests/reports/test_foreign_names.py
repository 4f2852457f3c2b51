"""Names that others have chosen reach pictures and printed tables as one line without control
characters."""

import xml.etree.ElementTree as ElementTree

import pytest
import torch

from base.output import save_figure
from evaluation.class_scores import class_scores
from evaluation.figures import draw_epsilon_curve, draw_examples
from reports.class_table import class_table
from reports.confusion_figure import confusion_figure
from reports.curves import curves_figure
from reports.groups import group_runs
from reports.runs import find_runs
from reports.spectrum_figure import spectrum_figure
from reports.spectrum_table import spectrum_table

HOSTILE = "a\x00\x1b[2J\n\u202eb\udcff"
SHOWN = r"a\x00\x1b[2J\n\u202eb\udcff"
LAYER = {
    "name": HOSTILE,
    "input_shape": (1, 2, 2),
    "norm": 1.0,
    "residual": 0.0,
    "converged": True,
    "mean_square": 1.0,
    "orthogonality_error": 0.1,
    "spread": 0.1,
    "standard_errors": None,
    "batch_norm_scale": None,
}


def texts(path):
    """All texts of a picture whose letters are texts, which is read as XML."""
    elements = ElementTree.parse(path).iter()  # noqa: S314
    return ["".join(element.itertext()) for element in elements if element.tag.endswith("text")]


@pytest.fixture(autouse=True)
def _letters_as_texts(monkeypatch):
    from matplotlib import rcParams

    monkeypatch.setitem(rcParams, "svg.fonttype", "none")


@pytest.mark.filterwarnings("ignore:Glyph")
def test_pictures(tmp_path, make_run):
    images = torch.rand(2, 3, 8, 8)
    names = (HOSTILE, "dog")
    confusion = confusion_figure([[3, 1], [0, 4]], names, HOSTILE)
    save_figure(confusion, tmp_path / "confusion.svg")
    save_figure(spectrum_figure([LAYER], HOSTILE), tmp_path / "spectrum.svg")
    draw_examples(tmp_path / "examples.svg", images, images, [0, 1], [1, 0], [0, 1], names, HOSTILE)
    draw_epsilon_curve(
        tmp_path / "epsilon.svg", [(0.0, 0.9), (0.1, 0.2)], "l2", 0.9, 0.1, 0.1, HOSTILE
    )
    make_run("a", {HOSTILE[:-1]: [0.5, 0.6]}, trainer={"label_dir": "b\x1b\nc"})
    groups = group_runs(find_runs([tmp_path]), ["trainer.label_dir"])
    save_figure(curves_figure(groups, [HOSTILE[:-1]]), tmp_path / "curves.svg")
    for name in ("confusion", "spectrum", "epsilon"):
        assert SHOWN in texts(tmp_path / f"{name}.svg"), name
    assert texts(tmp_path / "confusion.svg").count(SHOWN) == 3
    assert f"✓ {SHOWN[:14]}…" in texts(tmp_path / "examples.svg")
    shown = texts(tmp_path / "curves.svg")
    assert SHOWN.removesuffix(r"\udcff") in shown
    assert r"b\x1b\nc  (n = 1)" in shown


def test_printed_tables():
    labels = torch.tensor([0, 0, 1]).numpy()
    table = class_table(class_scores(labels, 1 - labels, [HOSTILE, "dog"]).as_dict())
    assert len(table.splitlines()) == 5
    for text in (table, spectrum_table([LAYER])):
        assert SHOWN in text
        assert all(character.isprintable() or character == "\n" for character in text)


@pytest.mark.parametrize(("name", "lines"), [("\u732b\u72ac", 1), ("\U0001f431 $x^2$", 0)])
@pytest.mark.filterwarnings("error")
def test_letters_that_the_font_lacks_are_reported_in_one_line(tmp_path, caplog, name, lines):
    figure = confusion_figure([[3, 1], [0, 4]], (name, name[::-1]), name)
    save_figure(figure, tmp_path / "confusion.png")
    assert caplog.text.count("the font lacks letters") == len(caplog.records) == lines
