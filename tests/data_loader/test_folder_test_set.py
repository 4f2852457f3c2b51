"""The test images of a folder that no config describes, in every layout."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from base.errors import DataError
from data_loader.datasets import read_cifar
from data_loader.folder_test_set import read_test_images, unshuffled_loader, with_channels
from tiny_runs import write_images

CLASSES = {"cat": 2, "dog": 3}
LAYOUTS = {
    "test": (["test"], "test"),
    "train and test": (["train", "val", "test"], "test"),
    "as ImageNet": (["train", "valid"], "valid"),
    "classes alone": ([""], ""),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_test_images_of_each_layout_are_found(tmp_path, layout):
    parts, taken = LAYOUTS[layout]
    for part in parts:
        write_images(tmp_path / part, CLASSES)
    found = read_test_images(tmp_path)
    assert found.class_names == ("cat", "dog")
    assert found.labels.tolist() == [0, 0, 1, 1, 1], "all of them: nothing is split off"
    assert found.images.shape == (3, 8, 8)
    assert {Path(path).parents[1] for path in found.images.paths} == {tmp_path / taken}
    below = tuple(str(Path(path).relative_to(tmp_path)) for path in found.images.paths)
    assert found.images.names == below, "named by their paths below the folder"


def test_a_class_may_be_called_test(tmp_path):
    write_images(tmp_path, {"exam": 1, "test": 2})
    assert read_test_images(tmp_path).class_names == ("exam", "test")


@pytest.mark.parametrize("place", ["", "cifar-10-batches-py"])
def test_cifars_own_files_are_read(fake_cifar, no_network, place):
    data = read_cifar(10, fake_cifar, train=True)  # unpacks the archive
    found = read_test_images(fake_cifar / place)
    assert found.class_names == data.class_names
    assert len(found.labels) == 10
    with pytest.raises(DataError, match="images are 32x32, not 16x16"):
        read_test_images(fake_cifar, 16)
    read_cifar(100, fake_cifar, train=True)
    with pytest.raises(DataError, match="holds cifar-10-batches-py and cifar-100-python: name one"):
        read_test_images(fake_cifar)


def test_gray_files_have_one_channel_or_as_many_as_requested(tmp_path):
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / name / "a.png")
    found = read_test_images(tmp_path)
    assert found.images.shape == (1, 8, 8)
    images, labels = next(iter(unshuffled_loader(found, torch.device("cpu"))))
    assert torch.equal(images, torch.from_numpy(pixels / 255).float().expand(2, 1, 8, 8))
    assert labels.tolist() == [0, 1]
    images, _ = next(iter(unshuffled_loader(with_channels(found, 3), torch.device("cpu"))))
    assert torch.equal(images, torch.from_numpy(pixels / 255).float().expand(2, 3, 8, 8))
    assert read_test_images(tmp_path, 4).images.shape == (1, 4, 4)


def test_other_folders_are_errors(tmp_path):
    with pytest.raises(DataError, match="is not a folder"):
        read_test_images(tmp_path / "nowhere")
    write_images(tmp_path / "train", CLASSES)
    with pytest.raises(
        DataError, match=r"holds train, which are not classes: expected .*/test/<class>/"
    ):
        read_test_images(tmp_path)
