"""Which config values may differ between runs of one experiment, and a hash of those that may not.

A resumed run, a study, a table and several processes all compare configs by these rules.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from base.config.config import Config
from base.config.files import IMPORTS
from base.config.section import lies_in
from base.config.tree import leaves
from base.errors import CheckpointError, ConfigError
from base.optim.schedules import spans_whole_run

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
    earlier, now = leaves(dict(before)), leaves(config.dump())
    for key in sorted(earlier.keys() | now.keys()):
        old, new = earlier.get(key), now.get(key)
        if old == new:
            continue
        if key in FILLED_FROM_DATA and new is None:
            continue
        if key.startswith("arch."):
            raise CheckpointError(
                f"{source}: is of another architecture: {key} is {old!r} there"
                f" and {new!r} in this config"
            )
        # With such a schedule, another number of epochs changes every learning rate
        spans_run = key == "trainer.epochs" and spans_whole_run(config.lr_scheduler)
        if spans_run or not lies_in(key, MAY_CHANGE_ON_RESUME):
            why = f"; {config.lr_scheduler.type} spans the whole run" if spans_run else ""
            raise ConfigError(
                f"{key}: the run was started with {old!r};"
                f" {new!r} would make it another experiment{why}"
            )


def is_place(key: str) -> bool:
    """Return whether a dotted key, or the section that it lies in, is one of `WHERE_AND_HOW`."""
    return lies_in(key, WHERE_AND_HOW)


def config_hash(config: Config, keep: Collection[str] = ()) -> str:
    """Return a SHA-256 hash of all config values that say what a run computes, its seed included.

    Values at their default are left out, so that a key that is added later changes no hash. So are
    `WHERE_AND_HOW` and the values that the data set decides, which a run may have filled in.

    Args:
        config: the resolved config.
        keep: dotted keys that are hashed although they would be left out, such as those that a
            grid compares.
    """
    tree = config.model_dump(mode="json", exclude_defaults=True, exclude_none=True)
    # Each adversarial method has its own defaults, which pydantic does not know
    defaults = config.adversarial.defaults(config.adversarial.chosen(config))
    for key, default in defaults.items():
        if tree.get("adversarial", {}).get(key) == default:
            del tree["adversarial"][key]
    for place in (*WHERE_AND_HOW, *FILLED_FROM_DATA):
        if not any(lies_in(key, [place]) for key in keep):
            _remove_place(tree, place)
    filled = _without_empty_sections(tree)
    return hashlib.sha256(json.dumps(filled, sort_keys=True).encode()).hexdigest()


def _remove_place(tree: dict[str, Any], key: str) -> None:
    """Remove a key of `WHERE_AND_HOW` from a config's tree, but not what decides the results."""
    *sections, name = key.split(".")
    for section in sections:
        tree = tree.get(section, {})
    if key == IMPORTS and tree.get(name):
        # The code itself matters, and its place does not
        tree[name] = digests(tree[name])
    elif key == NOISE_FILE and tree.get(name) is not None:
        # It matters that there is one
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
