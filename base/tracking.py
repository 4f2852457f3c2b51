"""Where logged values go: the run log (JSON lines), TensorBoard, Comet. Each is a `Tracker`.

TensorBoard and Comet are imported only when the config asks for them. Where one is absent or fails to start, training goes on
after one warning.
"""

import json
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from base.atomic import replacing
from base.config import CometConfig, Config

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
    """`metrics.jsonl`: one JSON object per epoch, nothing in it that two equal runs would not share (no times).

    Args:
        path: the file.
        history: the epochs of the run that is resumed; lines of later epochs, which will be run again, are dropped.
    """

    def __init__(self, path: Path, history: Sequence[EpochLog] = ()) -> None:
        self.path = path
        with replacing(path) as file:
            file.write("".join(json.dumps(log) + "\n" for log in history).encode())

    def log_epoch(self, log: EpochLog) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(log) + "\n")


class TensorBoard(Tracker):
    """Event files for TensorBoard.

    Raises:
        ImportError: the `tensorboard` package is not installed.
    """

    def __init__(self, folder: Path, epochs_done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=epochs_done + 1 if epochs_done else None)

    def log_epoch(self, log: EpochLog) -> None:
        for key, value in log.items():
            if key != "epoch":
                self.writer.add_scalar(key, value, int(log["epoch"]))
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Comet(Tracker):
    """A Comet experiment: online with a key and `offline: false`, otherwise a zip in `folder` that `comet upload` sends later.

    The key comes from the environment (COMET_API_KEY) or from `comet.api`; it is handed to Comet and written nowhere.

    Raises:
        ImportError: the `comet-ml` package is not installed.
    """

    def __init__(self, folder: Path, settings: CometConfig, config: Config) -> None:
        import comet_ml

        # The run folder records code, environment and output itself; a study's log should hold what the study logs.
        quiet = {
            "auto_param_logging": False, "auto_metric_logging": False, "auto_output_logging": False,
            "log_code": False, "log_graph": False, "log_git_metadata": False, "log_git_patch": False,
            "log_env_details": False, "parse_args": False, "display_summary_level": 0,
        }  # fmt: skip
        key = os.environ.get("COMET_API_KEY") or settings.api
        place = {"project_name": settings.project, "workspace": settings.workspace}
        if key and not settings.offline:
            self.experiment = comet_ml.Experiment(api_key=key, **place, **quiet)
        else:
            if not settings.offline:
                logger.warning("comet.offline is false, but no key is set in COMET_API_KEY: logging offline to %s", folder)
            folder.mkdir(parents=True, exist_ok=True)
            self.experiment = comet_ml.OfflineExperiment(offline_directory=str(folder), **place, **quiet)
        self.experiment.set_name(config.name)
        self.experiment.log_parameters(config.dump())

    def log_epoch(self, log: EpochLog) -> None:
        epoch = int(log["epoch"])
        self.experiment.log_metrics({key: value for key, value in log.items() if key != "epoch"}, epoch=epoch, step=epoch)

    def log_result(self, result: Mapping[str, Any]) -> None:
        self.experiment.log_others({f"result_{key}": value for key, value in result.items()})

    def close(self) -> None:
        self.experiment.end()


def tell(trackers: list[Tracker], what: Callable[[Tracker], None]) -> None:
    """Call `what` for every tracker. One that fails is dropped after a warning; only the run log may end a run."""
    for tracker in list(trackers):
        try:
            what(tracker)
        except Exception as error:
            if isinstance(tracker, RunLog):
                raise
            trackers.remove(tracker)
            logger.warning("%s failed (%s): training goes on without it", type(tracker).__name__, error)


def start_trackers(config: Config, folder: Path, history: Sequence[EpochLog] = ()) -> list[Tracker]:
    """The trackers that the config asks for, writing into the run folder."""
    trackers: list[Tracker] = [RunLog(folder / "metrics.jsonl", history)]
    wanted = []
    if config.trainer.tensorboard:
        wanted.append(("TensorBoard", lambda: TensorBoard(folder / "tensorboard", len(history))))
    if config.comet is not None:
        settings = config.comet
        wanted.append(("Comet", lambda: Comet(folder / "comet", settings, config)))
    for name, start in wanted:
        try:
            trackers.append(start())
        except ImportError as error:
            logger.warning("%s is asked for but not installed (%s): training goes on without it", name, error)
        except Exception as error:  # whatever it is: a logging service must never end a training run
            logger.warning("%s could not start (%s): training goes on without it", name, error)
    return trackers
