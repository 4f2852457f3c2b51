"""The data sets: where images, labels and class names come from, each with a training and a test
part."""

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
from data_loader.decoding import image_size
from data_loader.folder_scan import KEY, FolderScan, check_link, class_folders
from data_loader.images import FileImages, Images, MemoryImages
from data_loader.splits import stratified_split

TEST_SPLIT_SEED = 0
"""Fixed: all runs are tested on the same images where the test set is a part of the whole."""

TEST_SPLIT = 0.2
"""The part of every class that is the test set there, unless a config says otherwise."""

VALIDATION_FOLDERS = ("val", "valid", "validation")
"""Names that the folder of validation images may have."""

PART_NAMES = {
    "train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval",
}  # fmt: skip
"""Folders that are called so, in letters of any case, are parts of a data set and not its
classes."""

NETWORK_TIMEOUT = 30.0
"""Seconds without an answer after which a download is given up."""

LOCK = ".download.lock"
"""The file that a process locks while it downloads or unpacks a data set; it stays."""


@dataclass(frozen=True)
class LabeledImages:
    """One part of a data set.

    Attributes:
        images: `N` images.
        labels: int64 `(N,)`.
        class_names: in label order, the same ones in every part.
        validation: of a training part, the validation images that the data set names itself; None
            where it names none.
        remarks: of a training part, lines that the log of a run should hold about the data set.
    """

    images: Images
    labels: np.ndarray
    class_names: tuple[str, ...]
    validation: "LabeledImages | None" = None
    remarks: tuple[str, ...] = ()


def read_cifar(num_classes: int, data_dir: str | Path, train: bool) -> LabeledImages:
    """CIFAR-10 or CIFAR-100: 50,000 training and 10,000 test images of 32 x 32.

    Reads the python version's files from `data_dir`; if they are missing or damaged, unpacks the
    archive that lies there, and otherwise downloads it, one process at a time. Nothing is unpickled
    before its md5 is right.

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
    return LabeledImages(
        MemoryImages(pixels), np.asarray(data.targets, dtype=np.int64), tuple(data.classes)
    )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Wait until no other process downloads to `folder`, and keep the others waiting."""
    with ExitStack() as stack:
        # a folder that cannot be written is reported by the download itself
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((folder / LOCK).open("w"))
            lock_descriptor(lock.fileno(), wait=True)
        yield


