"""Read data sets: images, labels and class names of their training and test parts.

In the path read -> split -> subset -> noise -> batch -> augment, this is the reading. The classes
in `data_loaders` call these functions. Image files are listed here, and decoded later (`images`).
"""

import socket
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from base.errors import DataError
from base.run_folder.locks import lock_descriptor
from base.text import one_line
from data_loader.decoding import image_size
from data_loader.folder_scan import KEY, FolderScan, check_link, class_folders
from data_loader.images import FileImages, Images, MemoryImages
from data_loader.splits import stratified_split

# Fixed, so that runs with different seeds are tested on the same images
TEST_SPLIT_SEED = 0
TEST_SPLIT = 0.2
"""The default fraction of every class for the test set, if the data set does not have one."""

VALIDATION_FOLDERS = ("val", "valid", "validation")
"""Accepted names of the folder of validation images."""

PART_NAMES = {
    "train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval",
}  # fmt: skip
"""Folders with these names, in upper or lower case, are parts of a data set, not classes."""

NETWORK_TIMEOUT = 30.0
"""Seconds without an answer after which a download fails."""

LOCK = ".download.lock"
"""A process locks this file while it downloads or unpacks a data set. The file itself is kept."""


@dataclass(frozen=True)
class LabeledImages:
    """One part of a data set.

    Attributes:
        images: `N` images.
        labels: int64 `(N,)`.
        class_names: in label order, the same in every part.
        validation: for a training part, the validation images if the data set names them itself.
        remarks: for a training part, lines about the data set for the log of a run.
    """

    images: Images
    labels: np.ndarray
    class_names: tuple[str, ...]
    validation: "LabeledImages | None" = None
    remarks: tuple[str, ...] = ()


