"""Where the runs of a study are started: as processes of this machine, or as jobs of a cluster."""

import ctypes
import fcntl
import os
import shlex
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from base.checkpoint import has_checkpoint
from base.command_line import set_overrides
from base.errors import ConfigError
from base.run_folder.names import CONFIG, RESULT
from base.text import first_line, one_line
from studies.grid import Run
from studies.progress import FINISHED, changed_places, look

ROOT = Path(__file__).parents[1]
"""Where the scripts lie."""

LAUNCHERS = ("process", "slurm", "local")
"""Processes of this machine, jobs of a cluster, and the cluster's path on this machine."""


def command(run: Run) -> list[str]:
    """What starts a run, or continues it where its folder holds a checkpoint.

    A run that is continued gets what has changed since of where and how it computes.
    """
    begun = has_checkpoint(run.folder)
    script, *words = run.words_to_resume(changed_places(run)) if begun else run.words()
    return [sys.executable, str(ROOT / script), *words]


def format_command(run: Run) -> str:
    """The same as one would type it; a comment where the run is finished."""
    _, script, *words = command(run)
    finished = "# finished: " if look(run).state == FINISHED else ""
    return finished + " ".join(map(_quoted, ["python", Path(script).name, *words]))


def _quoted(word: str) -> str:
    """A word as a shell takes it; characters that a terminal does not show are escapes within
    `$'...'`."""
    if word.isprintable():
        return shlex.quote(word)
    return "$'" + one_line(word.replace("\\", "\\\\").replace("'", "\\'")) + "'"


class BusyError(ConfigError):
    """Another process works on the run."""


