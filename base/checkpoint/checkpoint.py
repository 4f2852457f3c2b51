"""Save and load checkpoints: the only code that touches checkpoint files.

A checkpoint holds tensors and plain Python values only and is always read with `weights_only=True`,
so reading one runs no code of it. Files of other codes, the original ConvNorm's (`arch, epoch,
state_dict, optimizer, monitor_best`) among them, are read the same way; they hold enough for
evaluation, not for resuming."""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from base.atomic import link_or_copy, replacing
from base.checkpoint.checksum import verify_checksum, write_checksum
from base.checkpoint.foreign_weights import (
    below,
    explain_rest,
    find_prefix,
    find_weights,
    first_keys,
    normalization_beside,
    rename,
)
from base.checkpoint.schema import check_readable, without_unreadable
from base.checkpoint.unreadable import explain
from base.errors import CheckpointError
from base.run_folder.names import BEST, LAST, NUMBERED
from base.text import first_line, one_line

SCHEMA_VERSION = 2
"""Of what is written here; since version 2 every checkpoint is sealed."""
LEVELS_TO_RUNS = 3
"""How far below a folder its runs are looked for: `<save_dir>/<name>/<run id>` is two levels."""


def save_checkpoint(path: Path, contents: Mapping[str, Any]) -> None:
    """Write `contents` to `path`, sealed (see `base.checkpoint.checksum`); at every moment the file
    is either the old one or the new one.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; the old file is
            untouched.
    """
    try:
        with replacing(path) as file:
            torch.save(plain({"schema_version": SCHEMA_VERSION, **contents}), file)
            write_checksum(file)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise CheckpointError(f"{path}: cannot be written: {first_line(error)}") from error


def publish_copy(source: Path, target: Path) -> None:
    """Give a saved checkpoint a second name: a hard link where the file system has them, a copy
    elsewhere.

    Raises:
        CheckpointError: the folder cannot be written; an older `target` is untouched.
    """
    try:
        link_or_copy(source, target)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written: {first_line(error)}") from error


def keep_newest(folder: Path, count: int, epoch: int) -> None:
    """Of a run folder's numbered checkpoints up to `epoch`, remove all but the `count` newest.

    Later ones belong to a future that a resumed run has left; they stay until it writes them anew.
    """
    old = [
        path for number, path in sorted(numbered(folder).items(), reverse=True) if number <= epoch
    ]
    for path in old[count:]:
        path.unlink(missing_ok=True)


def numbered(folder: Path) -> dict[int, Path]:
    """Epoch -> file of a run folder's numbered checkpoints."""
    pattern = re.compile(NUMBERED.format(r"(\d+)").replace(".", r"\."))
    return {
        int(match[1]): path for path in folder.glob("*") if (match := pattern.fullmatch(path.name))
    }


def has_checkpoint(folder: Path) -> bool:
    """Whether a run has saved anything in `folder`, be it good or not: then nothing may begin anew
    there."""
    return any((folder / name).exists() for name in (LAST, BEST)) or bool(numbered(folder))


def the_run_in(path: str | Path) -> Path:
    """The run folder that `path` means: of a folder without checkpoints the only one below it.

    Returns:
        `path` itself where it is a file, a run folder, or a folder without runs below it.

    Raises:
        CheckpointError: several runs lie below it.
    """
    path = Path(path)
    if not path.is_dir() or has_checkpoint(path):
        return path
    runs = _runs_below(path, LEVELS_TO_RUNS)
    if len(runs) > 1:
        newest = ", ".join(one_line(run) for run in runs[-5:])
        raise CheckpointError(
            f"{path}: holds {len(runs)} runs: name one, such as (newest last) {newest}"
        )
    return runs[0] if runs else path


def _runs_below(folder: Path, levels: int) -> list[Path]:
    """The folders with checkpoints below `folder`, each once, by the time of their last
    checkpoint."""
    ages: dict[Path, tuple[float, Path]] = {}
    for run in _folders_with_checkpoints(folder, levels):
        age = max(
            (file.stat().st_mtime for file in run.glob("*.pth") if file.exists()), default=0.0
        )
        ages.setdefault(run.resolve(), (age, run))
    return [run for _, run in sorted(ages.values())]


