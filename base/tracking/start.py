"""The trackers that a config asks for."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from base.config import Config
from base.run_folder.names import COMET, METRICS, TENSORBOARD
from base.tracking.comet import Comet
from base.tracking.tracker import EpochLog, RunLog, TensorBoard, Tracker, Trackers

logger = logging.getLogger(__name__)


def start_trackers(config: Config, folder: Path, history: Sequence[EpochLog] = ()) -> Trackers:
    """Start the trackers that a config asks for, writing into the run folder.

    Args:
        config: the resolved config.
        folder: the run folder.
        history: the epochs of the run that is resumed.
    """
    wanted: dict[str, Callable[[], Tracker]] = {}
    if config.trainer.tensorboard:
        wanted["TensorBoard"] = lambda: TensorBoard(folder / TENSORBOARD, config, history)
    comet = config.comet
    if comet is not None:
        wanted["Comet"] = lambda: Comet(folder / COMET, comet, config)
    trackers: list[Tracker] = [RunLog(folder / METRICS, history)]
    for name, start in wanted.items():
        try:
            trackers.append(start())
        except ImportError as error:
            logger.warning(
                "%s is asked for but not installed (%s): training goes on without it", name, error
            )
        # Any exception: a logging service must never end a training run
        except Exception as error:
            logger.warning("%s could not start (%s): training goes on without it", name, error)
    return Trackers(trackers)
