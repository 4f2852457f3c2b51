"""Comet as a tracker: a thread of its own speaks to the server, so that training never waits for
it."""

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from base.config import Config
from base.config.config import CometConfig
from base.tracking.tracker import EpochLog, Tracker

logger = logging.getLogger(__name__)


PATIENCE = 25.0
"""Seconds that the end of a run waits for Comet's server to take what is left; torchrun and SLURM
kill after 30."""

COMET_DEFAULTS = {
    "COMET_TIMEOUT_HTTP": "3", "COMET_TIMEOUT_API": "3",
    "COMET_HTTP_SESSION_RETRY_TOTAL": "1", "COMET_HTTP_SESSION_RETRY_BACKOFF_FACTOR": "1",
    "COMET_GET_OR_ADD_EXPERIMENT_RETRY_TOTAL": "1", "COMET_GET_OR_ADD_EXPERIMENT_RETRY_BACKOFF_MAX": "2",
    "COMET_TIMEOUT_CLEANING": "10", "COMET_TIMEOUT_UPLOAD": "10",
    "COMET_DISABLE_AUTO_LOGGING": "1", "COMET_ERROR_TRACKING_ENABLE": "0",
}  # fmt: skip
"""Settings of the package comet_ml, where the environment has no others. Its own defaults try a
silent server for minutes before they give up, replace functions of torch, and report errors to a
third party."""


class Comet(Tracker):
    """A Comet experiment: online with a key and `offline: false`, otherwise a zip in `folder` that
    `comet upload` sends later.

    Online, a thread of its own talks to the server: training never waits for the network, only
    `close` does, for at most `PATIENCE` seconds. A run that the server does not take is logged
    offline after a warning; what a server that dies has not got, comet_ml writes into `folder`,
    too.

    The key comes from the environment (COMET_API_KEY) or from `comet.api`; it is handed to Comet
    and written nowhere.

    Raises:
        ImportError: the `comet-ml` package is not installed.
    """

    def __init__(self, folder: Path, settings: CometConfig, config: Config) -> None:
        os.environ.update(COMET_DEFAULTS | os.environ)
        import comet_ml

        self.comet_ml, self.folder, self.settings, self.config = comet_ml, folder, settings, config
        self.key = os.environ.get("COMET_API_KEY") or settings.api
        self.complaints = _Complaints(self.key)
        self.calls: SimpleQueue[tuple[str, tuple[Any, ...], dict[str, Any]]] = SimpleQueue()
        self.thread: Thread | None = None
        if self.key and not settings.offline:
            self.thread = Thread(target=self._work, name="comet", daemon=True)
            self.thread.start()
            return
        if not settings.offline:
            logger.warning(
                "comet.offline is false, but no key is set in COMET_API_KEY: logging offline to %s",
                folder,
            )
        self.experiment = self._begin_offline()

    def log_epoch(self, log: EpochLog) -> None:
        epoch = int(log["epoch"])
        self._call(
            "log_metrics",
            {key: value for key, value in log.items() if key != "epoch"},
            epoch=epoch,
            step=epoch,
        )

    def log_result(self, result: Mapping[str, Any]) -> None:
        self._call("log_others", {f"result_{key}": value for key, value in result.items()})

    def close(self) -> None:
        self._call("end")
        if self.thread is None:
            self.complaints.tell("Comet may not have got the whole run (%s)")
            return
        self.thread.join(PATIENCE)
        if self.thread.is_alive():
            self.complaints.heard = True  # whatever it says from now on
            logger.warning(
                "Comet has not taken the run %g s after its end: what is left is not logged there",
                PATIENCE,
            )

    def _call(self, method: str, *values: Any, **named: Any) -> None:
        """Call a method of the experiment, or have it called by the thread."""
        if self.thread is not None:
            self.calls.put((method, values, named))
        else:
            getattr(self.experiment, method)(*values, **named)

    def _work(self) -> None:
        """What the thread does: begin the experiment, online if that goes, and whatever it is told,
        until its end."""
        try:
            experiment = self._begin_online()
            method = ""
            while method != "end":
                method, values, named = self.calls.get()
                # a server that does not take this is noticed; one that is silent only now would not
                # be
                if method == "end":
                    experiment.flush(round(PATIENCE / 8))
                getattr(experiment, method)(*values, **named)
            self.complaints.tell("Comet may not have got the whole run (%s)")
        except (
            Exception
        ) as error:  # whatever it is: a logging service must never end a training run
            self.complaints.add(str(error))
            # where the log cannot be written either, the run itself says so
            with suppress(OSError):
                self.complaints.tell("Comet failed (%s): training goes on without it")

    def _begin_online(self) -> Any:
        """An experiment on the server; where it cannot be begun, an offline one, after a warning
        that says why."""
        experiment = self.comet_ml.Experiment(
            api_key=self.key, offline_directory=str(self.folder), **self._arguments()
        )
        if experiment.alive:
            logger.info("Comet: %s", experiment.url)
            return self._describe(experiment)
        self.complaints.tell(f"Comet could not start (%s): logging offline to {self.folder}")
        return self._begin_offline()

    def _begin_offline(self) -> Any:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self._describe(
            self.comet_ml.OfflineExperiment(offline_directory=str(self.folder), **self._arguments())
        )

    def _describe(self, experiment: Any) -> Any:
        if not experiment.alive:
            raise OSError(self.complaints.last)
        experiment.set_name(self.config.name)
        experiment.log_parameters(self.config.dump())
        return experiment

    def _arguments(self) -> dict[str, Any]:
        # The run folder records code, environment and output itself; a study's log should hold what
        # the study logs.
        return {
            "project_name": self.settings.project, "workspace": self.settings.workspace,
            "auto_param_logging": False, "auto_metric_logging": False, "auto_output_logging": False,
            "log_code": False, "log_graph": False, "log_git_metadata": False, "log_git_patch": False,
            "log_env_details": False, "parse_args": False, "display_summary_level": 0,
        }  # fmt: skip


class _Complaints(logging.Handler):
    """Collects what comet_ml warns of, in place of its own output, and says it in one warning of
    ours.

    comet_ml names a key that the server does not know in full, and its HTTP library warns of every
    attempt.

    Attributes:
        heard: whether the user knows enough.
    """

    def __init__(self, key: str | None) -> None:
        super().__init__(logging.WARNING)
        self.key, self.last, self.heard = key, "", False
        logging.getLogger("comet_ml").handlers = [self]
        logging.getLogger("urllib3").setLevel(logging.ERROR)

    def emit(self, record: logging.LogRecord) -> None:
        self.add(record.getMessage())

    def add(self, message: str) -> None:
        message = " ".join(message.partition("Your experiment will not")[0].split())
        self.last = message.replace(self.key, "***") if self.key else message

    def tell(self, text: str) -> None:
        """Warn, with the last complaint in place of `%s`; nothing where there is none, or the user
        has been told."""
        if self.last and not self.heard:
            self.heard = True
            logger.warning(text, self.last)
