"""Tracker, the interface of everything that records a run's values; the run log (JSON lines) and
TensorBoard; and Trackers, the container that a trainer logs to."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import indent
from typing import Any

from base.atomic import replacing
from base.config import Config
from base.config.strict_json import json_text

logger = logging.getLogger(__name__)
EpochLog = Mapping[str, int | float]


class Tracker(ABC):
    """Records the values of every epoch and the result of the run."""

    @abstractmethod
    def log_epoch(self, log: EpochLog) -> None:
        """Record one epoch; `log["epoch"]` is its number, counted from 1."""

    def log_result(self, result: Mapping[str, Any]) -> None:  # noqa: B027 - optional
        """Record the result of the run."""

    def close(self) -> None:  # noqa: B027 - optional
        """Finish writing."""


class Trackers(Tracker):
    """Several trackers as one.

    A tracker that fails is dropped after a warning. Only a failure of the run log ends a run.

    Args:
        trackers: any number of them.
    """

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        self.trackers = list(trackers)

    def log_epoch(self, log: EpochLog) -> None:
        for tracker in list(self.trackers):
            with self._dropped_if_it_fails(tracker):
                tracker.log_epoch(log)

    def log_result(self, result: Mapping[str, Any]) -> None:
        for tracker in list(self.trackers):
            with self._dropped_if_it_fails(tracker):
                tracker.log_result(result)

    def close(self) -> None:
        for tracker in list(self.trackers):
            with self._dropped_if_it_fails(tracker):
                tracker.close()

    @contextmanager
    def _dropped_if_it_fails(self, tracker: Tracker) -> Iterator[None]:
        try:
            yield
        # Any exception: a logging service must never end a training run
        except Exception as error:
            if isinstance(tracker, RunLog):
                raise
            self.trackers.remove(tracker)
            name = type(tracker).__name__
            logger.warning("%s failed (%s): training goes on without it", name, error)


class RunLog(Tracker):
    """`metrics.jsonl`: one JSON object per epoch, without times, so that two equal runs write the
    same bytes.

    Args:
        path: the file.
        history: the epochs of the run that is resumed. Lines of later epochs are dropped, as a
            resumed run trains those again.
    """

    def __init__(self, path: Path, history: Sequence[EpochLog] = ()) -> None:
        self.path = path
        with replacing(path) as file:
            file.write("".join(json_text(log) + "\n" for log in history).encode())

    def log_epoch(self, log: EpochLog) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json_text(log) + "\n")


class TensorBoard(Tracker):
    """Event files for TensorBoard: a chart for each value, `loss/train` beside `loss/val`, and the
    config as text.

    Args:
        folder: of the event files.
        config: the resolved config.
        history: the epochs of the run that is resumed.

    Raises:
        ImportError: the `tensorboard` package is not installed.
    """

    def __init__(self, folder: Path, config: Config, history: Sequence[EpochLog] = ()) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Hides what an interrupted run wrote of its last epoch and of epochs that are trained again
        self.writer = SummaryWriter(str(folder), purge_step=len(history) or None)
        if not history:
            # TensorBoard renders Markdown, in which indented lines are code
            self.writer.add_text("config", indent(json_text(config.dump(), indent=2), "    "))
        # A killed run may have saved its last epoch without having logged it
        for log in history[-1:]:
            self.log_epoch(log)

    def log_epoch(self, log: EpochLog) -> None:
        for key, value in log.items():
            if key != "epoch":
                self.writer.add_scalar(_tag(key), value, int(log["epoch"]))
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def _tag(name: str) -> str:
    """Return TensorBoard's name of a logged value: tags with the same beginning share a group of
    charts, such as `loss/train`, `loss/val` and `loss/val_ema`."""
    for part in ("val_ema", "val"):
        if name.startswith(f"{part}_"):
            return f"{name.removeprefix(f'{part}_')}/{part}"
    return name if name == "lr" else f"{name}/train"
