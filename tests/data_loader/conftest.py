"""Folders of images."""

import pytest

from tiny_runs import write_images


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory):
    """Three classes of 20 training and 5 test images, 8 x 8 PNG; tests must not change it."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder / "train", {"ant": 20, "bee": 20, "cow": 20})
    write_images(folder / "test", {"ant": 5, "bee": 5, "cow": 5})
    return folder


@pytest.fixture
def folder(tmp_path):
    """A smaller folder with JPEGs, which tests may break."""
    write_images(tmp_path / "set" / "train", {"ant": 4, "bee": 4}, suffix="jpg")
    write_images(tmp_path / "set" / "test", {"ant": 2, "bee": 2}, suffix="jpg")
    return tmp_path / "set"
