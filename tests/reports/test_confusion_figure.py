"""The figure of a confusion matrix shows its shares, for any number of classes."""

from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from base.output import save_figure
from reports.confusion_figure import confusion_figure


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_every_format(tmp_path, suffix):
    path = tmp_path / "new" / f"confusion.{suffix}"
    save_figure(confusion_figure([[3, 1], [0, 4]], ("cat", "a $dog$"), "a model"), path)
    assert path.read_bytes().startswith(
        {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[suffix]
    )
    # Publishers do not accept the fonts of Type 3 that matplotlib would write
    assert b"/Type3" not in path.read_bytes()


def test_cells_hold_the_shares_of_the_true_class_in_percent():
    axes = confusion_figure(
        [[1, 199, 0], [0, 3, 1], [0, 0, 0]], ("cat", "dog", "frog"), "a model"
    ).axes[0]
    written = {text.get_position()[::-1]: text.get_text() for text in axes.texts}
    assert written == {(0, 0): "<1", (0, 1): "100", (1, 1): "75", (1, 2): "25"}
    assert np.allclose(axes.images[0].get_array(), [[0.5, 99.5, 0], [0, 75, 25], [0, 0, 0]])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog", "frog"]


def test_a_hundred_classes_are_all_named_without_numbers_and_names_do_not_overlap(tmp_path):
    names = [f"class {number}" for number in range(100)]
    figure = confusion_figure(np.eye(100, dtype=int), names, "a model")
    axes = figure.axes[0]
    assert not axes.texts
    figure.savefig(tmp_path / "confusion.png", dpi=100)
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert len(boxes) == 100
    assert all(upper.y0 >= lower.y1 - 1 for upper, lower in pairwise(boxes))
    with Image.open(tmp_path / "confusion.png") as picture:
        assert max(picture.size) < 2000
