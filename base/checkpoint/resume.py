"""A run to continue: its checkpoint, its config, and which values of that may change without making
it another experiment."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base.checkpoint.checkpoint import load_to_resume, set_aside
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
from base.run_folder.names import LAST

CHANGE_NO_RESULT = (
    "name", "exper_name", "comet", "trainer.save_dir", "trainer.save_period", "trainer.keep_checkpoints", "trainer.verbosity",
    "trainer.label_dir", "trainer.tensorboard", "data_loader.args.num_workers", "data_loader.args.pin_memory",
    "system.device", "system.num_threads", "system.compile", "system.channels_last", "system.deterministic",
)  # fmt: skip
"""Config keys and sections that change no result, whatever their values are, but for rounding."""

DATA_DIR, NOISE_FILE = "data_loader.args.data_dir", "trainer.noise_file"
IMPORTS = "imports"
WHERE_AND_HOW = (*CHANGE_NO_RESULT, DATA_DIR, NOISE_FILE, IMPORTS)
"""Config keys and sections that say where and how a run computes, not what. Images, noisy labels
and files of the user's own code may move: a resumed run compares them with what it began with."""

FILLED_FROM_DATA = ("arch.args.num_classes", "arch.args.in_channels")
"""Config keys that the data set decides. A run writes them into its config where that leaves them
open, so that its checkpoints can be loaded without the data."""

MAY_CHANGE_ON_RESUME = (
    *WHERE_AND_HOW, "trainer.epochs", "trainer.early_stop", "n_gpu",
    "adversarial.report", "adversarial.report_images",
)  # fmt: skip
"""Config keys that a resumed run may have other values for: none of them changes what is learned
from what, but for rounding."""


