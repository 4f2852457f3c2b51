"""Which files of a folder are its images: layouts, links and other files."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from base.errors import DataError
from data_loader import ImageFolderDataLoader, LabelNoise
from data_loader.datasets import read_image_folder
from data_loader.folder_scan import IMAGE_TYPES
from tiny_runs import write_images

CLASSES = {"ash": 5, "elm": 7, "fir": 6, "yew": 5}


@pytest.fixture
def trees(tmp_path):
    """Four classes with different numbers of images, in a folder of their own each."""
    folder = tmp_path / "trees"
    write_images(folder / "train", CLASSES)
    write_images(folder / "test", dict.fromkeys(CLASSES, 2))
    return folder


def names(part, folder):
    return [str(Path(path).relative_to(folder)) for path in part.images.paths]


def test_ordinary_folders_are_read_in_torchvisions_order(trees):
    for path in ("b/deep/1.png", "b-/2.png", "B/3.png", "b/0.PNG", "10.png", "9.png"):
        target = trees / "train" / "elm" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((trees / "train" / "elm" / "000.png").read_bytes())
    train, test = read_image_folder(trees, None)
    for part, name in ((train, "train"), (test, "test")):
        theirs = ImageFolder(trees / name)
        assert part.images.paths == tuple(path for path, _ in theirs.samples)
        assert part.labels.tolist() == theirs.targets
        assert part.class_names == tuple(theirs.classes)
    assert (train.validation, train.remarks) == (None, ())


def test_types_of_images_are_torchvisions():
    assert IMAGE_TYPES == IMG_EXTENSIONS


def test_files_that_are_not_images_are_skipped_and_counted_in_one_line(trees):
    before = read_image_folder(trees, None)
    for path in (
        "train/ash/notes.txt", "train/ash/a.csv", "train/elm/b.csv", "train/fir/Makefile",
        "test/yew/movie.gif", "train/ash/.hidden.png", "train/.ipynb_checkpoints/x.png",
        "train/ash/.ipynb_checkpoints/000-checkpoint.png",
        "test/.DS_Store", "test/__MACOSX/ash/._000.png", "train/labels.csv",
    ):  # fmt: skip
        (trees / path).parent.mkdir(parents=True, exist_ok=True)
        (trees / path).write_bytes(b"?")
    os.mkfifo(trees / "test" / "elm" / "pipe.png")
    after = read_image_folder(trees, None)
    for part, same in zip(after, before, strict=True):
        assert part.images.paths == same.images.paths
        assert part.class_names == same.class_names
    (line,) = after[0].remarks
    assert line == (
        "skipped files and folders: 5 of other types (2 '.csv', 1 '.txt', 1 '', 1 '.gif'), "
        "5 hidden, 1 beside the class folders, 1 neither file nor folder"
    )


def test_a_class_of_files_that_are_skipped_has_no_images(trees):
    (trees / "train" / "zelkova" / ".ipynb_checkpoints").mkdir(parents=True)
    (trees / "train" / "zelkova" / "a.gif").touch()
    with pytest.raises(
        DataError, match=r"train/zelkova' has no images; expected files of type \.jpg"
    ):
        read_image_folder(trees, None)


def linked(trees, folder, times):
    """Links to all classes, made by a script that runs several times.

    `ln -s` puts later links into the linked folders.
    """
    for part in ("train", "test"):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for name in CLASSES:
            for _ in range(times):
                place = folder / part / name
                link = place / name if place.exists() else place
                if not link.exists():
                    link.symlink_to(trees / part / name)


@pytest.mark.parametrize("times", [1, 2, 3])
def test_repeated_links_add_no_images(trees, tmp_path, times):
    linked(trees, tmp_path / "links", times)
    train, test = read_image_folder(tmp_path / "links", None)
    assert np.bincount(train.labels).tolist() == list(CLASSES.values())
    assert np.bincount(test.labels).tolist() == [2] * 4
    assert names(train, tmp_path / "links")[:2] == ["train/ash/000.png", "train/ash/001.png"]
    assert train.remarks == (
        () if times == 1 else ("skipped files and folders: 8 repeated through links",)
    )


def test_a_file_under_several_names_of_one_class_is_one_image(trees, tmp_path):
    ash = trees / "train" / "ash"
    (ash / "a_link.png").symlink_to(ash / "001.png")
    (ash / "z_hard.png").hardlink_to(ash / "002.png")
    (ash / "more").symlink_to(trees / "train" / "ash")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "same.png").symlink_to(ash / "003.png")
    (ash / "other").symlink_to(tmp_path / "elsewhere")
    train, _ = read_image_folder(trees, None)
    inodes = [Path(path).stat().st_ino for path in train.images.paths]
    assert len(inodes) == len(set(inodes)) == sum(CLASSES.values())
    assert train.remarks == ("skipped files and folders: 4 repeated through links",)
    loader = ImageFolderDataLoader(trees, validation_split=0.3)
    held_out = set(loader.label_arrays()["val_index"].tolist())
    assert not {inodes[number] for number in held_out} & {
        inodes[number] for number in set(range(len(inodes))) - held_out
    }


@pytest.mark.parametrize("make", ["symlink_to", "hardlink_to"])
@pytest.mark.parametrize(
    ("first", "second"),
    [("train/ash", "train/fir"), ("train/ash", "test/ash"), ("train/elm", "test/yew")],
)
def test_one_file_in_two_classes_or_parts_is_an_error(trees, make, first, second):
    getattr(trees / second / "again.png", make)(trees / first / "001.png")
    with pytest.raises(DataError, match="are one file: an image belongs to one class") as caught:
        read_image_folder(trees, None)
    for path in (f"{first}/001.png", f"{second}/again.png"):
        assert str(trees / path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_test_folder_that_is_the_training_folder_is_an_error(trees):
    for path in sorted((trees / "test").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (trees / "test").rmdir()
    (trees / "test").symlink_to("train")
    with pytest.raises(
        DataError, match=r"train/ash/000\.png' and '.*test/ash/000\.png' are one file"
    ):
        read_image_folder(trees, None)


def test_broken_links_are_named(trees):
    for place in ("train/oak", "train/ash/more", "train/ash/notes.txt", "val"):
        (trees / place).symlink_to("gone")
        with pytest.raises(
            DataError,
            match=rf"data_dir: '{trees / place}' is a broken link to 'gone'$",
        ):
            read_image_folder(trees, None)
        (trees / place).unlink()
    circle = trees / "train" / "circle"
    circle.symlink_to("circle")
    with pytest.raises(DataError, match="circle' is a broken link to 'circle'"):
        read_image_folder(trees, None)
    circle.unlink()
    (trees / "test" / "elm" / "001.png").unlink()
    (trees / "test" / "elm" / "001.png").symlink_to("gone.png")
    _, test = read_image_folder(trees, None)
    with pytest.raises(DataError, match=r"test/elm/001\.png: is a broken link to 'gone\.png'$"):
        test.images.in_memory(torch.device("cpu"))


def test_a_folder_that_cannot_be_read_is_named(trees, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("elm"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="elm' cannot be read: Permission denied"):
        read_image_folder(trees, None)


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_val_beside_train_is_the_test_set(trees, name):
    _, before = read_image_folder(trees, None)
    (trees / "test").rename(trees / name)
    train, test = read_image_folder(trees, None)
    assert [path.replace(f"/{name}/", "/test/") for path in test.images.paths] == list(
        before.images.paths
    )
    assert train.validation is None
    assert train.remarks == (f"no test folder: {name} is the test set",)


@pytest.mark.parametrize("validation_split", [0.0, 0.4])
def test_val_beside_train_and_test_is_the_validation_set(trees, validation_split):
    write_images(trees / "val", dict.fromkeys(CLASSES, 3), (8, 8))
    loader = ImageFolderDataLoader(trees, batch_size=5, validation_split=validation_split)
    assert loader.names_validation
    assert (
        loader.n_samples,
        loader.split_validation().n_samples,
        loader.test_loader().n_samples,
    ) == (23, 12, 8)
    arrays = loader.label_arrays()
    assert arrays["train_index"].tolist() == list(range(23))
    assert arrays["val_index"].tolist() == list(range(23, 35))
    assert arrays["val_clean_label"].tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    own = ImageFolderDataLoader(trees / "val", test_split=0.5)
    assert own.n_samples + own.test_loader().n_samples == 12
    part = torch.cat([images for images, _ in loader.split_validation()])
    expected = (
        read_image_folder(trees, None)[0].validation.images.in_memory(torch.device("cpu")).pixels
    )
    assert torch.equal((part * 255).round().to(torch.uint8), expected)


def test_noise_reaches_a_val_folder_as_it_reaches_held_out_images(trees, tmp_path):
    write_images(trees / "val", dict.fromkeys(CLASSES, 5))
    drawn = ImageFolderDataLoader(trees, noise=LabelNoise("sym", 0.4, "exclusive"))
    arrays = drawn.label_arrays()
    assert np.sum(arrays["val_label"] != arrays["val_clean_label"]) == 8
    np.savez(tmp_path / "labels.npz", **arrays)
    noise = LabelNoise("file", file=str(tmp_path / "labels.npz"))
    read = ImageFolderDataLoader(trees, noise=noise).label_arrays()
    assert np.array_equal(read["train_label"], arrays["train_label"])
    assert np.array_equal(read["val_label"], arrays["val_clean_label"]), "a file speaks of train"


def test_val_must_have_the_classes_of_train(trees):
    write_images(trees / "val", {"ash": 1, "elm": 1, "fir": 1, "plane": 1})
    with pytest.raises(
        DataError, match=r"val' must have the classes of train: only one of them has plane, yew"
    ):
        read_image_folder(trees, None)


@pytest.mark.parametrize(("test_split", "counts"), [(None, [1, 1, 1, 1]), (0.4, [2, 3, 2, 2])])
def test_a_folder_of_classes_is_split_the_same_way_by_every_seed(trees, test_split, counts):
    flat = trees / "train"
    parts = []
    for seed in (0, 1):
        loader = ImageFolderDataLoader(flat, seed=seed, validation_split=0.2, test_split=test_split)
        train, test = read_image_folder(flat, None, test_split=test_split)
        assert loader.test_loader().labels.tolist() == test.labels.tolist()
        parts.append((train.images.paths, test.images.paths))
        assert not set(train.images.paths) & set(test.images.paths)
        assert len(train.images.paths) + len(test.images.paths) == sum(CLASSES.values())
        assert np.bincount(test.labels).tolist() == counts
        assert loader.n_samples + loader.split_validation().n_samples == len(train.labels)
    assert parts[0] == parts[1]
    (remark,) = train.remarks
    assert (
        remark == f"neither train nor test folder: {sum(counts)} of the 23 images are the test set"
    )
    assert [path.split("/")[-2] for path in train.images.paths] == [
        list(CLASSES)[label] for label in train.labels
    ]


def test_a_class_may_be_called_train(trees):
    (trees / "train" / "ash").rename(trees / "train" / "train")
    train, _ = read_image_folder(trees / "train", None)
    assert train.class_names == ("elm", "fir", "train", "yew")


@pytest.mark.parametrize("parts", [("Train", "Test"), ("Training", "VAL", "Testing")])
def test_parts_with_other_names_are_not_classes(trees, parts):
    for name in parts:
        write_images(trees / "named_otherwise" / name, CLASSES)
    with pytest.raises(
        DataError, match=r"which are not classes: call them train and test; expected"
    ):
        read_image_folder(trees / "named_otherwise", None)


def test_folders_without_a_data_set_are_errors_that_name_the_layouts(trees, tmp_path):
    with pytest.raises(
        DataError, match=r"test_split: 0.9 would leave no image of class 0 for training: it has 5"
    ):
        read_image_folder(trees / "train", None, test_split=0.9)
    with pytest.raises(DataError, match=rf"'{tmp_path / 'train'}' is not a folder"):
        read_image_folder(tmp_path, None)
    write_images(tmp_path / "others" / "train", {"a": 1, "b": 1})
    with pytest.raises(
        DataError, match=rf"{tmp_path}' holds a data set in '{tmp_path / 'others'}': use that path"
    ):
        read_image_folder(tmp_path, None)
    with pytest.raises(
        DataError,
        match=r"others/test' is not a folder; expected .*val/ beside train/, or .*/<class>/",
    ):
        read_image_folder(tmp_path / "others", None)


def test_names_of_classes_need_not_be_utf_8(trees):
    (trees / "train" / "ash").rename(trees / "train" / "ash\udcff\n")
    with pytest.raises(DataError, match=r"only one of them has ash, ash\\udcff\\n$"):
        read_image_folder(trees, None)
    (trees / "test" / "ash").rename(trees / "test" / "ash\udcff\n")
    loader = ImageFolderDataLoader(trees, validation_split=0.2, in_memory=False, num_workers=1)
    assert loader.class_names[0] == "ash\udcff\n"
    assert sum(len(labels) for _, labels in loader) == loader.n_samples