def _folders_with_checkpoints(folder: Path, levels: int) -> Iterator[Path]:
    try:
        # links come last: where one leads to a run that lies here, too, the run's own name is taken
        children = sorted(folder.iterdir(), key=lambda child: (child.is_symlink(), child.name))
        for child in children:
            if not child.is_dir():
                continue
            if has_checkpoint(child):
                yield child
            elif levels > 1:
                yield from _folders_with_checkpoints(child, levels - 1)
    except OSError:
        # a run in a folder that may not be read could not be read either
        return


def set_aside(file: Path) -> Path:
    """Rename a damaged checkpoint, so that nothing is written over what is left of it; returns the
    new name.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    kept, number = file.with_name(f"{file.name}.damaged"), 1
    while kept.exists():
        number += 1
        kept = file.with_name(f"{file.name}.damaged-{number}")
    try:
        return file.rename(kept)
    except OSError as error:
        raise CheckpointError(f"{kept}: cannot be written: {first_line(error)}") from error


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint file that `path` means: itself, or of a run folder the best model, before
    there is one the last. A folder above a single run stands for that run.

    Raises:
        CheckpointError: there is none, or `path` is a folder above several runs.
    """
    path = the_run_in(path)
    if path.is_dir():
        for name in (BEST, LAST):
            if (path / name).is_file():
                return path / name
        raise CheckpointError(f"{path}: holds neither {BEST} nor {LAST}")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    return path


def load_to_resume(path: str | Path) -> tuple[Path, dict[str, Any], str | None]:
    """The checkpoint to go on from: `path` itself, or in a run folder the last one. Where that one
    is missing or damaged, the newest good one beside it. A folder above a single run stands for
    that run.

    Returns:
        Its file, its contents, and, where it is not the last one, what is wrong with that.

    Raises:
        CheckpointError: the folder holds no undamaged checkpoint, the named file is missing or
            damaged, or `path` is a folder above several runs.
    """
    folder = the_run_in(path)
    if not folder.is_dir():
        return folder, load_checkpoint(folder), None
    last = folder / LAST
    try:
        return last, load_checkpoint(last), None
    except CheckpointError as error:
        problem = error
    good = []
    beside = [file for _, file in sorted(numbered(folder).items(), reverse=True)]
    for candidates in (beside, [folder / BEST]):
        for file in candidates:
            try:
                good.append((file, load_checkpoint(file)))
                break
            except CheckpointError:
                continue
    if not good:
        others = (
            f", and nothing better lies beside it ({len(beside)} numbered, {BEST})"
            if has_checkpoint(folder)
            else ""
        )
        raise CheckpointError(f"{problem}{others}")
    file, contents = max(
        good, key=lambda found: (found[1].get("epoch", 0), found[1].get("batch", 0))
    )
    return file, contents, str(problem)


def load_checkpoint(path: str | Path, weights: str | None = None) -> dict[str, Any]:
    """The contents of a checkpoint file, or of a run folder's best model, with all tensors on the
    CPU.

    A file that another code has written has its weights under "state_dict", too, wherever they lie
    in it (see `base.checkpoint.foreign_weights`), and under "assumed" what was taken for what: what
    about -> a sentence.

    Args:
        path: the file or folder.
        weights: which of several sets of weights in another code's file.

    Raises:
        CheckpointError: the file is missing, damaged, no checkpoint, or of a newer schema version;
            or it holds several sets of weights, and `weights` names none of them.
    """
    file = find_checkpoint(path)
    # opened once, because another file may take its name between two reads
    with _opened(file) as opened:
        sealed = verify_checksum(opened, file)
        opened.seek(0)
        try:
            # torch warns of odd pickles that it then refuses
            with warnings.catch_warnings(action="ignore"):
                contents = torch.load(opened, map_location="cpu", weights_only=True)
        except Exception as error:  # a file of another kind may make torch's reader raise anything
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
    if version >= 2 and not sealed:
        raise CheckpointError(f"{file}: is damaged: the digest that it was written with is missing")
    return contents


@contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    try:
        with file.open("rb") as opened:
            yield opened
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {first_line(error)}") from None


def _foreign(contents: Any, file: Path, weights: str | None) -> dict[str, Any]:
    """What another code's file holds, in this project's names. Of its other entries those stay that
    mean the same here."""
    state_dict, assumed = find_weights(contents, str(file), weights)
    beside = contents if isinstance(contents, dict) and contents is not state_dict else {}
    kept = without_unreadable(beside)
    if not {"arch", "data_loader"} <= kept.get("config", {}).keys():
        # of another code
        kept.pop("config", None)
    for name in ("mean", "std"):
        kept.pop(name, None)
    return {**kept, "state_dict": state_dict | normalization_beside(beside), "assumed": assumed}


