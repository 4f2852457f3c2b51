"""Read the test images of a folder that no config describes: folders of classes, or CIFAR's files.

This is the whole path of evaluation: read -> batch, without split, noise and augmentation.
"""

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
"""PIL's modes of gray images, in addition to those of 16 bits, which begin with `I;16`."""


def read_test_images(folder: str | Path, size: int | None = None) -> LabeledImages:
    """Find the test images in a folder; image files are not decoded yet.

    The first of these layouts that exists is read:

    - CIFAR's own files: `cifar-10-batches-py` or `cifar-100-python`, the folder itself or in it;
    - `test/<class>/`;
    - `val/<class>/` beside a `train`, as in ImageNet (also `valid` and `validation`);
    - `<class>/`: all images.

    Classes are the names of the folders, sorted; see `datasets.read_image_folder`. Images have one
    channel if the first one is gray, otherwise three.

    Args:
        folder: the data set's folder.
        size: side that every image is resized and cropped to; None if all images have the same
            size.

    Raises:
        DataError: no layout exists, or the images cannot be read.
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
    """Return the same images; files are decoded to this number of channels."""
    # Pixels in memory keep their channels
    if not isinstance(part.images, FileImages) or part.images.shape[0] == channels:
        return part
    shape = (channels, *part.images.shape[1:])
    return replace(part, images=replace(part.images, shape=shape))


def unshuffled_loader(part: LabeledImages, device: torch.device) -> ImageDataLoader:
    """Return a loader of all images, in order, with pixels in `[0, 1]`."""
    channels = part.images.shape[0]
    # Mean and std belong to the checkpoint here, so the loader has none of its own
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
    """Return the folder that holds the class folders of the test set."""
    parts = ["test"]
    if (folder / "train").is_dir():
        parts += VALIDATION_FOLDERS
    for name in parts:
        check_link(folder / name)
        # A class may be called test: then it holds images, not class folders.
        if (folder / name).is_dir() and class_folders(folder / name):
            return folder / name
    return folder


def _read_classes(folder: Path, size: int | None, data: Path) -> LabeledImages:
    """Find the images in `folder/<class>/`; their names are paths below the folder `data`."""
    expected = f"expected {folder}/test/<class>/ or {folder}/<class>/ with images"
    names = class_folders(folder)
    if names and {name.casefold() for name in names} <= PART_NAMES:
        raise DataError(
            f"{KEY}: {str(folder)!r} holds {', '.join(names)}, which are not classes: {expected}"
        )
    scan = FolderScan()
    classes, files, labels = scan.scan(folder, expected)
    if size is None:
        height, width = image_size(files[0])
    else:
        height, width = size, size
    shape = (_channels(files[0]), height, width)
    images = FileImages(files, shape, size is not None, folder=str(data))
    remarks = tuple(filter(None, (scan.skipped(),)))
    return LabeledImages(images, labels, classes, remarks=remarks)


def _channels(path: str) -> int:
    """Return 1 for a gray image file, otherwise 3."""
    with Image.open(path) as file:
        if file.mode in GRAY or file.mode.startswith("I;16"):
            return 1
    return 3