def _cifar_error(source: Any, num_classes: int, folder: Path, error: Exception) -> str:
    from torchvision.datasets.utils import check_integrity

    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    files = [*source.train_list, *source.test_list, [source.meta["filename"], source.meta["md5"]]]
    wanted = [(folder / source.base_folder / name, md5) for name, md5 in files] + [
        (folder / source.filename, source.tgz_md5)
    ]
    where = f"data_loader.args.data_dir: CIFAR-{num_classes}"
    remedy = f"put {source.filename} (md5 {source.tgz_md5})"
    for path, md5 in wanted:
        if path.exists() and not check_integrity(path, md5):
            return (
                f"{where}: '{path}' is damaged (its md5 is not {md5}) and could not be replaced ({reason}): "
                f"{remedy} into {str(folder)!r}"
            )
    return (
        f"{where} is not in {str(folder)!r} and could not be downloaded ({reason}): {remedy} there"
    )


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
    data_dir: str | Path,
    size: int | None,
    num_workers: int = 0,
    pin_memory: bool = False,
    test_split: float | None = None,
    channels: Literal[1, 3] = 3,
) -> tuple[LabeledImages, LabeledImages]:
    """Any images in folders of classes; nothing is decoded yet.

    Four layouts are known (`valid` and `validation` stand for `val`, too):

    - `train/<class>/` and `test/<class>/`;
    - `train/`, `val/` and `test/`: `val` is the validation set, and nothing of `train` is held out;
    - `train/` and `val/`: `val` is the test set, as in ImageNet;
    - `<class>/`: a part of every class is the test set, the same one whatever the seed of a run.

    Classes are the names of the folders, sorted. Images lie at any depth below them, sorted by
    folder, then by name. `folder_scan.FolderScan` says what is skipped, and what links are taken
    for.

    Args:
        data_dir: the folder.
        size: side N that every image is resized and cropped to (see `decoding.decode_image`); None
            if all images have one size.
        num_workers: processes that decode.
        pin_memory: see `images.FileImages`.
        test_split: part of every class that is the test set in the last layout, in `(0, 1)`; None
            for `TEST_SPLIT`. Without effect in the others.
        channels: 3 for RGB, 1 for gray.

    Returns:
        The training part, which may hold a validation part, and the test part.

    Raises:
        DataError: a folder is missing or may not be read, a class has no image, a part has other
            classes than train, a link leads nowhere, or one file is in two classes or parts.
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
            different = ", ".join(repr(name)[1:-1] for name in sorted(set(classes) ^ set(others)))
            raise DataError(
                f"{KEY}: {str(places[part])!r} must have the classes of train: "
                f"only one of them has {different}"
            )
    height, width = image_size(train_files[0]) if size is None else (size, size)

    def labeled(files: tuple[str, ...], labels: np.ndarray) -> LabeledImages:
        shape, resize = (channels, height, width), size is not None
        images = FileImages(files, shape, resize, num_workers, pin_memory, str(folder))
        return LabeledImages(images, labels, classes)

    parts = {part: labeled(files, labels) for part, (_, files, labels) in found.items()}
    if "test" not in parts:
        whole = parts["train"]
        share = TEST_SPLIT if test_split is None else test_split
        key = "data_loader.args.test_split"
        index = stratified_split(whole.labels, share, TEST_SPLIT_SEED, key)
        for part, chosen in zip(("train", "test"), index, strict=True):
            images = whole.images.select(chosen)
            parts[part] = replace(whole, images=images, labels=whole.labels[chosen])
        counts = f"{len(index[1])} of the {len(whole.labels)} images"
        layout = f"neither train nor test folder: {counts} are the test set"
    remarks = tuple(filter(None, (layout, scan.skipped())))
    return replace(parts["train"], validation=parts.get("val"), remarks=remarks), parts["test"]


def _parts_of(folder: Path, expected: str) -> tuple[dict[str, Path], str | None]:
    """The folders of `train`, and where they exist of `test` and `val`; and a remark on them."""
    for name in ("train", "test", *VALIDATION_FOLDERS):
        check_link(folder / name)
    held_out = [folder / name for name in VALIDATION_FOLDERS if (folder / name).is_dir()]
    train, test = folder / "train", folder / "test"
    if train.is_dir() and held_out and not test.exists():
        remark = f"no test folder: {held_out[0].name} is the test set"
        return {"train": train, "test": held_out[0]}, remark
    if train.is_dir() and test.is_dir() and held_out:
        remark = f"{held_out[0].name} is the validation set"
        return {"train": train, "val": held_out[0], "test": test}, remark
    if train.is_dir() and test.is_dir():
        return {"train": train, "test": test}, None
    classes = class_folders(folder) if folder.is_dir() else []
    # a class may be called train
    parted = held_out or test.exists() or (train.is_dir() and class_folders(train))
    if len(classes) > 1 and not parted:
        if {name.casefold() for name in classes} <= PART_NAMES:
            raise DataError(
                f"{KEY}: {str(folder)!r} holds {', '.join(classes)}, which are no classes: "
                f"call them train and test; {expected}"
            )
        for name in classes:
            if (folder / name / "train").is_dir():
                raise DataError(
                    f"{KEY}: {str(folder)!r} holds a data set in {str(folder / name)!r}: "
                    f"name that; {expected}"
                )
        return {"train": folder}, None
    missing = next(part for part in (folder, train, test) if not part.is_dir())
    raise DataError(f"{KEY}: {str(missing)!r} is not a folder; {expected}")


def read_digits(train: bool) -> LabeledImages:
    """The 1,797 handwritten digits that come with scikit-learn, for trying things out without a
    download.

    8 x 8 gray images with values 0 to 16, scaled to 0 to 255, enlarged bilinearly to 32 x 32 and
    repeated in three channels. scikit-learn ships no official split; here 20 % of every class are
    the test set, always the same ones."""
    from sklearn.datasets import load_digits

    data = load_digits()
    labels = data.target.astype(np.int64)
    index = stratified_split(labels, TEST_SPLIT, TEST_SPLIT_SEED)[0 if train else 1]
    gray = torch.from_numpy(data.images[index]).float()[:, None] * (255 / 16)
    pixels = (
        F.interpolate(gray, size=(32, 32), mode="bilinear", align_corners=False)
        .round()
        .to(torch.uint8)
    )
    return LabeledImages(
        MemoryImages(pixels.repeat(1, 3, 1, 1)), labels[index], tuple(map(str, data.target_names))
    )
