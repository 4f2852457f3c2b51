"""Resume a run: find its checkpoint, check it, and merge its config with new values.

A resumed run may change where and how it computes, but not what: a value that would make it another
experiment is refused.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base.checkpoint.checkpoint import load_checkpoint
from base.checkpoint.find import find_run, has_checkpoint, numbered_checkpoints
from base.checkpoint.schema import check_training_state
from base.config import Config, Override, validate
from base.config.files import (
    origins_named,
    override_layers,
    read_layers,
    run_imports,
    validate_layers,
)
from base.config.imports import OwnCode, changes, imported_for, requests_of
from base.config.origins import Layer
from base.config.section import lies_in
from base.distributed import from_primary
from base.errors import CheckpointError, ConfigError
from base.optim.schedules import spans_whole_run
from base.run_folder.names import BEST, LAST
from base.text import first_line

CHANGE_NO_RESULT = (
    "name",
    "exper_name",
    "comet",
    "trainer.save_dir",
    "trainer.save_period",
    "trainer.keep_checkpoints",
    "trainer.verbosity",
    "trainer.label_dir",
    "trainer.tensorboard",
    "data_loader.args.num_workers",
    "data_loader.args.pin_memory",
    "system.device",
    "system.num_threads",
    "system.compile",
    "system.channels_last",
    "system.deterministic",
)
"""Config keys and sections that change no result beyond rounding, whatever their values."""

DATA_DIR, NOISE_FILE = "data_loader.args.data_dir", "trainer.noise_file"
IMPORTS = "imports"
WHERE_AND_HOW = (*CHANGE_NO_RESULT, DATA_DIR, NOISE_FILE, IMPORTS)
"""Config keys and sections that say where and how a run computes, not what.

Images, noisy labels and the user's own code may lie elsewhere: a resumed run compares their
contents with those it started with.
"""

FILLED_FROM_DATA = ("arch.args.num_classes", "arch.args.in_channels")
"""Config keys that the data set decides. A run fills them into its config if they are missing, so
that its checkpoints can be loaded without the data."""

MAY_CHANGE_ON_RESUME = (
    *WHERE_AND_HOW,
    "trainer.epochs",
    "trainer.early_stop",
    "n_gpu",
    "adversarial.report",
    "adversarial.report_images",
)
"""Config keys that a resumed run may have other values for. None of them changes what is learned,
beyond rounding."""


@dataclass(frozen=True)
class SavedRun:
    """A run to continue.

    Attributes:
        file: the checkpoint.
        checkpoint: its contents.
        config: the config to continue with.
        problem: what is wrong with the last checkpoint, if `file` is an earlier one; otherwise
            None.
        changed_code: a warning for each file of the user's code that has changed since the run
            started.
    """

    file: Path
    checkpoint: dict[str, Any]
    config: Config
    problem: str | None = None
    changed_code: tuple[str, ...] = ()

    def set_aside_damaged(self) -> str | None:
        """Rename a damaged last checkpoint before training writes a new one; return a warning.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        if self.problem is None:
            return None
        new_name = from_primary(lambda: _set_aside(self.file.parent / LAST))
        kept = f" (kept as {new_name})" if new_name else ""
        return f"{self.problem}{kept}: resuming from {self.file.name} instead"


