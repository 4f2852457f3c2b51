"""The test images of a folder that no config describes: folders of classes, or CIFAR's own
files."""

from dataclasses import replace
from math import prod
from pathlib import Path

import torch
from PIL import Image

from base.errors import DataError
from data_loader.data_loaders import MEMORY_LIMIT
from data_loader.datasets import PART_NAMES, VALIDATION_FOLDERS, LabeledImages, read_cifar
from data_loader.decoding import image_size
from data_loader.folder_scan import KEY, FolderScan, check_link, class_folders
from data_loader.image_data_loader import ImageDataLoader
from data_loader.images import FileImages
from data_loader.training_data_loader import EVALUATION_BATCH

CIFAR_FOLDERS = {"cifar-10-batches-py": 10, "cifar-100-python": 100}
GRAY = ("1", "L", "LA", "I", "F")
"""Modes of gray images in PIL; those of 16 bits begin with `I;16`."""


def read_test_images(folder: str | Path, size: int | None = None) -> LabeledImages:
    """The test images that a folder holds; image files are not decoded yet.

    The first of these that is there:

    - CIFAR's own files, `cifar-10-batches-py` or `cifar-100-python`, as the folder or in it;
    - `test/<class>/`;
    - `val/<class>/` beside a `train`, as in ImageNet (also `valid` and `validation`);
    - `<class>/`: all of them.

    Classes are the names of the folders, sorted; see `datasets.read_image_folder`. Files that are
    gray give images of one channel, if the first one is.

    Args:
        folder: of the data set.
        size: side that every image is resized and cropped to; None if all have one size.

    Raises:
        DataError: there are no such images.
    """
    place = Path(folder).expanduser()
    if not place.is_dir():
        raise DataError(f"{KEY}: {str(place)!r} is not a folder")
    found = {name: place.parent for name in CIFAR_FOLDERS if place.name == name}
    found = found or {name: place for name in CIFAR_FOLDERS if (place / name).is_dir()}
    if len(found) > 1:
        raise DataError(f"{KEY}: {str(place)!r} holds {' and '.join(found)}: name one of them")
    for name, parent in found.items():
        if size not in (None, 32):
            raise DataError(f"{KEY}: {str(place)!r}: CIFAR's images are 32x32, not {size}x{size}")
        return read_cifar(CIFAR_FOLDERS[name], parent, train=False)
    return _read_classes(_test_part(place), size, place)


def with_channels(part: LabeledImages, channels: int) -> LabeledImages:
    """The same images; those of files are decoded to this number of channels."""
    if not isinstance(part.images, FileImages) or part.images.shape[0] == channels:
        return part
    shape = (channels, *part.images.shape[1:])
    return replace(part, images=replace(part.images, shape=shape))


def unshuffled_loader(part: LabeledImages, device: torch.device) -> ImageDataLoader:
    """The images in batches, in pixels of `[0, 1]`."""
    channels = part.images.shape[0]
    return ImageDataLoader(
        part.images,
        part.labels,
        part.class_names,
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
        batch_size=EVALUATION_BATCH,
        in_memory=len(part.labels) * prod(part.images.shape) <= MEMORY_LIMIT,
        device=device,
    )


def _test_part(folder: Path) -> Path:
    """The folder of classes that is the test set."""
    parts = ("test", *(VALIDATION_FOLDERS if (folder / "train").is_dir() else ()))
    for name in parts:
        check_link(folder / name)
        # a class may be called test
        if (folder / name).is_dir() and class_folders(folder / name):
            return folder / name
    return folder


def _read_classes(folder: Path, size: int | None, data: Path) -> LabeledImages:
    """The images in `folder/<class>/`, named by their paths below the folder `data`."""
    expected = f"expected {folder}/test/<class>/ or {folder}/<class>/ with images"
    names = class_folders(folder)
    if names and {name.casefold() for name in names} <= PART_NAMES:
        raise DataError(
            f"{KEY}: {str(folder)!r} holds {', '.join(names)}, which are not classes: {expected}"
        )
    scan = FolderScan()
    classes, files, labels = scan.scan(folder, expected)
    height, width = image_size(files[0]) if size is None else (size, size)
    shape = (_channels(files[0]), height, width)
    images = FileImages(files, shape, size is not None, folder=str(data))
    skipped = scan.skipped()
    return LabeledImages(images, labels, classes, remarks=() if skipped is None else (skipped,))


def _channels(path: str) -> int:
    """1 for a gray image file, else 3."""
    with Image.open(path) as file:
        is_gray = file.mode in GRAY or file.mode.startswith("I;16")
    return 1 if is_gray else 3
