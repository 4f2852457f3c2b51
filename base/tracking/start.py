"""The trackers that a config asks for."""

import logging
from collections.abc import Sequence
from pathlib import Path

from base.config import Config
from base.run_folder.names import COMET, METRICS, TENSORBOARD
from base.tracking.comet import Comet
from base.tracking.tracker import EpochLog, RunLog, TensorBoard, Tracker

logger = logging.getLogger(__name__)


def start_trackers(config: Config, folder: Path, history: Sequence[EpochLog] = ()) -> list[Tracker]:
    """The trackers that the config asks for, writing into the run folder."""
    trackers: list[Tracker] = [RunLog(folder / METRICS, history)]
    wanted = []
    if config.trainer.tensorboard:
        wanted.append(("TensorBoard", lambda: TensorBoard(folder / TENSORBOARD, len(history))))
    if config.comet is not None:
        settings = config.comet
        wanted.append(("Comet", lambda: Comet(folder / COMET, settings, config)))
    for name, start in wanted:
        try:
            trackers.append(start())
        except ImportError as error:
            logger.warning(
                "%s is asked for but not installed (%s): training goes on without it", name, error
            )
        except (
            Exception
        ) as error:  # whatever it is: a logging service must never end a training run
            logger.warning("%s could not start (%s): training goes on without it", name, error)
    return trackers