def load_weights(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    source: str | Path,
    how_to_choose: str = "arch.type and arch.args, by -c CONFIG or --set",
) -> dict[str, str]:
    """Copy the weights into `model`, whatever prefix a wrapper has put before their keys.

    A mean and std among them (`mu` and `sigma`) become the model's own. What else lies beside the
    weights has to be known not to matter; see `base.checkpoint.foreign_weights`.

    Args:
        model: gets the weights.
        state_dict: the weights.
        source: the file, for errors.
        how_to_choose: what another network is chosen by, for errors.

    Returns:
        What was assumed, what about -> a sentence; empty where the keys are the model's.

    Raises:
        CheckpointError: the weights belong to another architecture; the message names the first
            keys of both sides.
    """
    if not all(isinstance(key, str) for key in state_dict):
        raise CheckpointError(
            f"{source}: is not a checkpoint: its weights have keys that are no names:"
            f" {first_keys(state_dict)}"
        )
    own, source = list(model.state_dict()), str(source)
    given, (state_dict, renamed) = state_dict, rename(model, state_dict)
    prefix, copies = find_prefix(own, state_dict, source)
    state = below(state_dict, prefix)
    _check_types(model, state, source)
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        difference = str(error).splitlines()[-1].strip()
        raise CheckpointError(
            f"{source}: does not fit {type(model).__name__}: {difference.rstrip('.')}; give the"
            f" network that it was trained as ({how_to_choose}), with its num_classes, width and depth"
        ) from None
    rest = {key: value for key, value in state_dict.items() if not key.startswith(prefix)}
    rest |= {prefix + key: state[key] for key in unexpected}
    unexplained, assumed = explain_rest(model, state, rest, prefix, copies, source)
    if missing or unexplained:
        raise CheckpointError(
            f"{source}: is of another architecture than this {type(model).__name__}:"
            f" {_difference(missing, unexplained)}; its keys: {first_keys(given)};"
            f" the model's: {first_keys(own)}; {_advice(missing, how_to_choose)}"
        )
    dropped = {"keys": f"the prefix {one_line(prefix, 60)!r} is dropped"} if prefix else {}
    return renamed | dropped | assumed


def _check_types(model: nn.Module, state: Mapping[str, Any], source: str) -> None:
    """Refuse what torch would copy into the weights as something else: integers of a quantized
    model, complex numbers, and tensors that are not dense or hold nothing."""
    for key, own in model.state_dict().items():
        value = state.get(key)
        if not isinstance(value, Tensor) or not own.is_floating_point():
            continue
        is_dense = value.layout == torch.strided and not value.is_meta
        if not is_dense or not value.is_floating_point():
            kind = "a meta tensor" if value.is_meta else f"{value.dtype}, {value.layout}"
            raise CheckpointError(
                f"{source}: {key!r} is {kind.replace('torch.', '')};"
                " expected a dense tensor of floating-point numbers"
            )


def _difference(missing: Sequence[str], unexplained: Sequence[str]) -> str:
    parts = []
    if missing:
        parts.append(f"it lacks {len(missing)} of the model's keys ({missing[0]}, ...)")
    if unexplained:
        first = one_line(unexplained[0], 80)
        parts.append(f"it has {len(unexplained)} keys that the model has not ({first}, ...)")
    return " and ".join(parts)


def _advice(missing: Sequence[str], how_to_choose: str) -> str:
    if missing:
        return f"give the network that it was trained as ({how_to_choose}), or rename its keys"
    return (
        "save it without them if its network does not use them; if it does, it is another network"
    )


def plain(value: Any) -> Any:
    """`value` with every mapping as a dict, every sequence as a list or tuple, and numbers of numpy
    as Python's.

    Raises:
        TypeError: something else than tensors and plain values is in it.
    """
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return (
            type(value)(map(plain, value))
            if type(value) in (list, tuple)
            else list(map(plain, value))
        )
    if isinstance(value, Tensor):
        return value.detach()
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    if hasattr(value, "item"):  # NumPy's scalars, of which float64 is even a subclass of float
        return value.item()
    raise TypeError(f"a checkpoint holds tensors and plain values only, not {type(value).__name__}")
