"""Which config values a resumed run may change, and which would make it another experiment."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from base.config import Config
from base.errors import CheckpointError, ConfigError
from base.optimization import spans_whole_run

CHANGE_NO_RESULT = (
    "name", "exper_name", "comet", "trainer.save_dir", "trainer.save_period", "trainer.keep_checkpoints", "trainer.verbosity",
    "trainer.label_dir", "trainer.tensorboard", "data_loader.args.num_workers", "data_loader.args.pin_memory",
    "system.device", "system.num_threads", "system.compile", "system.channels_last", "system.deterministic",
)  # fmt: skip
"""Config keys and sections that say where and how a run computes, not what: they change no result, but for rounding."""

MAY_CHANGE_ON_RESUME = (
    *CHANGE_NO_RESULT, "trainer.epochs", "trainer.early_stop", "n_gpu", "data_loader.args.data_dir",
    "adversarial.report", "adversarial.report_images",
)  # fmt: skip
"""Config keys that a resumed run may have other values for: none of them changes what is learnt from what, but for rounding."""


def refuse_other_experiment(before: Mapping[str, Any], config: Config, source: Path) -> None:
    """Refuse the first config value that differs from a checkpoint's and would make a resumed run another experiment.

    Raises:
        CheckpointError: the architecture differs.
        ConfigError: anything else that matters differs.
    """
    for key, old, new in _differences(before, config.dump()):
        if key.startswith("arch."):
            raise CheckpointError(f"{source}: is of another architecture: {key} is {old!r} there and {new!r} in this config")
        spans_run = key == "trainer.epochs" and spans_whole_run(config.lr_scheduler)
        if spans_run or (key not in MAY_CHANGE_ON_RESUME and key.partition(".")[0] not in MAY_CHANGE_ON_RESUME):
            why = f"; {config.lr_scheduler.type} spans the whole run" if spans_run else ""
            raise ConfigError(f"{key}: the run was started with {old!r}; {new!r} would make it another experiment{why}")


def _differences(before: Mapping[str, Any], after: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted key, old and new value of every leaf in which two trees differ."""
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{path}{key}.")
        elif old != new:
            yield f"{path}{key}", old, new
