"""How far the runs of a study are, read from their folders, and the table of them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base.checkpoint import has_checkpoint
from base.checkpoint.resume import WHERE_AND_HOW, refuse_other_experiment
from base.config import Override, validate
from base.errors import ConfigError, ProjectError
from base.meters import is_accuracy
from base.run_folder.names import CONFIG, LAST, METRICS, RESULT
from base.text import one_line
from studies.grid import Run, format_value

NEW, BROKEN, RUNNING, ELSEWHERE, FINISHED, FAILED = (
    "new",
    "to resume",
    "running",
    "elsewhere",
    "finished",
    "failed",
)


@dataclass(frozen=True)
class Progress:
    """What the folder of a run says.

    Attributes:
        state: one of the six above; a folder alone does not know about `RUNNING`, `ELSEWHERE`
            (another process works on it) and `FAILED`.
        epoch: finished epochs.
        best: the monitored value at its best, or None.
    """

    state: str
    epoch: int
    best: float | None


def look(run: Run) -> Progress:
    """The progress of a run that nobody is working on, or of one that is being worked on.

    Raises:
        ConfigError: the folder holds a run of another config, or one of its files is damaged.
    """
    log = _log(run.folder / METRICS)
    mode, _, name = run.config.trainer.monitor.partition(" ")
    values = [epoch[name] for epoch in log if epoch.get(name) is not None] if name else []
    best = (max if mode == "max" else min)(values) if values else None
    finished, begun = (run.folder / RESULT).exists(), has_checkpoint(run.folder)
    if finished or begun:
        _refuse_another(run)
    if finished:
        _json(run.folder / RESULT, _text(run.folder / RESULT))
    return Progress(FINISHED if finished else BROKEN if begun else NEW, len(log), best)


def changed_places(run: Run) -> list[Override]:
    """What a run that has been begun was given other values of, and may be: the keys of
    `WHERE_AND_HOW`.

    Raises:
        ConfigError: its config.json is missing or damaged.
    """
    before, now = _config_of_folder(run), run.config.dump()
    changes = []
    for key in WHERE_AND_HOW:
        old, new = (_value_at(tree, key) for tree in (before, now))
        if old != new:
            changes.append((key, format_value(new)))
    return changes


def table(rows: Sequence[tuple[Run, Progress, float | None]]) -> str:
    """One line per run: name, state, epoch, best value, time left (of `(run, progress, seconds left
    or None)`)."""
    cells = [("run", "state", "epoch", "best", "left")]
    for run, progress, seconds_left in rows:
        epochs = f"{progress.epoch}/{run.config.trainer.epochs}"
        _, _, name = run.config.trainer.monitor.partition(" ")
        best = (
            ""
            if progress.best is None
            else f"{name} {progress.best:.2%}"
            if is_accuracy(name)
            else f"{name} {progress.best:.4g}"
        )
        cells.append(
            (
                run.name,
                progress.state,
                epochs,
                best,
                "" if seconds_left is None else as_duration(seconds_left),
            )
        )
    cells = [tuple(map(one_line, line)) for line in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )


def as_duration(seconds: float) -> str:
    """`3 h 05 min`, `12 min` or `40 s`."""
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes} min" if seconds >= 90 else f"{round(seconds)} s"


def _log(file: Path) -> list[dict[str, float]]:
    """The epochs logged so far; a line that is being written does not count yet."""
    if not file.exists():
        return []
    return [
        _json(file, line) for line in _text(file).splitlines(keepends=True) if line.endswith("\n")
    ]


def _text(file: Path) -> str:
    # JSON does not take what bytes that are not UTF-8 become
    return file.read_text(encoding="utf-8", errors="replace")


def _json(file: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(
            f"{file}: damaged: {error}; move {file.parent} away to begin again"
        ) from None


def _config_of_folder(run: Run) -> dict[str, Any]:
    """The resolved config in the run's folder, with the defaults of keys that are newer than it."""
    file = run.folder / CONFIG
    if not file.exists():
        raise ConfigError(f"{run.folder}: holds a checkpoint, but no config.json; move it away")
    return validate(_json(file, _text(file)), str(file)).dump()


def _value_at(tree: Any, key: str) -> Any:
    """The value at a dotted key; None where there is none."""
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def _refuse_another(run: Run) -> None:
    before = _config_of_folder(run)
    try:
        refuse_other_experiment(before, run.config, run.folder / LAST)
    except ProjectError as error:
        raise ConfigError(f"{run.folder}: holds another run than {run.name}: {error}") from None
