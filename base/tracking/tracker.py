"""Where logged values go: the run log (JSON lines) and TensorBoard. Each is a `Tracker`."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from base.atomic import replacing
from base.config.strict_json import json_text

logger = logging.getLogger(__name__)
EpochLog = Mapping[str, int | float]


class Tracker(ABC):
    """Receives the values of every epoch and the outcome of the run."""

    @abstractmethod
    def log_epoch(self, log: EpochLog) -> None:
        """Record one epoch; `log["epoch"]` is its number, from 1 on."""

    def log_result(self, result: Mapping[str, Any]) -> None:  # noqa: B027 - optional
        """Record the outcome of the run."""

    def close(self) -> None:  # noqa: B027 - optional
        """Finish writing."""


class RunLog(Tracker):
    """`metrics.jsonl`: one JSON object per epoch, nothing in it that two equal runs would not share
    (no times).

    Args:
        path: the file.
        history: the epochs of the run that is resumed; lines of later epochs, which will be run
            again, are dropped.
    """

    def __init__(self, path: Path, history: Sequence[EpochLog] = ()) -> None:
        self.path = path
        with replacing(path) as file:
            file.write("".join(json_text(log) + "\n" for log in history).encode())

    def log_epoch(self, log: EpochLog) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json_text(log) + "\n")


class TensorBoard(Tracker):
    """Event files for TensorBoard.

    Raises:
        ImportError: the `tensorboard` package is not installed.
    """

    def __init__(self, folder: Path, epochs_done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(
            str(folder), purge_step=epochs_done + 1 if epochs_done else None
        )

    def log_epoch(self, log: EpochLog) -> None:
        for key, value in log.items():
            if key != "epoch":
                self.writer.add_scalar(key, value, int(log["epoch"]))
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def tell(trackers: list[Tracker], what: Callable[[Tracker], None]) -> None:
    """Call `what` for every tracker. One that fails is dropped after a warning; only the run log
    may end a run."""
    for tracker in list(trackers):
        try:
            what(tracker)
        except Exception as error:
            if isinstance(tracker, RunLog):
                raise
            trackers.remove(tracker)
            logger.warning(
                "%s failed (%s): training goes on without it", type(tracker).__name__, error
            )
