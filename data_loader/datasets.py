"""The data sets: where images, labels and class names come from, each with a training and a test part."""

import socket
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from base.errors import DataError
from data_loader.decoding import image_size
from data_loader.images import FileImages, MemoryImages
from data_loader.splits import stratified_split

DIGITS_SPLIT_SEED = 0
"""Fixed, so that every run of every seed is tested on the same digits."""

NETWORK_TIMEOUT = 30.0
"""Seconds without an answer after which a download is given up."""

LOCK = ".download.lock"
"""The file that a process locks while it downloads or unpacks a data set; it stays."""


@dataclass(frozen=True)
class LabelledImages:
    """One part of a data set: images, int64 `(N,)` labels, and the classes' names in label order."""

    images: MemoryImages | FileImages
    labels: np.ndarray
    class_names: tuple[str, ...]


def read_cifar(num_classes: int, data_dir: str | Path, train: bool) -> LabelledImages:
    """CIFAR-10 or CIFAR-100: 50,000 training and 10,000 test images of 32 x 32.

    Reads the python version's files from `data_dir`; if they are missing or damaged, unpacks the archive that lies there, and
    otherwise downloads it, one process at a time. Nothing is unpickled before its md5 is right.

    Args:
        num_classes: 10 or 100.
        data_dir: the folder that holds, or shall hold, `cifar-10-batches-py` or `cifar-100-python`.
        train: the training part, or the test part.

    Raises:
        DataError: the files are missing or damaged and cannot be downloaded.
    """
    from torchvision.datasets import CIFAR10, CIFAR100

    source = {10: CIFAR10, 100: CIFAR100}[num_classes]
    folder = Path(data_dir).expanduser()
    existed = folder.exists()
    try:
        with _bounded_network(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy finds the dtypes in these old pickles outdated
            try:
                data = source(root=folder, train=train)
            except RuntimeError:  # missing or damaged
                with _locked(folder):
                    data = source(root=folder, train=train, download=True)
    except (OSError, RuntimeError, HTTPException) as error:
        if not existed:
            with suppress(OSError):  # the download begins by making it
                (folder / LOCK).unlink(missing_ok=True)
                folder.rmdir()
        raise DataError(_cifar_error(source, num_classes, folder, error)) from None
    pixels = torch.from_numpy(np.ascontiguousarray(data.data.transpose(0, 3, 1, 2)))
    return LabelledImages(MemoryImages(pixels), np.asarray(data.targets, dtype=np.int64), tuple(data.classes))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep all other processes that ask for it out of `folder` meanwhile; where files cannot be locked, none."""
    with ExitStack() as stack:
        with suppress(ImportError, OSError):
            import fcntl  # not on Windows

            folder.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context((folder / LOCK).open("w")), fcntl.LOCK_EX)
        yield


def _cifar_error(source: Any, num_classes: int, folder: Path, error: Exception) -> str:
    from torchvision.datasets.utils import check_integrity

    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    files = [*source.train_list, *source.test_list, [source.meta["filename"], source.meta["md5"]]]
    wanted = [(folder / source.base_folder / name, md5) for name, md5 in files] + [(folder / source.filename, source.tgz_md5)]
    where = f"data_loader.args.data_dir: CIFAR-{num_classes}"
    remedy = f"put {source.filename} (md5 {source.tgz_md5})"
    for path, md5 in wanted:
        if path.exists() and not check_integrity(path, md5):
            return (
                f"{where}: '{path}' is damaged (its md5 is not {md5}) and could not be replaced ({reason}): "
                f"{remedy} into {str(folder)!r}"
            )
    return f"{where} is not in {str(folder)!r} and could not be downloaded ({reason}): {remedy} there"


@contextmanager
def _bounded_network() -> Iterator[None]:
    # torchvision's download waits for ever on a network that swallows packets.
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def read_image_folder(
    data_dir: str | Path, size: int | None, num_workers: int = 0, pin_memory: bool = False
) -> tuple[LabelledImages, LabelledImages]:
    """Any images in `data_dir/train/<class>/` and `data_dir/test/<class>/`, at any depth below; nothing is decoded yet.

    Classes are the names of the folders, sorted; within a class images are sorted by path. File types are torchvision's.

    Args:
        data_dir: the folder with `train` and `test`.
        size: side N that every image is resized and cropped to (see `decoding.decode_image`); None if all images have one size.
        num_workers: processes that decode.
        pin_memory: see `images.FileImages`.

    Returns:
        The training part and the test part.

    Raises:
        DataError: a folder is missing, a class has no image, or test has other classes than train.
    """
    folder = Path(data_dir).expanduser()
    expected = f"expected {folder}/train/<class>/ and {folder}/test/<class>/ with images"
    scanned = []
    for part in (folder, folder / "train", folder / "test"):
        if not part.is_dir():
            raise DataError(f"data_loader.args.data_dir: {str(part)!r} is not a folder; {expected}")
        if part is not folder:
            scanned.append(_scan(part, expected))
    (train_classes, train_files, train_labels), (test_classes, test_files, test_labels) = scanned
    if train_classes != test_classes:
        raise DataError(
            f"data_loader.args.data_dir: {str(folder / 'test')!r} must have the classes of train: "
            f"only one of them has {', '.join(sorted(set(train_classes) ^ set(test_classes)))}"
        )
    height, width = image_size(train_files[0]) if size is None else (size, size)
    train, test = (
        LabelledImages(FileImages(files, (3, height, width), size is not None, num_workers, pin_memory), labels, train_classes)
        for files, labels in ((train_files, train_labels), (test_files, test_labels))
    )
    return train, test


def _scan(folder: Path, expected: str) -> tuple[tuple[str, ...], tuple[str, ...], np.ndarray]:
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    classes = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir()))
    if not classes:
        raise DataError(f"data_loader.args.data_dir: {str(folder)!r} has no class folders; {expected}")
    numbers = {name: label for label, name in enumerate(classes)}
    samples = make_dataset(str(folder), class_to_idx=numbers, extensions=IMG_EXTENSIONS, allow_empty=True)
    labels = np.array([label for _, label in samples], dtype=np.int64)
    for name, count in zip(classes, np.bincount(labels, minlength=len(classes)), strict=True):
        if count == 0:
            types = " ".join(IMG_EXTENSIONS)
            raise DataError(f"data_loader.args.data_dir: {str(folder / name)!r} has no images; expected files of type {types}")
    return classes, tuple(path for path, _ in samples), labels


def read_digits(train: bool) -> LabelledImages:
    """The 1,797 handwritten digits that come with scikit-learn, for trying things out without a download.

    8 x 8 grey images with values 0 to 16, scaled to 0 to 255, enlarged bilinearly to 32 x 32 and repeated in three channels.
    scikit-learn ships no official split; here 20 % of every class are the test set, always the same ones.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    labels = data.target.astype(np.int64)
    index = stratified_split(labels, 0.2, DIGITS_SPLIT_SEED)[0 if train else 1]
    grey = torch.from_numpy(data.images[index]).float()[:, None] * (255 / 16)
    pixels = F.interpolate(grey, size=(32, 32), mode="bilinear", align_corners=False).round().to(torch.uint8)
    return LabelledImages(MemoryImages(pixels.repeat(1, 3, 1, 1)), labels[index], tuple(map(str, data.target_names)))
