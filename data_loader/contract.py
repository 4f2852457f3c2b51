"""What a data set must be to be trained on, checked before training; see
`base.base_data_loader`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from base.distributed.session import is_connection_error
from base.errors import DataError, ProjectError


@contextmanager
def asking(where: str) -> Iterator[None]:
    """Tell in one line what a loader raises while it is asked for something.

    Args:
        where: what the line begins with.

    Raises:
        DataError: naming the exception, which is its cause.
    """
    try:
        yield
    except ProjectError:
        raise
    except Exception as error:
        if is_connection_error(error):
            raise
        lines = str(error).splitlines() or [""]
        raise DataError(f"{where}: {type(error).__name__}: {lines[0]}") from error


def check_images(images: Tensor, expected: Mapping[int, int], where: str) -> None:
    """Refuse a value that is not images as the contract of `BaseDataLoader` describes them.

    Args:
        images: what a loader gave.
        expected: dimension -> size, of those that are known; `{}` takes any `(B, C, H, W)`.
        where: what an error begins with.

    Raises:
        DataError: naming what was found and what was expected.
    """
    if not isinstance(images, Tensor):
        kind = type(images).__name__
        raise DataError(f"{where} gives a {kind}; expected a tensor (B, C, H, W)")
    wanted = tuple(expected.get(place, name) for place, name in enumerate("BCHW"))
    if images.ndim != 4 or any(images.shape[place] != size for place, size in expected.items()):
        shape = ", ".join(map(str, wanted))
        raise DataError(f"{where} gives the shape {tuple(images.shape)}; expected ({shape})")
    if images.dtype not in (torch.uint8, torch.float32):
        kind = str(images.dtype).removeprefix("torch.")
        raise DataError(f"{where} gives {kind}; expected float32 in [0, 1], or uint8")
    if images.requires_grad:
        raise DataError(f"{where} gives images that require a gradient; expected data, .detach()")


def check_range(images: Tensor, where: str) -> None:
    """Refuse floats that are not pixels in `[0, 1]`.

    Raises:
        DataError: naming the smallest and the largest value.
    """
    if images.dtype == torch.uint8 or images.numel() == 0:
        return
    smallest, largest = (float(value) for value in images.aminmax())
    # NaN is neither
    if not (smallest >= 0 and largest <= 1):
        raise DataError(
            f"{where} gives pixels from {smallest:.4g} to {largest:.4g}; expected [0, 1]: models"
            " normalize inside, by data_loader.args.mean and std"
        )


def check_labels(labels: Any, n_images: int, class_names: Any, where: str) -> np.ndarray:
    """The labels as int64 `(N,)`.

    Args:
        labels: a tensor, an array or a list of integers.
        n_images: N.
        class_names: the names of the classes, in label order.
        where: what an error begins with.

    Raises:
        DataError: they are not N integers in `[0, number of classes)`, or the names not names.
    """
    listed = isinstance(class_names, list | tuple)
    if not listed or not all(isinstance(name, str) for name in class_names):
        raise DataError(f"{where}: class_names: {class_names!r:.80}; expected a list of names")
    array = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        found = f"{array.dtype} of the shape {array.shape}"
        raise DataError(f"{where}: labels: {found}; expected integers of the shape ({n_images},)")
    if len(array) != n_images:
        raise DataError(f"{where}: labels: {len(array)} of them for {n_images} images")
    array, classes = array.astype(np.int64), len(class_names)
    wrong = array[(array < 0) | (array >= classes)]
    if len(wrong):
        raise DataError(
            f"{where}: labels: {wrong[0]} is not in [0, {classes}), the numbers of its"
            f" {classes} class_names"
        )
    return array
