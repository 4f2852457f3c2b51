"""Save and load checkpoint files. No other code reads or writes them.

A checkpoint holds tensors and plain Python values only, and is always read with
`weights_only=True`, so that reading one runs no code from it. Files of other code bases, such as
the original ConvNorm's (`arch, epoch, state_dict, optimizer, monitor_best`), are read the same way;
they hold enough to evaluate a model, but not to resume a run.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from base.atomic import replacing
from base.checkpoint.checksum import verify_checksum, write_checksum
from base.checkpoint.find import find_checkpoint
from base.checkpoint.foreign_weights import find_weights, normalization_beside
from base.checkpoint.schema import check_readable, without_unreadable
from base.checkpoint.unreadable import explain
from base.errors import CheckpointError
from base.text import describe_error, first_line, one_line

SCHEMA_VERSION = 2
"""The version that is written. Since version 2 every checkpoint has a checksum."""


def save_checkpoint(path: Path, contents: Mapping[str, Any]) -> None:
    """Write `contents` and their checksum to `path`, atomically.

    Raises:
        CheckpointError: the disk is full, the file is too large for it, or the folder cannot be
            written; the old file is untouched.
    """
    try:
        with replacing(path) as file:
            torch.save(plain({"schema_version": SCHEMA_VERSION, **contents}), file)
            write_checksum(file)
    except (OSError, RuntimeError) as error:
        # torch raises a RuntimeError about its internals while it handles the system's error
        cause = error if isinstance(error, OSError) else error.__context__
        reason = describe_error(error)
        if isinstance(cause, OSError):
            reason = cause.strerror or first_line(cause)
        raise CheckpointError(f"{path}: cannot be written: {reason}") from error


def load_checkpoint(path: str | Path, weights: str | None = None) -> dict[str, Any]:
    """Return the contents of a checkpoint with all tensors on the CPU.

    If another code base has written the file, its weights are under "state_dict" too, wherever they
    lie in the file (see `base.checkpoint.foreign_weights`). "assumed" then maps subjects to
    sentences on what was assumed about the file.

    Args:
        path: a checkpoint file, or a run folder for its best model.
        weights: which of several sets of weights in another code base's file.

    Raises:
        CheckpointError: the file is missing, damaged, not a checkpoint, or of a newer schema
            version; or it holds several sets of weights, and `weights` names none of them.
    """
    file = find_checkpoint(path)
    # Opened only once, because a running process may replace the file between two reads
    with _open(file) as opened:
        has_checksum = verify_checksum(opened, file)
        opened.seek(0)
        try:
            # torch warns of unusual pickles that it then refuses to read
            with warnings.catch_warnings(action="ignore"):
                contents = torch.load(opened, map_location="cpu", weights_only=True)
        except Exception as error:
            # A file of another kind can make torch's reader raise any exception
            reason = explain(opened, error)
            raise CheckpointError(f"{file}: is not a readable checkpoint: {reason}") from None
    if not isinstance(contents, dict) or "schema_version" not in contents:
        return _foreign(contents, file, weights)
    if weights is not None:
        asked = one_line(weights, 60)
        raise CheckpointError(
            f"--weights {asked}: {file} is this project's own; --ema takes its averaged weights"
        )
    if not isinstance(contents.get("state_dict"), dict):
        raise CheckpointError(f"{file}: is not a checkpoint: it holds no 'state_dict'")
    check_readable(contents, file)
    version = contents["schema_version"]
    if version > SCHEMA_VERSION:
        raise CheckpointError(
            f"{file}: has schema version {version}; this code reads versions up to {SCHEMA_VERSION}"
        )
    if version >= 2 and not has_checksum:
        raise CheckpointError(f"{file}: is damaged: its checksum is missing")
    return contents


@contextmanager
def _open(file: Path) -> Iterator[BinaryIO]:
    try:
        with file.open("rb") as opened:
            yield opened
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {first_line(error)}") from None


def _foreign(contents: Any, file: Path, weights: str | None) -> dict[str, Any]:
    """Return what another code base's file holds, under this project's keys."""
    state_dict, assumed = find_weights(contents, str(file), weights)
    beside = {}
    if isinstance(contents, dict) and contents is not state_dict:
        beside = contents
    # Other entries are kept if they mean the same here
    kept = without_unreadable(beside)
    # Many code bases store a "config", but with other keys than this project
    if not {"arch", "data_loader"} <= kept.get("config", {}).keys():
        kept.pop("config", None)
    # normalization_beside puts them among the weights, from where load_weights takes them
    for name in ("mean", "std"):
        kept.pop(name, None)
    return {**kept, "state_dict": state_dict | normalization_beside(beside), "assumed": assumed}


def plain(value: Any, convert: Callable[[Tensor], Tensor] = Tensor.detach) -> Any:
    """Return `value` in the plain types that `weights_only=True` reads.

    Mappings become dictionaries, sequences lists (tuples remain), and NumPy's numbers Python's.

    Args:
        value: nested values.
        convert: what each tensor becomes.

    Raises:
        TypeError: it contains something other than tensors and plain values.
    """
    if isinstance(value, Mapping):
        return {key: plain(item, convert) for key, item in value.items()}
    if type(value) is tuple:
        return tuple(plain(item, convert) for item in value)
    if isinstance(value, list | tuple):
        return [plain(item, convert) for item in value]
    if isinstance(value, Tensor):
        return convert(value)
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    # By type and not by isinstance above, because NumPy's float64 is a subclass of float
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"a checkpoint holds tensors and plain values only, not {type(value).__name__}")