def saved_run(
    path: str,
    config_file: str | None = None,
    overrides: Iterable[Override] = (),
    imports: Iterable[str | os.PathLike[str]] = (),
) -> SavedRun:
    """Read and check the run that `experiment.resume` continues. Rank 0 reads it for all ranks.

    Args:
        path: a checkpoint file, or a run folder for its last checkpoint or, if that is damaged, the
            newest undamaged one.
        config_file: a config whose values replace those of the run.
        overrides: single values that replace those of the run.
        imports: the user's own code to import, as `--imports` names it. What the checkpoint names
            is not imported, only what `config_file` names.

    Raises:
        CheckpointError: there is no undamaged checkpoint, or the checkpoint has another
            architecture or needs code that was not imported.
        ConfigError: a replaced value would make it another experiment.
    """
    files = read_layers(config_file) if config_file else []
    # before the checkpoint is read, because its config may hold names that the code registers
    _, given = run_imports(files, imports)
    file, checkpoint, problem, own_config = from_primary(lambda: _read(path))
    own_code = imported_for(own_config.imports, str(file))
    code = {code.name: code for code in [*own_code, *given]}
    layers = [Layer(str(file), checkpoint["config"]), *files, *override_layers(overrides)]
    config = validate_layers(layers, list(code.values()), config_file or str(file))
    with origins_named(config):
        # own_config and not checkpoint["config"], which lacks keys that are newer than the run
        check_same_experiment(own_config.dump(), config, file)
        check_epochs(checkpoint, config, file)
    changed_code = changes(own_config.imports, config.imports)
    return SavedRun(file, checkpoint, config, problem, tuple(changed_code))


def _read(path: str) -> tuple[Path, dict[str, Any], str | None, Config]:
    """Return what `load_to_resume` returns, checked, and the checkpoint's own config."""
    file, checkpoint, problem = load_to_resume(path)
    check_training_state(checkpoint, file)
    imported_for(recorded_imports(checkpoint["config"], file), str(file))
    try:
        config = validate(checkpoint["config"], str(file))
    except ConfigError as error:
        raise CheckpointError(f"{error}: the checkpoint's own config cannot be used") from None
    return file, checkpoint, problem, config


def load_to_resume(path: str | Path) -> tuple[Path, dict[str, Any], str | None]:
    """Load the checkpoint to continue from.

    Args:
        path: a checkpoint file; a run folder, for its last checkpoint or, if that is missing or
            damaged, its newest undamaged one; or a folder above a single run, for that run.

    Returns:
        Its file, its contents and, if it is not the last one, what is wrong with the last one.

    Raises:
        CheckpointError: the folder holds no undamaged checkpoint, the named file is missing or
            damaged, or `path` is a folder above several runs.
    """
    folder = find_run(path)
    if not folder.is_dir():
        return folder, load_checkpoint(folder), None
    last = folder / LAST
    try:
        return last, load_checkpoint(last), None
    except CheckpointError as error:
        problem = str(error)
    by_age = sorted(numbered_checkpoints(folder).items(), reverse=True)
    numbered = [file for _, file in by_age]
    # the best checkpoint may be newer than the newest numbered one
    candidates = [*_first_undamaged(numbered), *_first_undamaged([folder / BEST])]
    if not candidates:
        others = ""
        if has_checkpoint(folder):
            others = f", and nothing better lies beside it ({len(numbered)} numbered, {BEST})"
        raise CheckpointError(f"{problem}{others}")

    def age(candidate: tuple[Path, dict[str, Any]]) -> tuple[int, int]:
        _, contents = candidate
        return contents.get("epoch", 0), contents.get("batch", 0)

    file, contents = max(candidates, key=age)
    return file, contents, problem


