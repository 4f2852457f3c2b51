"""Labels from a file: real human mistakes such as CIFAR-N's, or any noise that was made elsewhere.

A file is data from a stranger: nothing in it is ever executed.
"""

import pickle
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from base.errors import DataError
from base.registry import did_you_mean

CLEAN_KEY = "clean_label"


def read_noise_file(file: str, key: str | None, clean_labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Read one noisy label per training image.

    The file covers the whole training set in its original order (CIFAR's; of an image folder: classes, then files, sorted by
    name). Formats: `.npy` with an integer array; `.pt` with a tensor, a numpy array, or a dict of them as in the CIFAR-N files,
    whose entries are `clean_label`, `aggre_label`, `worse_label`, `random_label1` and so on, and `noisy_label` for CIFAR-100.

    Args:
        file: the path.
        key: which entry of a dict to take; a plain array must have none.
        clean_labels: int64 `(N,)` the data set's own labels, to find a file in another order or of another data set.
        num_classes: number of classes.

    Returns:
        int64 `(N,)` in `[0, num_classes)`.

    Raises:
        DataError: the file is missing, cannot be read, or does not fit the data set. A dict's `clean_label` must equal
            `clean_labels`; the labels taken must agree with them more often than chance would.
    """
    where = f"trainer.noise_file: {file!r}"
    content = _load(Path(file).expanduser(), where)
    if isinstance(content, Mapping):
        if CLEAN_KEY in content:
            declared = _as_labels(content[CLEAN_KEY], f"{where}, entry {CLEAN_KEY!r}", len(clean_labels), num_classes)
            if not np.array_equal(declared, clean_labels):
                differing = int(np.sum(declared != clean_labels))
                raise DataError(
                    f"{where}: its {CLEAN_KEY!r} differs from the data set's labels in {differing} of {len(clean_labels)} "
                    "images: its order differs, or it belongs to another data set"
                )
        content = _entry(content, key, where)
        where = f"{where}, entry {key!r}"
    elif key is not None:
        raise DataError(f"{where} holds a single array, so it has no entry {key!r}")
    noisy = _as_labels(content, where, len(clean_labels), num_classes)
    agreement, chance = float(np.mean(noisy == clean_labels)), 1 / num_classes
    if agreement <= chance + min(0.5 * chance, 0.1):
        raise DataError(
            f"{where}: only {agreement:.1%} of its labels are the data set's own, no more than by chance: "
            "its order differs, or it belongs to another data set"
        )
    return noisy


def _load(path: Path, where: str) -> Any:
    if path.suffix not in (".npy", ".pt"):
        raise DataError(f"{where}: expected a .npy or a .pt file")
    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        with _numpy_allowed(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch has more to say about pickles that it refuses
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DataError(f"{where} does not exist") from None
    except pickle.UnpicklingError:
        raise DataError(f"{where}: holds something other than arrays of labels, or is damaged; nothing in it was run") from None
    except (OSError, ValueError, RuntimeError, EOFError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{where}: cannot be read ({reason})") from None


def _numpy_allowed() -> AbstractContextManager:
    """Let `torch.load(weights_only=True)` rebuild numpy arrays, and nothing else: CIFAR-N's `.pt` files hold these.

    The two names of one function are those that numpy 1 and numpy 2 write.
    """
    rebuild = np._core.multiarray._reconstruct
    rebuild_scalar = np._core.multiarray.scalar
    names: list[Any] = [np.ndarray, np.dtype, *(type(np.dtype(code)) for code in "?bhilqBHILQfd")]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        names += [(rebuild, f"{module}._reconstruct"), (rebuild_scalar, f"{module}.scalar")]
    return torch.serialization.safe_globals(names)


def _entry(content: Mapping, key: str | None, where: str) -> Any:
    known = ", ".join(map(str, content))
    if key is None:
        raise DataError(f"{where} holds several arrays; choose one with trainer.noise_key: {known}")
    if key not in content:
        raise DataError(f"{where} has no entry {key!r}; its entries are: {known}{did_you_mean(key, map(str, content))}")
    return content[key]


def _as_labels(values: Any, where: str, length: int, num_classes: int) -> np.ndarray:
    array = values.numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if array.shape != (length,):
        raise DataError(f"{where}: its shape is {array.shape}, expected ({length},), one label per training image")
    if array.dtype.kind not in "iu":
        raise DataError(f"{where}: its numbers are {array.dtype}, expected integers")
    if array.min() < 0 or array.max() >= num_classes:
        raise DataError(f"{where}: its labels go from {array.min()} to {array.max()}, expected 0 to {num_classes - 1}")
    return array.astype(np.int64)