class Worker:
    """The process of a run, its output appended to `<run folder>/output.log`.

    That file is locked meanwhile, so no second one can be started, from wherever. The lock is held
    by both this process and the new one: on a network file system it may be this one's alone.

    Args:
        run: what to work on.
        slot: which of the runs at once this is, from 0: it decides which GPU it gets.
        before: is called in the new process before anything else.

    Raises:
        BusyError: another process works on the run.
        ConfigError: the folder holds another run.
    """

    def __init__(self, run: Run, slot: int = 0, before: Callable[[], None] | None = None) -> None:
        run.folder.mkdir(parents=True, exist_ok=True)
        self.output = os.open(
            run.folder / "output.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644
        )
        try:
            self._lock(run)
            self.process = None if look(run).state == FINISHED else self._start(run, slot, before)
        except BaseException:
            os.close(self.output)
            raise

    def _lock(self, run: Run) -> None:
        try:
            fcntl.flock(self.output, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BusyError(f"{run.folder}: another process works on {run.name}") from None

    def _start(
        self, run: Run, slot: int, before: Callable[[], None] | None
    ) -> subprocess.Popen[bytes]:
        if not has_checkpoint(run.folder):
            # it was killed before its first checkpoint: begin again
            (run.folder / CONFIG).unlink(missing_ok=True)
        return subprocess.Popen(  # noqa: S603 - our own scripts
            command(run), stdin=subprocess.DEVNULL, stdout=self.output, stderr=self.output, pass_fds=(self.output,),
            preexec_fn=before, env=_environment(run, slot),
        )  # fmt: skip

    def exit_code(self) -> int | None:
        """Of the process, None while it lives; 0 of a run that another one had finished
        meanwhile."""
        code = 0 if self.process is None else self.process.poll()
        if code is not None and self.output is not None:
            os.close(self.output)
            self.output = None
        return code

    def stop(self) -> None:
        """Ask it to save and leave."""
        if self.exit_code() is None:
            self.process.terminate()

    def wait(self) -> int:
        """Wait for its end; returns the exit code."""
        if self.process is not None:
            self.process.wait()
        return self.exit_code()


class Job(ABC):
    """A run that has been started.

    Attributes:
        outlives: whether it goes on when this process ends.
    """

    outlives = False

    @abstractmethod
    def exit_code(self) -> int | None:
        """The exit code of its process; None while it works."""

    @abstractmethod
    def stop(self) -> None:
        """Ask it to save and leave."""

    @abstractmethod
    def wait(self) -> None:
        """Wait until it has."""

    def error(self) -> str | None:
        """What kept it from working at all, where the run itself cannot have said so."""
        return None


class LocalJob(Job):
    """A process of this machine. It is asked to save and leave when this process dies, however that
    happens."""

    def __init__(self, run: Run, slot: int) -> None:
        self.worker = Worker(
            run, slot, before=_leave_with_parent if sys.platform == "linux" else None
        )

    def exit_code(self) -> int | None:
        return self.worker.exit_code()

    def stop(self) -> None:
        self.worker.stop()

    def wait(self) -> None:
        self.worker.wait()


class ClusterJob(Job):
    """A job of submitit, which goes on without the process that submitted it.

    Args:
        job: of submitit; its command is `command_of_job(run)`.
        run: what it works on.
    """

    outlives = True

    def __init__(self, job: Any, run: Run) -> None:
        self.job, self.run = job, run

    def exit_code(self) -> int | None:
        if not self.job.done():
            return None
        return 0 if self.error() is None else 1

    def error(self) -> str | None:
        error = self.job.exception()
        if error is not None:
            return _reason(str(error), self.run.name)
        # the folder is listed, because a network file system would remember that a single file was
        # not there
        if RESULT in {file.name for file in self.run.folder.glob("*")}:
            return None
        return "its job has worked on another config: the grid or a file under it has changed since"

    def stop(self) -> None:
        pass

    def wait(self) -> None:
        pass


def _reason(error: str, name: str) -> str:
    """Why a job failed: what its command said last, which submitit quotes between two rules."""
    first, rule, rest = error.strip().partition("\n----------------------\n")
    said = rest.partition(rule)[0].strip().splitlines()[-1:] if rule else first.splitlines()[:1]
    _, is_study, reason = "".join(said).partition(f"failed: {name} (")
    if is_study:
        return reason.removesuffix(")")
    last = "".join(said).rpartition("FailedJobError: ")[2].removeprefix("error: ")
    return last or "its job says nothing"


def command_of_job(run: Run) -> list[str]:
    """What a cluster's job does: a study of this run alone, which begins it or continues it."""
    return [sys.executable, str(ROOT / "run_ablations.py"), *run.words_of_study()]


def work_of_job(run: Run) -> Any:
    """What submitit is given: the command of a run, in this folder.

    A function of ours would not do: to read it, a job would have to find our modules. A job that is
    preempted or at its time limit is queued again.
    """
    from submitit.helpers import CommandFunction, DelayedSubmission

    work = CommandFunction(command_of_job(run), cwd=Path.cwd())
    work.checkpoint = partial(DelayedSubmission, work)
    return work


Start = Callable[[Run, int], Job]
"""Starts a run as the given one, from 0, of those at once."""


def launcher(name: str, folder: Path, settings: Sequence[str]) -> Start:
    """What starts a run: `process` on this machine, `slurm` on a cluster, `local` the cluster's
    path on this machine.

    Args:
        name: one of the three.
        folder: where submitit writes its own files.
        settings: parameters of submitit's executor, such as `["slurm_partition=gpu",
            "timeout_min=600"]`.

    Raises:
        ConfigError: submitit is not installed, does not know a parameter, or is not asked for one.
    """
    parameters = {
        key: int(value) if value.isdecimal() else value
        for key, value in set_overrides(settings, "--parameter")
    }
    if name == "process":
        if parameters:
            raise ConfigError(f"--parameter {settings[0]}: has no effect without --launcher slurm")
        return LocalJob
    try:
        import submitit
    except ModuleNotFoundError:
        raise ConfigError(
            '--launcher: needs the package submitit: pip install -e ".[slurm]"'
        ) from None
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=name)
        executor.update_parameters(name="study", **parameters)
    except (RuntimeError, NameError, TypeError, ValueError) as error:
        raise ConfigError(f"--launcher {name}: {first_line(error)}") from None
    return lambda run, slot: ClusterJob(executor.submit(work_of_job(run)), run)


def _environment(run: Run, slot: int) -> dict[str, str]:
    """This process's, but with one GPU: runs at once take one each, in turn. A run on several GPUs
    sees all."""
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = (
        [str(index) for index in range(torch.cuda.device_count())]
        if asked is None
        else asked.split(",")
    )
    one = (
        {"CUDA_VISIBLE_DEVICES": visible[slot % len(visible)]}
        if len(visible) > 1 and run.config.n_gpu <= 1
        else {}
    )
    return {**os.environ, **one}


def _leave_with_parent() -> None:
    """Called in the new process: Linux shall send it SIGTERM when its parent dies: a killed study
    leaves no run behind."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
