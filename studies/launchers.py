"""Where the runs of a study are started: as processes of this machine, or as jobs of a cluster."""

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from base.checkpoint import LAST
from base.errors import ConfigError
from studies.grid import Run

ROOT = Path(__file__).parents[1]
"""Where the scripts lie."""


def command(run: Run) -> list[str]:
    """What starts a run, or continues it where its folder holds a checkpoint."""
    script, *words = run.words_to_resume() if (run.folder / LAST).exists() else run.words()
    return [sys.executable, str(ROOT / script), *words]


def work_on(run: Run, before: Callable[[], None] | None = None) -> subprocess.Popen[bytes]:
    """Start the process of a run, its output appended to `<run folder>/output.log`.

    While the process lives it holds a lock on that file, so no second one can be started, from wherever.

    Raises:
        ConfigError: somebody works on the run already.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    output = os.open(run.folder / "output.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        try:
            fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"{run.folder}: another process works on {run.name}; wait for its end") from None
        if not (run.folder / LAST).exists():
            (run.folder / "config.json").unlink(missing_ok=True)  # it was killed before its first checkpoint: begin again
        return subprocess.Popen(  # noqa: S603 - our own scripts
            command(run), stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=(output,), preexec_fn=before
        )
    finally:
        os.close(output)  # the process keeps its own, and the lock with it


class Job(ABC):
    """A run that has been started."""

    @abstractmethod
    def exit_code(self) -> int | None:
        """The exit code of its process; None while it works."""

    @abstractmethod
    def stop(self) -> None:
        """Ask it to save and leave."""

    @abstractmethod
    def wait(self) -> None:
        """Wait until it has."""


class LocalJob(Job):
    """A process of this machine. It is asked to save and leave when this process dies, however that happens."""

    def __init__(self, run: Run) -> None:
        self.process = work_on(run, before=_leave_with_parent if sys.platform == "linux" else None)

    def exit_code(self) -> int | None:
        return self.process.poll()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()

    def wait(self) -> None:
        self.process.wait()


class ClusterJob(Job):
    """A job of submitit."""

    def __init__(self, job: Any) -> None:
        self.job = job

    def exit_code(self) -> int | None:
        if not self.job.done():
            return None
        error = self.job.exception()
        return 1 if error is not None else self.job.result()

    def stop(self) -> None:
        """Nothing: jobs of a cluster outlive the process that submitted them."""

    def wait(self) -> None:
        pass


class WorkOnCluster:
    """What a cluster's job does: work on a run until its end. A job that is preempted or at its time limit is queued again."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __call__(self) -> int:
        process = work_on(self.run)
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        return process.wait()

    def checkpoint(self) -> Any:
        """submitit calls this before the job has to go; the run itself saves when it is told to leave."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(WorkOnCluster(self.run))


def launcher(name: str, folder: Path, parameters: dict[str, Any]) -> Callable[[Run], Job]:
    """What starts a run: `process` on this machine, `slurm` on a cluster, `local` the cluster's path on this machine.

    Args:
        name: one of the three.
        folder: where submitit writes its own files.
        parameters: of submitit's executor, such as `{"slurm_partition": "gpu", "timeout_min": 600}`.

    Raises:
        ConfigError: submitit is not installed, or does not know a parameter.
    """
    if name == "process":
        return LocalJob
    try:
        import submitit
    except ModuleNotFoundError:
        raise ConfigError('--launcher: needs the package submitit: pip install -e ".[slurm]"') from None
    # a job reads back what it is to do, for which it has to find this module, wherever it is started
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=name)
        executor.update_parameters(name="study", **parameters)
    except (RuntimeError, NameError, TypeError, ValueError) as error:
        raise ConfigError(f"--launcher {name}: {str(error).splitlines()[0]}") from None
    return lambda run: ClusterJob(executor.submit(WorkOnCluster(run)))


def _leave_with_parent() -> None:
    """Called in the new process: Linux shall send it SIGTERM when its parent dies: a killed study leaves no run behind."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
