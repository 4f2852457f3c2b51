"""Resume a run: find its checkpoint, check it, and merge its config with new values.

A resumed run may change where and how it computes, but not what: a value that would make it another
experiment is refused.
"""

import os
from collections.abc import Iterable, Mapping
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
from base.config.same_experiment import IMPORTS, check_same_experiment
from base.distributed import from_primary
from base.errors import CheckpointError, ConfigError
from base.run_folder.names import BEST, LAST
from base.text import first_line


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
        CheckpointError: `path` holds no undamaged checkpoint, or the checkpoint has another
            architecture or needs code that was not imported.
        ConfigError: a replaced value would make it another experiment.
    """
    files = read_layers(config_file) if config_file else []
    # Before the checkpoint is read, because its config may hold names that the code registers
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
    if "config" not in checkpoint:
        raise CheckpointError(
            f"{file}: holds no config of this project: it can be evaluated, not resumed"
        )
    imported_for(recorded_imports(checkpoint["config"], file), str(file))
    try:
        config = validate(checkpoint["config"], str(file))
    except ConfigError as error:
        raise CheckpointError(f"{error}: the checkpoint's own config cannot be used") from None
    check_training_state(checkpoint, file)
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
    # The best checkpoint may be newer than the newest numbered one
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
