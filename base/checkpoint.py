"""Save and load checkpoints: the only code that touches checkpoint files.

A checkpoint holds tensors and plain Python values only and is always read with `weights_only=True`, so reading one runs no
code of it. Checkpoints of the original ConvNorm (`arch, epoch, state_dict, optimizer, monitor_best`) are read the same way;
they hold enough for evaluation, not for resuming.
"""

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from base.errors import CheckpointError

SCHEMA_VERSION = 1
BEST, LAST, NUMBERED = "model_best.pth", "model_last.pth", "model_epoch_{}.pth"


def save_checkpoint(path: Path, contents: Mapping[str, Any]) -> None:
    """Write `contents` to `path` so that the file is at every moment either the old one or the new one, complete.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; the old file is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(plain({"schema_version": SCHEMA_VERSION, **contents}), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: cannot be written: {str(error).splitlines()[0]}") from error


def publish_copy(source: Path, target: Path) -> None:
    """Give a saved checkpoint a second name: a hard link where the file system has them, a copy elsewhere.

    A link is safe because checkpoints are only ever replaced as a whole, never written in place.

    Raises:
        CheckpointError: the folder cannot be written; an older `target` is untouched.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        try:
            temporary.hardlink_to(source)
        except OSError:
            temporary.write_bytes(source.read_bytes())
        temporary.replace(target)
        temporary.unlink(missing_ok=True)  # replacing a link by another one to the same file does nothing
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{target}: cannot be written: {error.strerror}") from error


def keep_newest(folder: Path, count: int, epoch: int) -> None:
    """Of a run folder's numbered checkpoints up to `epoch`, remove all but the `count` newest.

    Later ones belong to a future that a resumed run has left; they stay until it writes them anew.
    """
    pattern = re.compile(NUMBERED.format(r"(\d+)").replace(".", r"\."))
    numbered = {int(match[1]): path for path in folder.iterdir() if (match := pattern.fullmatch(path.name))}
    for number in sorted(n for n in numbered if n <= epoch)[:-count]:
        numbered[number].unlink(missing_ok=True)


def find_checkpoint(path: str | Path, prefer: str = BEST) -> Path:
    """The checkpoint file that `path` means: itself, or in a run folder `prefer` and else the other of best and last.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if path.is_dir():
        for name in (prefer, BEST, LAST):
            if (path / name).is_file():
                return path / name
        raise CheckpointError(f"{path}: holds neither {BEST} nor {LAST}")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    return path


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The contents of a checkpoint file, or of a run folder's best model, with all tensors on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged, no checkpoint, or of a newer schema version.
    """
    file = find_checkpoint(path)
    try:
        contents = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{file}: is no readable checkpoint: damaged, or more than tensors and plain values in it; nothing of it was run"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{file}: is no readable checkpoint: {reason}") from None
    if not isinstance(contents, dict) or not isinstance(contents.get("state_dict"), dict):
        raise CheckpointError(f"{file}: is no checkpoint: it holds no 'state_dict'")
    version = contents.get("schema_version", 0)
    if version > SCHEMA_VERSION:
        raise CheckpointError(f"{file}: has schema version {version}; this code reads versions up to {SCHEMA_VERSION}")
    return contents


def load_weights(model: nn.Module, state_dict: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy the weights into `model`; the prefixes of DataParallel and `torch.compile` are dropped.

    Raises:
        CheckpointError: the weights belong to another architecture; the message names both sides' first differing key.
    """
    state = {re.sub(r"^((module|_orig_mod)\.)+", "", key): value for key, value in state_dict.items()}
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        difference = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"{source}: does not fit {type(model).__name__}: {difference}") from None
    if missing or unexpected:
        lacks = f"it lacks {len(missing)} of the model's keys ({missing[0]}, ...)" if missing else ""
        has = f"it has {len(unexpected)} keys that the model has not ({unexpected[0]}, ...)" if unexpected else ""
        both = " and ".join(filter(None, (lacks, has)))
        raise CheckpointError(f"{source}: is of another architecture than this {type(model).__name__}: {both}")


def plain(value: Any) -> Any:
    """`value` with every mapping as a dict, every sequence as a list or tuple, and numbers of numpy as Python's.

    Raises:
        TypeError: something else than tensors and plain values is in it.
    """
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain, value)) if type(value) in (list, tuple) else list(map(plain, value))
    if isinstance(value, Tensor):
        return value.detach()
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    if hasattr(value, "item"):  # NumPy's scalars, of which float64 is even a subclass of float
        return value.item()
    raise TypeError(f"a checkpoint holds tensors and plain values only, not {type(value).__name__}")


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
