"""Checks of the contract that `base.base_data_loader` describes: images, pixel range, labels.

In the path read -> split -> subset -> noise -> batch -> augment, these checks follow the reading.
They are applied to the parts of a data set (`training_data_loader`), to the images of a user's own
loader (`images`), and to the first batch (`own_images`).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from base.distributed.session import is_connection_error
from base.errors import DataError, ProjectError
from base.text import describe_error


@contextmanager
def loader_errors(where: str) -> Iterator[None]:
    """Turn any exception of a user's loader into a `DataError` of one line.

    Args:
        where: the beginning of the line.

    Raises:
        DataError: names the exception, which is its cause.
    """
    try:
        yield
    except ProjectError:
        raise
    except Exception as error:
        # A lost connection between processes is not the loader's fault, and is handled elsewhere.
        if is_connection_error(error):
            raise
        raise DataError(f"{where}: {describe_error(error)}") from error


def check_images(images: Tensor, expected: Mapping[int, int], where: str) -> None:
    """Check that a value holds images as the contract of `BaseDataLoader` describes them.

    Args:
        images: what a loader returned.
        expected: dimension -> size, for the known sizes; `{}` allows any `(B, C, H, W)`.
        where: the beginning of an error message.

    Raises:
        DataError: names what was found and what was expected.
    """
    if not isinstance(images, Tensor):
        kind = type(images).__name__
        raise DataError(f"{where} returns a value of type {kind}; expected a tensor (B, C, H, W)")
    wanted = tuple(expected.get(place, name) for place, name in enumerate("BCHW"))
    if images.ndim != 4 or any(images.shape[place] != size for place, size in expected.items()):
        shape = ", ".join(map(str, wanted))
        raise DataError(f"{where} returns the shape {tuple(images.shape)}; expected ({shape})")
    if images.dtype not in (torch.uint8, torch.float32):
        kind = str(images.dtype).removeprefix("torch.")
        raise DataError(f"{where} returns {kind}; expected float32 in [0, 1], or uint8")
    if images.requires_grad:
        # Their graph would keep every batch in memory.
        raise DataError(f"{where} returns images that require a gradient; expected data, .detach()")


def check_range(images: Tensor, where: str) -> None:
    """Check that float pixels are in `[0, 1]`.

    Raises:
        DataError: names the smallest and the largest value.
    """
    if images.dtype == torch.uint8 or images.numel() == 0:
        return
    smallest, largest = (float(value) for value in images.aminmax())
    # Comparisons with NaN are false, so this refuses NaN, too.
    if not (smallest >= 0 and largest <= 1):
        raise DataError(
            f"{where} returns pixels from {smallest:.4g} to {largest:.4g}; expected [0, 1]: models"
            " normalize inside, by data_loader.args.mean and std"
        )


def check_labels(labels: Any, n_images: int, class_names: Any, where: str) -> np.ndarray:
    """Check labels and return them as int64 `(N,)`.

    Args:
        labels: a tensor, an array or a list of integers.
        n_images: N.
        class_names: the names of the classes, in label order.
        where: the beginning of an error message.

    Raises:
        DataError: the labels are not N integers in `[0, number of classes)`, or the class names are
            not a list of strings.
    """
    listed = isinstance(class_names, list | tuple)
    if not listed or not all(isinstance(name, str) for name in class_names):
        raise DataError(f"{where}: class_names: {class_names!r:.80}; expected a list of names")
    if isinstance(labels, Tensor):
        labels = labels.cpu()
    array = np.asarray(labels)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        found = f"{array.dtype} of the shape {array.shape}"
        raise DataError(f"{where}: labels: {found}; expected integers of the shape ({n_images},)")
    if len(array) != n_images:
        raise DataError(f"{where}: labels: {len(array)} of them for {n_images} images")
    array = array.astype(np.int64)
    classes = len(class_names)
    wrong = array[(array < 0) | (array >= classes)]
    if len(wrong):
        raise DataError(
            f"{where}: labels: {wrong[0]} is not in [0, {classes}), the numbers of its"
            f" {classes} class_names"
        )
    return array
