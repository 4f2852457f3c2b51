"""Pictures have the given format and say what they show."""

import pytest
import torch
from PIL import Image

from base.errors import ConfigError
from evaluation.figures import draw_epsilon_curve, draw_examples, epsilon_figure

CURVE = [(0.0, 0.9), (4 / 255, 0.6), (8 / 255, 0.4), (0.5, 0.0)]


def draw(path):
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 0])
    draw_examples(
        path, images, (images + 0.03).clamp(0, 1), labels, 1 - labels, labels, ("cat", "dog"), "PGD"
    )


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_every_format(tmp_path, suffix):
    draw(tmp_path / "new" / f"examples.{suffix}")
    draw_epsilon_curve(tmp_path / f"curve.{suffix}", CURVE, "linf", 0.9, 0.1, 8 / 255, "a model")
    for path in (tmp_path / "new" / f"examples.{suffix}", tmp_path / f"curve.{suffix}"):
        start = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[suffix]
        assert path.read_bytes().startswith(start)
        if suffix == "png":
            with Image.open(path) as picture:
                width, height = picture.size
            assert 300 < width < 3000
            assert 200 < height < 3000


def test_the_curve_says_what_it_shows():
    axes = epsilon_figure(CURVE, "linf", 0.9, 0.1, 8 / 255, "a model").axes[0]
    words = " ".join(text.get_text() for text in axes.get_legend().get_texts())
    for expected in ("clean: 90.0 %", "chance: 10.0 %", "8/255: 40.0 %"):
        assert expected in words
    assert "1/255" in axes.get_xlabel()


def test_other_formats_are_rejected(tmp_path):
    with pytest.raises(
        ConfigError, match="not a format of pictures; expected one of: png, pdf, svg"
    ):
        draw(tmp_path / "a.bmp")
