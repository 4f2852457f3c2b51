"""How far the runs of a study are, read from their run folders, and the table that shows it."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from base.checkpoint import has_checkpoint
from base.config import Override
from base.config.same_experiment import IMPORTS, WHERE_AND_HOW, check_same_experiment
from base.config.tree import value_at
from base.errors import ConfigError, ProjectError
from base.meters import is_accuracy
from base.run_folder.names import CONFIG, LAST
from base.run_folder.reader import RunFolder
from base.text import text_table
from studies.grid import StudyRun, format_value


class State(StrEnum):
    """The state of a run. A run folder alone only tells `NEW`, `INTERRUPTED` and `FINISHED`."""

    FINISHED = "finished"
    FAILED = "failed"
    RUNNING = "running"
    ELSEWHERE = "elsewhere"
    """Another process works on it."""
    INTERRUPTED = "to resume"
    NEW = "new"


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        state: its state.
        epoch: number of finished epochs.
        best: best value of the monitored metric; None if it has not been measured.
    """

    state: State
    epoch: int
    best: float | None


@dataclass(frozen=True)
class StatusRow:
    """One row of the table: a run, its progress, and the estimated time it still needs.

    Attributes:
        run: the run.
        progress: how far it is.
        seconds_left: None if it is unknown.
    """

    run: StudyRun
    progress: Progress
    seconds_left: float | None


def read_progress(run: StudyRun) -> Progress:
    """Return the progress of a run, which may be running.

    Raises:
        ConfigError: the folder holds a run of another config, or one of its files is damaged.
    """
    folder = RunFolder(run.folder)
    try:
        epochs = folder.metrics()
        finished = folder.result() is not None
    except ConfigError as error:
        raise _with_remedy(error, run) from None
    if finished:
        state = State.FINISHED
    elif has_checkpoint(run.folder):
        state = State.INTERRUPTED
    else:
        state = State.NEW
    # A run without a checkpoint begins again, so its config does not matter
    if state is not State.NEW:
        _check_same_run(run)
    return Progress(state, len(epochs), _best_value(run, epochs))


def _check_same_run(run: StudyRun) -> None:
    before = _config_of_folder(run)
    try:
        check_same_experiment(before, run.config, run.folder / LAST)
    except ProjectError as error:
        raise ConfigError(f"{run.folder}: holds another run than {run.name}: {error}") from None


def _best_value(run: StudyRun, epochs: Sequence[dict[str, Any]]) -> float | None:
    mode, _, name = run.config.trainer.monitor.partition(" ")
    values = [values[name] for values in epochs if values.get(name) is not None]
    if not values:
        return None
    if mode == "max":
        return max(values)
    return min(values)


def changed_places(run: StudyRun) -> list[Override]:
    """Return the new values of keys in `WHERE_AND_HOW` that have changed since the run started.

    The user's own code is not among them, because `--set` does not take it; see
    `StudyRun.words_to_resume`.

    Raises:
        ConfigError: the run's config.json is missing or damaged.
    """
    before = _config_of_folder(run)
    now = run.config.dump()
    changes = []
    for key in WHERE_AND_HOW:
        if key == IMPORTS:
            continue
        new = value_at(now, key)
        if new != value_at(before, key):
            changes.append((key, format_value(new)))
    return changes


def format_table(rows: Sequence[StatusRow]) -> list[str]:
    """Format the header and one line per row, with aligned columns."""
    cells = []
    for row in rows:
        epochs = f"{row.progress.epoch}/{row.run.config.trainer.epochs}"
        left = "" if row.seconds_left is None else format_duration(row.seconds_left)
        cells.append((row.run.name, row.progress.state, epochs, _format_best(row), left))
    return text_table(("run", "state", "epoch", "best", "left"), cells).splitlines()


def _format_best(row: StatusRow) -> str:
    best = row.progress.best
    if best is None:
        return ""
    _, _, name = row.run.config.trainer.monitor.partition(" ")
    if is_accuracy(name):
        return f"{name} {best:.2%}"
    return f"{name} {best:.4g}"


def format_duration(seconds: float) -> str:
    """Format a duration as `3 h 05 min`, `12 min` or `40 s`."""
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    if seconds >= 90:
        return f"{minutes} min"
    return f"{round(seconds)} s"


def _config_of_folder(run: StudyRun) -> dict[str, Any]:
    """Return the resolved config in the run's folder."""
    if not (run.folder / CONFIG).exists():
        raise ConfigError(f"{run.folder}: holds a checkpoint, but no config.json; move it away")
    try:
        return RunFolder(run.folder).config().dump()
    except ConfigError as error:
        raise _with_remedy(error, run) from None


def _with_remedy(error: ConfigError, run: StudyRun) -> ConfigError:
    return ConfigError(f"{error}; move {run.folder} away to begin again")
