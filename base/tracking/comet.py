"""Comet as a tracker."""

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from base.config import Config
from base.config.config import CometConfig
from base.tracking.tracker import EpochLog, Tracker

logger = logging.getLogger(__name__)

# torchrun and SLURM kill a job 30 seconds after they have asked it to stop
PATIENCE = 25.0
"""Seconds that the end of a run waits for Comet's server."""

# comet_ml's own defaults try a silent server for minutes, replace functions of torch, and report
# errors to a third party
COMET_DEFAULTS = {
    "COMET_TIMEOUT_HTTP": "3",
    "COMET_TIMEOUT_API": "3",
    "COMET_HTTP_SESSION_RETRY_TOTAL": "1",
    "COMET_HTTP_SESSION_RETRY_BACKOFF_FACTOR": "1",
    "COMET_GET_OR_ADD_EXPERIMENT_RETRY_TOTAL": "1",
    "COMET_GET_OR_ADD_EXPERIMENT_RETRY_BACKOFF_MAX": "2",
    "COMET_TIMEOUT_CLEANING": "10",
    "COMET_TIMEOUT_UPLOAD": "10",
    "COMET_DISABLE_AUTO_LOGGING": "1",
    "COMET_ERROR_TRACKING_ENABLE": "0",
}
"""Settings of the package comet_ml; those in the environment win."""

# The run folder records code, environment and output itself
EXPERIMENT_OPTIONS = {
    "auto_param_logging": False,
    "auto_metric_logging": False,
    "auto_output_logging": False,
    "log_code": False,
    "log_graph": False,
    "log_git_metadata": False,
    "log_git_patch": False,
    "log_env_details": False,
    "parse_args": False,
    "display_summary_level": 0,
}
"""Arguments of every experiment: nothing is logged but what this tracker logs."""


class Comet(Tracker):
    """A Comet experiment: online with a key and `offline: false`, otherwise a zip file in `folder`
    that `comet upload` sends later.

    Training never waits for the network: a thread calls comet_ml, and only `close` waits for it,
    for at most `PATIENCE` seconds. A run that the server does not accept is logged offline, after a
    warning. If the server dies during the run, comet_ml writes the rest into `folder`.

    The key is `comet.api`, or without it COMET_API_KEY in the environment. It is passed to comet_ml
    and written nowhere.

    Args:
        folder: of offline experiments.
        settings: the config's section `comet`.
        config: the resolved config, which the experiment records.

    Raises:
        ImportError: the `comet-ml` package is not installed.
    """

    def __init__(self, folder: Path, settings: CometConfig, config: Config) -> None:
        # Before the import, which reads them
        os.environ.update(COMET_DEFAULTS | os.environ)
        import comet_ml

        self.comet_ml = comet_ml
        self.folder = folder
        self.settings = settings
        self.config = config
        self.key = settings.api or os.environ.get("COMET_API_KEY")
        self.online = bool(self.key) and not settings.offline
        if not settings.offline and not self.online:
            logger.warning(
                "comet.offline is false, but Comet's key is missing (set COMET_API_KEY):"
                " logging offline to %s",
                folder,
            )
        self.messages = _PackageMessages(self.key)
        self.calls: SimpleQueue[Callable[[Any], None] | None] = SimpleQueue()
        # comet_ml's constructor and its end() wait for the server, for an hour where it asks for
        # that (Retry-After); a daemon, as the end of the process must not wait for it either
        self.thread = Thread(target=self._run, name="comet", daemon=True)
        self.thread.start()

    def log_epoch(self, log: EpochLog) -> None:
        epoch = int(log["epoch"])
        values = {key: value for key, value in log.items() if key != "epoch"}
        self.calls.put(lambda experiment: experiment.log_metrics(values, epoch=epoch, step=epoch))

    def log_result(self, result: Mapping[str, Any]) -> None:
        values = {f"result_{key}": value for key, value in result.items()}
        self.calls.put(lambda experiment: experiment.log_others(values))

    def close(self) -> None:
        self.calls.put(None)
        self.thread.join(PATIENCE)
        if self.thread.is_alive():
            self.messages.silence()
            logger.warning(
                "Comet has not taken the run within %g s after its end: the rest is not logged"
                " there",
                PATIENCE,
            )

    def _run(self) -> None:
        """What the thread does: begin an experiment, make the calls that are queued, end it."""
        try:
            experiment = self._begin()
            for call in iter(self.calls.get, None):
                call(experiment)
            # end() alone does not notice a server that has stopped answering
            experiment.flush(round(PATIENCE / 8))
            experiment.end()
            self.messages.report("Comet may not have got the whole run (%s)")
        # Any exception: a logging service must never end a training run
        except Exception as error:
            self.messages.add(str(error))
            # Where the log cannot be written, the run itself reports that
            with suppress(OSError):
                self.messages.report("Comet failed (%s): training goes on without it")

    def _begin(self) -> Any:
        """Begin an experiment, online if possible."""
        options = {
            "project_name": self.settings.project,
            "workspace": self.settings.workspace,
            "offline_directory": str(self.folder),
            **EXPERIMENT_OPTIONS,
        }
        experiment = None
        if self.online:
            experiment = self.comet_ml.Experiment(api_key=self.key, **options)
            if experiment.alive:
                logger.info("Comet: %s", experiment.url)
            else:
                self.messages.report(
                    f"Comet could not start (%s): logging offline to {self.folder}"
                )
                experiment = None
        if experiment is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            experiment = self.comet_ml.OfflineExperiment(**options)
        if not experiment.alive:
            raise OSError(self.messages.last)
        experiment.set_name(self.config.name)
        experiment.log_parameters(self.config.dump())
        return experiment


class _PackageMessages(logging.Handler):
    """Collects what comet_ml warns of, in place of its own output, so that one warning of this
    project's log can quote it.

    comet_ml quotes a key that the server does not know, and its HTTP library warns of every
    attempt.

    Args:
        key: Comet's key, which is cut from the messages.

    Attributes:
        last: the last message.
    """

    def __init__(self, key: str | None) -> None:
        super().__init__(logging.WARNING)
        self.key = key
        self.last = ""
        self.silent = False
        logging.getLogger("comet_ml").handlers = [self]
        logging.getLogger("urllib3").setLevel(logging.ERROR)

    def emit(self, record: logging.LogRecord) -> None:
        self.add(record.getMessage())

    def add(self, message: str) -> None:
        """Keep a message, on one line and without the key."""
        # comet_ml goes on to say what it does without a server, which is not what happens here
        message, _, _ = message.partition("Your experiment will not")
        message = " ".join(message.split())
        if self.key:
            message = message.replace(self.key, "***")
        self.last = message

    def report(self, text: str) -> None:
        """Warn once, with the last message in place of `%s`; do nothing where there is none."""
        if self.last and not self.silent:
            self.silence()
            logger.warning(text, self.last)

    def silence(self) -> None:
        """Report nothing from now on: the user knows enough."""
        self.silent = True