def _first_undamaged(files: Iterable[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """Return the first file that can be loaded with its contents; an empty list if none can."""
    for file in files:
        try:
            return [(file, load_checkpoint(file))]
        except CheckpointError:
            continue
    return []


def _set_aside(file: Path) -> str | None:
    """Rename a damaged checkpoint, so that it is not overwritten; return its new name.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    if not file.exists():
        return None
    kept = file.with_name(f"{file.name}.damaged")
    number = 1
    while kept.exists():
        number += 1
        kept = file.with_name(f"{file.name}.damaged-{number}")
    try:
        file.rename(kept)
    except OSError as error:
        raise CheckpointError(f"{kept}: cannot be written: {first_line(error)}") from error
    return kept.name


def recorded_imports(tree: Any, source: Path) -> list[OwnCode]:
    """Return the user's code that the config of a checkpoint or a run folder names.

    Raises:
        CheckpointError: the value of its key `imports` is of another type.
    """
    named = tree.get(IMPORTS) if isinstance(tree, Mapping) else None
    try:
        requests = requests_of(named or [], f"{source}: {IMPORTS}", source.parent)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    return [request.code for request in requests]


def check_epochs(checkpoint: Mapping[str, Any], config: Config, source: Path) -> None:
    """Check that the run has not done more epochs than the config asks for.

    Raises:
        ConfigError: naming both numbers.
    """
    done = checkpoint["epoch"]
    if config.trainer.epochs < done:
        raise ConfigError(
            f"trainer.epochs: {config.trainer.epochs}, but {source} has done {done} epochs already"
        )


def check_same_experiment(before: Mapping[str, Any], config: Config, source: Path) -> None:
    """Check that no value of the config would make a resumed run another experiment.

    Args:
        before: the config's tree in the checkpoint.
        config: the config to continue with.
        source: the checkpoint's file.

    Raises:
        CheckpointError: the architecture differs.
        ConfigError: another value differs that may not change.
    """
    for key, old, new in _differences(before, config.dump()):
        if key in FILLED_FROM_DATA and new is None:
            continue
        if key.startswith("arch."):
            raise CheckpointError(
                f"{source}: is of another architecture: {key} is {old!r} there"
                f" and {new!r} in this config"
            )
        # with such a schedule, another number of epochs changes every learning rate
        spans_run = key == "trainer.epochs" and spans_whole_run(config.lr_scheduler)
        if spans_run or not lies_in(key, MAY_CHANGE_ON_RESUME):
            why = f"; {config.lr_scheduler.type} spans the whole run" if spans_run else ""
            raise ConfigError(
                f"{key}: the run was started with {old!r};"
                f" {new!r} would make it another experiment{why}"
            )


def config_hash(config: Config) -> str:
    """Return a SHA-256 hash of all config values that say what a run computes, its seed included.

    Values at their default are left out, so that a key that is added later changes no hash. So are
    `WHERE_AND_HOW` and the values that the data set decides, which a run may have filled in.
    """
    tree = config.model_dump(mode="json", exclude_defaults=True, exclude_none=True)
    # each adversarial method has its own defaults, which pydantic does not know
    defaults = config.adversarial.defaults(config.adversarial.chosen(config))
    for key, default in defaults.items():
        if tree.get("adversarial", {}).get(key) == default:
            del tree["adversarial"][key]
    for key in (*WHERE_AND_HOW, *FILLED_FROM_DATA):
        remove_place(tree, key)
    filled = _without_empty_sections(tree)
    return hashlib.sha256(json.dumps(filled, sort_keys=True).encode()).hexdigest()


def remove_place(tree: dict[str, Any], key: str) -> None:
    """Remove a key of `WHERE_AND_HOW` from a config's tree, but not what decides the results."""
    *sections, name = key.split(".")
    for section in sections:
        tree = tree.get(section, {})
    if key == IMPORTS and tree.get(name):
        # the code itself matters, and its place does not
        tree[name] = digests(tree[name])
    elif key == NOISE_FILE and tree.get(name) is not None:
        # it matters that there is one
        tree[name] = ""
    else:
        tree.pop(name, None)


def digests(imports: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what identifies the user's code wherever it lies.

    This is the digest of each file, or the name of a module that has none.
    """
    return [code.get("sha256") or code.get("module") or "" for code in imports]


def _without_empty_sections(tree: dict[str, Any]) -> dict[str, Any]:
    filled = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            value = _without_empty_sections(value)
        if value != {}:
            filled[key] = value
    return filled


def _differences(
    before: Mapping[str, Any], after: Mapping[str, Any], path: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Yield dotted key, old and new value of every leaf in which two trees differ."""
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{path}{key}.")
        elif old != new:
            yield f"{path}{key}", old, new
