"""Read label files: `.npy`, `.npz`, `.pt`, `.json` and `.csv`.

`noise_file` uses this for the noise step. A file may come from a stranger, so nothing in it is
executed: pickles are read by unpicklers that know only arrays and plain values.
"""

import csv
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch

from base.config.strict_json import parse_json
from base.errors import DataError
from base.text import first_line


def load_label_file(path: Path, where: str) -> Any:
    """Read a file: an array or a list, or a dict of several by name.

    `.npy` holds an array, or a pickled dict of arrays, as some of CIFAR-N's files do; `.npz` holds
    several arrays; `.pt` and `.pth` a tensor, an array or a dict of them; `.json` a list or an
    object of lists; `.csv` columns, named by a header or numbered from 0.

    Args:
        path: the file.
        where: the beginning of an error message.

    Raises:
        DataError: the file is missing, of another type, or cannot be read.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{where}: expected one of the types {' '.join(READERS)}")
    try:
        content = reader(path)
    except FileNotFoundError:
        raise DataError(f"{where} does not exist") from None
    except pickle.UnpicklingError:
        reason = "holds something other than arrays of labels, or is damaged; nothing in it was run"
        raise DataError(f"{where}: {reason}") from None
    # The readers raise nearly every exception on damaged and on hostile files.
    except Exception as error:
        raise DataError(f"{where}: cannot be read ({first_line(error)})") from None
    if isinstance(content, dict):
        return {str(name): values for name, values in content.items()}
    return content


def _read_numpy(path: Path) -> Any:
    with path.open("rb") as file:
        try:
            content = np.load(file, allow_pickle=False)
        # numpy's error for a pickle, and for damaged files
        except ValueError:
            file.seek(0)
            if _holds_objects(file):
                return _read_pickled_arrays(file)
            raise
        if isinstance(content, np.ndarray):
            return content
        return {name: content[name] for name in content.files}


def _holds_objects(file: BinaryIO) -> bool:
    """Whether a `.npy` holds a pickled array of objects. Reads the file up to the pickle."""
    version = np.lib.format.read_magic(file)
    return version == (1, 0) and np.lib.format.read_array_header_1_0(file)[2].hasobject


def _read_torch(path: Path) -> Any:
    with _numpy_allowed(), warnings.catch_warnings():
        # torch also warns about a pickle that it refuses; the error is enough
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True)


def _read_json(path: Path) -> Any:
    content = parse_json(path.read_text(encoding="utf-8-sig"))
    if not isinstance(content, list | dict):
        found = type(content).__name__
        raise ValueError(f"it holds {found}, expected a list of labels or an object of such lists")
    return content


def _read_csv(path: Path) -> Any:
    with path.open(newline="", encoding="utf-8-sig") as file:
        first = file.readline()
        file.seek(0)
        # `csv.Sniffer` fails for a single column
        delimiter = max(",;\t", key=first.count)
        rows = [row for row in csv.reader(file, delimiter=delimiter) if row]
    if not rows:
        raise ValueError("it is empty")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(rows[0]):
            raise ValueError(f"row {number} has {len(row)} columns, the first one {len(rows[0])}")
    has_header = not all(map(_is_integer, rows[0]))
    names = list(map(str, range(len(rows[0]))))
    if has_header:
        names = [name.strip() for name in rows.pop(0)]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"two of its columns are named {repeated[0]!r}")
    columns = [_as_integers(column) for column in zip(*rows, strict=True)]
    if not columns:
        raise ValueError("it holds nothing but a header")
    return dict(zip(names, columns, strict=True))


def _is_integer(text: str) -> bool:
    return re.fullmatch(r"\s*[+-]?[0-9]{1,18}\s*", text) is not None


def _as_integers(column: tuple[str, ...]) -> np.ndarray:
    """Convert a column to int64 if all its fields are integers, otherwise to strings."""
    array = np.array(column)
    if all(map(_is_integer, column)):
        return array.astype(np.int64)
    return array


READERS: dict[str, Callable[[Path], Any]] = {
    ".npy": _read_numpy,
    ".npz": _read_numpy,
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".json": _read_json,
    ".csv": _read_csv,
}


def _numpy_allowed() -> AbstractContextManager:
    """Let `torch.load(weights_only=True)` also rebuild numpy arrays, which CIFAR-N's `.pt` files
    hold."""
    rebuild = np._core.multiarray._reconstruct
    rebuild_scalar = np._core.multiarray.scalar
    names: list[Any] = [np.ndarray, np.dtype, *(type(np.dtype(code)) for code in "?bhilqBHILQfd")]
    # numpy 1 and numpy 2 write different names of the same functions
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        names += [(rebuild, f"{module}._reconstruct"), (rebuild_scalar, f"{module}.scalar")]
    return torch.serialization.safe_globals(names)


class _PickledDtype:
    """Stands for `numpy.dtype` in a pickle."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code = code
        self.byte_order = "|"

    def __setstate__(self, state: tuple) -> None:
        self.byte_order = state[1]

    def read(self, raw: bytes) -> np.ndarray:
        """Convert bytes to an array of numbers.

        Raises:
            ValueError: this is not a type of numbers.
        """
        # An array of objects would take the bytes for pointers.
        is_number = re.fullmatch(r"[biuf][1248]", self.code)
        if not is_number or self.byte_order not in ("<", ">", "|", "="):
            raise ValueError(f"it holds arrays of type {self.code!r}, expected integers")
        return np.frombuffer(raw, np.dtype(f"{self.byte_order}{self.code}"))


class _PickledArray:
    """Stands for `numpy.ndarray` in a pickle, so that numpy gets checked values only."""

    def __setstate__(self, state: tuple) -> None:
        _, self.shape, self.dtype, self.fortran, self.data = state

    @property
    def values(self) -> Any:
        """The array; for an array of objects, the list of them."""
        if isinstance(self.data, list):
            return self.data
        order = "F" if self.fortran else "C"
        return self.dtype.read(self.data).reshape(self.shape, order=order)


class _ArrayUnpickler(pickle.Unpickler):
    """Reads a pickle of arrays and plain values; any other name in it is an error."""

    NAMES: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy", "ndarray"): _PickledArray,
        ("numpy", "dtype"): _PickledDtype,
        # Protocol 2, which Python 2 can read, writes bytes as encoded text
        ("_codecs", "encode"): lambda text, _: text.encode("latin1"),
        **{
            (module, name): stand_in
            for module in ("numpy.core.multiarray", "numpy._core.multiarray")
            for name, stand_in in (
                ("_reconstruct", lambda *_: _PickledArray()),
                ("scalar", lambda dtype, raw: dtype.read(raw)[0].item()),
            )
        },
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.NAMES:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return self.NAMES[module, name]


def _read_pickled_arrays(file: BinaryIO) -> Any:
    array = _ArrayUnpickler(file).load()
    if not isinstance(array, _PickledArray):
        raise pickle.UnpicklingError("no array")
    content = array.values
    # `np.save` of a dict writes an array without dimensions that holds the dict
    if array.shape != () or not isinstance(content, list) or not isinstance(content[0], dict):
        return content
    return {name: _unpacked(values) for name, values in content[0].items()}


def _unpacked(value: Any) -> Any:
    if isinstance(value, _PickledArray):
        return value.values
    return value