def read_cifar(num_classes: int, data_dir: str | Path, train: bool) -> LabeledImages:
    """Read CIFAR-10 or CIFAR-100: 50,000 training and 10,000 test images of 32 x 32 (Krizhevsky,
    2009).

    Reads the files of the Python version from `data_dir`. If they are missing or damaged, the
    archive in that folder is unpacked, or else downloaded, by one process at a time. Nothing is
    unpickled before its md5 has been checked.

    Args:
        num_classes: 10 or 100.
        data_dir: the folder that holds `cifar-10-batches-py` or `cifar-100-python`, or will.
        train: True for the training part, False for the test part.

    Raises:
        DataError: the files are missing or damaged and cannot be downloaded.
    """
    # Importing torchvision takes seconds, and only CIFAR needs it.
    from torchvision.datasets import CIFAR10, CIFAR100

    source = {10: CIFAR10, 100: CIFAR100}[num_classes]
    folder = Path(data_dir).expanduser()
    try:
        with _bounded_network(), warnings.catch_warnings():
            # numpy deprecates the data types in these old pickles
            warnings.simplefilter("ignore")
            try:
                data = source(root=folder, train=train)
            # torchvision's error for missing or damaged files
            except RuntimeError:
                with _locked(folder):
                    data = source(root=folder, train=train, download=True)
    except (OSError, RuntimeError, HTTPException) as error:
        raise DataError(_cifar_error(source, num_classes, folder, error)) from None
    pixels = torch.from_numpy(np.ascontiguousarray(data.data.transpose(0, 3, 1, 2)))
    return LabeledImages(
        MemoryImages(pixels), np.asarray(data.targets, dtype=np.int64), tuple(data.classes)
    )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Wait until no other process downloads to `folder`, and keep the others waiting."""
    with ExitStack() as stack:
        # A folder that cannot be written is reported by the download itself
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((folder / LOCK).open("w"))
            lock_descriptor(lock.fileno(), wait=True)
        yield


def _cifar_error(source: Any, num_classes: int, folder: Path, error: Exception) -> str:
    from torchvision.datasets.utils import check_integrity

    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    files = [*source.train_list, *source.test_list, [source.meta["filename"], source.meta["md5"]]]
    expected = {folder / source.base_folder / name: md5 for name, md5 in files}
    expected[folder / source.filename] = source.tgz_md5
    where = f"data_loader.args.data_dir: CIFAR-{num_classes}"
    remedy = f"put {source.filename} (md5 {source.tgz_md5})"
    for path, md5 in expected.items():
        if path.exists() and not check_integrity(path, md5):
            return (
                f"{where}: '{path}' is damaged (its md5 is not {md5}) and could not be replaced"
                f" ({reason}): {remedy} into {str(folder)!r}"
            )
    return (
        f"{where} is not in {str(folder)!r} and could not be downloaded ({reason}): {remedy} there"
    )


@contextmanager
def _bounded_network() -> Iterator[None]:
    # torchvision's download sets no timeout: it waits forever if a network drops its packets.
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def read_image_folder(
    data_dir: str | Path,
    size: int | None,
    num_workers: int = 0,
    pin_memory: bool = False,
    test_split: float | None = None,
    channels: Literal[1, 3] = 3,
) -> tuple[LabeledImages, LabeledImages]:
    """Read images in folders of classes; nothing is decoded yet.

    There are four layouts (`val` may also be called `valid` or `validation`):

    - `train/<class>/` and `test/<class>/`;
    - `train/`, `val/` and `test/`: `val` is the validation set, and no training image is held out;
    - `train/` and `val/`: `val` is the test set, as in ImageNet;
    - `<class>/`: a part of every class is the test set, the same for every seed of a run.

    Classes are the names of the folders, sorted. Images are at any depth below them, sorted by
    folder, then by name. See `folder_scan.FolderScan` for what is skipped and for links.

    Args:
        data_dir: the folder.
        size: side N that every image is resized and cropped to (see `decoding.decode_image`); None
            if all images have the same size.
        num_workers: processes that decode.
        pin_memory: see `images.FileImages`.
        test_split: fraction of every class for the test set in the last layout, in `(0, 1)`; None
            for `TEST_SPLIT`. Without effect in the other layouts.
        channels: 3 for RGB, 1 for gray.

    Returns:
        The training part, which may hold a validation part, and the test part.

    Raises:
        DataError: a folder is missing or cannot be read, a class has no image, two parts have
            different classes, a link is broken, or one file is in two classes or parts.
    """
    folder = Path(data_dir).expanduser()
    expected = (
        f"expected {folder}/train/<class>/ and {folder}/test/<class>/ with images, "
        f"val/ beside train/, or {folder}/<class>/"
    )
    places, layout = _parts_of(folder, expected)
    scan = FolderScan()
    found = {part: scan.scan(place, expected) for part, place in places.items()}
    classes, train_files, _ = found["train"]
    for part, (others, _, _) in found.items():
        if others != classes:
            different = ", ".join(one_line(name) for name in sorted(set(classes) ^ set(others)))
            raise DataError(
                f"{KEY}: {str(places[part])!r} must have the classes of train: "
                f"only one of them has {different}"
            )
    if size is None:
        height, width = image_size(train_files[0])
    else:
        height, width = size, size
    shape = (channels, height, width)
    parts = {}
    for part, (_, files, labels) in found.items():
        images = FileImages(files, shape, size is not None, num_workers, pin_memory, str(folder))
        parts[part] = LabeledImages(images, labels, classes)
    if "test" not in parts:
        whole = parts["train"]
        if test_split is None:
            test_split = TEST_SPLIT
        key = "data_loader.args.test_split"
        index = stratified_split(whole.labels, test_split, TEST_SPLIT_SEED, key)
        for part, chosen in zip(("train", "test"), index, strict=True):
            images = whole.images.select(chosen)
            parts[part] = replace(whole, images=images, labels=whole.labels[chosen])
        counts = f"{len(index[1])} of the {len(whole.labels)} images"
        layout = f"neither train nor test folder: {counts} are the test set"
    remarks = tuple(filter(None, (layout, scan.skipped())))
    return replace(parts["train"], validation=parts.get("val"), remarks=remarks), parts["test"]


def _parts_of(folder: Path, expected: str) -> tuple[dict[str, Path], str | None]:
    """Return part -> folder, for `train` and those of `test` and `val` that exist, and a remark."""
    for name in ("train", "test", *VALIDATION_FOLDERS):
        check_link(folder / name)
    held_out = [folder / name for name in VALIDATION_FOLDERS if (folder / name).is_dir()]
    train = folder / "train"
    test = folder / "test"
    if train.is_dir() and held_out and not test.exists():
        remark = f"no test folder: {held_out[0].name} is the test set"
        return {"train": train, "test": held_out[0]}, remark
    if train.is_dir() and test.is_dir() and held_out:
        remark = f"{held_out[0].name} is the validation set"
        return {"train": train, "val": held_out[0], "test": test}, remark
    if train.is_dir() and test.is_dir():
        return {"train": train, "test": test}, None
    classes = []
    if folder.is_dir():
        classes = class_folders(folder)
    # A class may be called train: then it holds images, not class folders.
    parted = held_out or test.exists() or (train.is_dir() and class_folders(train))
    if len(classes) > 1 and not parted:
        if {name.casefold() for name in classes} <= PART_NAMES:
            raise DataError(
                f"{KEY}: {str(folder)!r} holds {', '.join(classes)}, which are not classes: "
                f"call them train and test; {expected}"
            )
        for name in classes:
            if (folder / name / "train").is_dir():
                raise DataError(
                    f"{KEY}: {str(folder)!r} holds a data set in {str(folder / name)!r}: "
                    f"use that path; {expected}"
                )
        return {"train": folder}, None
    missing = next(part for part in (folder, train, test) if not part.is_dir())
    raise DataError(f"{KEY}: {str(missing)!r} is not a folder; {expected}")


def read_digits(train: bool) -> LabeledImages:
    """Read the 1,797 handwritten digits that come with scikit-learn, which need no download.

    The 8 x 8 gray images with values from 0 to 16 are scaled to 0 to 255, enlarged bilinearly to
    32 x 32 and repeated in three channels. scikit-learn has no official split; here 20 % of every
    class are the test set, always the same images.

    Args:
        train: True for the training part, False for the test part.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    labels = data.target.astype(np.int64)
    index, test_index = stratified_split(labels, TEST_SPLIT, TEST_SPLIT_SEED)
    if not train:
        index = test_index
    gray = torch.from_numpy(data.images[index]).float()[:, None] * (255 / 16)
    enlarged = F.interpolate(gray, size=(32, 32), mode="bilinear", align_corners=False)
    pixels = enlarged.round().to(torch.uint8).repeat(1, 3, 1, 1)
    return LabeledImages(MemoryImages(pixels), labels[index], tuple(map(str, data.target_names)))