@dataclass(frozen=True)
class SavedRun:
    """A run to continue.

    Attributes:
        file: the checkpoint.
        checkpoint: its contents.
        config: to go on with.
        problem: what is wrong with the last checkpoint, where this is an earlier one instead of it;
            None otherwise.
        changed_code: a warning for each file of the user's code that has changed since the run
            began.
    """

    file: Path
    checkpoint: dict[str, Any]
    config: Config
    problem: str | None = None
    changed_code: tuple[str, ...] = ()

    def set_aside_damaged(self) -> str | None:
        """Keep a damaged last checkpoint under another name, as training writes a new one; returns
        what there is to warn of.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        if self.problem is None:
            return None
        last = self.file.parent / LAST
        kept = from_primary(lambda: set_aside(last).name if last.exists() else None)
        kept = f" (kept as {kept})" if kept else ""
        return f"{self.problem}{kept}: going on from {self.file.name} instead"


def saved_run(
    path: str,
    config_file: str | None = None,
    overrides: Iterable[Override] = (),
    imports: Iterable[str | os.PathLike[str]] = (),
) -> SavedRun:
    """Read what `Experiment.resume` continues: the checkpoint, which rank 0 reads for all, and the
    config it will have.

    Args:
        path: a checkpoint file, or a run folder, whose last checkpoint is taken, or, if that is
            damaged, its newest good one.
        config_file: values that replace those of the run.
        overrides: likewise, single values.
        imports: the user's own code to import, as `--imports` names it. What the checkpoint names
            is not imported, only what `config_file` does.

    Raises:
        CheckpointError: no undamaged checkpoint was found, or the checkpoint has another
            architecture or needs code that was not imported.
        ConfigError: a replaced value would make it another experiment.
    """
    files = read_layers(config_file) if config_file else []
    # every process imports, before it reads what may hold the names
    _, given = run_imports(files, imports)
    file, checkpoint, problem, own = from_primary(lambda: _read(path))
    code = {code.name: code for code in [*imported_for(own.imports, str(file)), *given]}
    layers = [Layer(str(file), checkpoint["config"]), *files, *override_layers(overrides)]
    config = validate_layers(layers, list(code.values()), config_file or str(file))
    before = own.dump()  # with the defaults of keys that are newer than it
    with origins_named(config):
        check_same_experiment(before, config, file)
        check_epochs(checkpoint, config, file)
    return SavedRun(file, checkpoint, config, problem, tuple(changes(own.imports, config.imports)))


def _read(path: str) -> tuple[Path, dict[str, Any], str | None, Config]:
    """See `load_to_resume`; what it found holds all that a run goes on from, its config among
    it."""
    file, checkpoint, problem = load_to_resume(path)
    if "config" not in checkpoint:
        raise CheckpointError(
            f"{file}: holds no config (ConvNorm's own format): it can be evaluated, not resumed"
        )
    imported_for(recorded_imports(checkpoint["config"], file), str(file))
    try:
        config = validate(checkpoint["config"], str(file))
    except ConfigError as error:
        raise CheckpointError(f"{error}: the checkpoint's own config cannot be used") from None
    check_training_state(checkpoint, file)
    return file, checkpoint, problem, config


def recorded_imports(tree: Any, source: Path) -> list[OwnCode]:
    """The user's code that the config of a checkpoint or a run folder names.

    Raises:
        CheckpointError: what it holds there is not that.
    """
    named = tree.get(IMPORTS) if isinstance(tree, Mapping) else None
    try:
        return [
            request.code
            for request in requests_of(named or [], f"{source}: {IMPORTS}", source.parent)
        ]
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def check_epochs(checkpoint: Mapping[str, Any], config: Config, source: Path) -> None:
    """Refuse a number of epochs that the run has exceeded already.

    Raises:
        ConfigError: naming both numbers.
    """
    done = checkpoint["epoch"]
    if config.trainer.epochs < done:
        raise ConfigError(
            f"trainer.epochs: {config.trainer.epochs}, but {source} has done {done} epochs already"
        )


def check_same_experiment(before: Mapping[str, Any], config: Config, source: Path) -> None:
    """Refuse the first config value that differs from a checkpoint's and would make a resumed run
    another experiment.

    Raises:
        CheckpointError: the architecture differs.
        ConfigError: anything else that matters differs.
    """
    for key, old, new in _differences(before, config.dump()):
        if key in FILLED_FROM_DATA and new is None:
            continue
        if key.startswith("arch."):
            raise CheckpointError(
                f"{source}: is of another architecture: {key} is {old!r} there and {new!r} in this config"
            )
        spans_run = key == "trainer.epochs" and spans_whole_run(config.lr_scheduler)
        if spans_run or not lies_in(key, MAY_CHANGE_ON_RESUME):
            why = f"; {config.lr_scheduler.type} spans the whole run" if spans_run else ""
            raise ConfigError(
                f"{key}: the run was started with {old!r}; {new!r} would make it another experiment{why}"
            )


def config_hash(config: Config) -> str:
    """SHA-256 of all values in a config that say what a run computes (see `WHERE_AND_HOW`), its
    seed among them.

    Values at their default are left out, so that a key that is added later changes no hash, and
    those that the data set decides, which a run may have filled in.
    """
    tree = config.model_dump(mode="json", exclude_defaults=True, exclude_none=True)
    defaults = config.adversarial.defaults(config.adversarial.chosen(config))
    for key, default in defaults.items():
        if tree.get("adversarial", {}).get(key) == default:
            del tree["adversarial"][key]
    for key in (*WHERE_AND_HOW, *FILLED_FROM_DATA):
        forget(tree, key)
    filled = _without_empty_sections(tree)
    return hashlib.sha256(json.dumps(filled, sort_keys=True).encode()).hexdigest()


def forget(tree: dict[str, Any], key: str) -> None:
    """Take a key of `WHERE_AND_HOW` out of the tree of a config. Where a noise file lies is
    forgotten, but not that there is one. The digests of the user's code are kept."""
    *sections, name = key.split(".")
    for section in sections:
        tree = tree.get(section, {})
    if key == IMPORTS and tree.get(name):
        tree[name] = digests(tree[name])
    elif key == NOISE_FILE and tree.get(name) is not None:
        tree[name] = ""
    else:
        tree.pop(name, None)


def digests(imports: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the user's code is, wherever it lies: the digest of each file, and the name of a module
    that has none."""
    return [code.get("sha256") or code.get("module") or "" for code in imports]


def _without_empty_sections(tree: dict[str, Any]) -> dict[str, Any]:
    below = {
        key: _without_empty_sections(value) if isinstance(value, dict) else value
        for key, value in tree.items()
    }
    return {key: value for key, value in below.items() if value != {}}


def _differences(
    before: Mapping[str, Any], after: Mapping[str, Any], path: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Dotted key, old and new value of every leaf in which two trees differ."""
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{path}{key}.")
        elif old != new:
            yield f"{path}{key}", old, new
