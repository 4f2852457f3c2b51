"""Launch the runs of a study: as processes of this machine, or as jobs of a cluster."""

import ctypes
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
from base.distributed.launch import available_cpus
from base.errors import ConfigError
from base.output import writing
from base.rooms import ROOT
from base.run_folder.locks import lock_descriptor
from base.run_folder.names import CONFIG, OUTPUT_LOG, RESULT
from base.text import first_line, one_line
from studies.grid import StudyRun
from studies.progress import State, changed_places, read_progress

LAUNCHERS = ("process", "slurm", "local")
"""Processes of this machine, jobs of a cluster, and a cluster's jobs run on this machine."""


class BusyError(ConfigError):
    """Another process works on the run."""


class Job(ABC):
    """A run that has been launched.

    Attributes:
        outlives: whether it continues when this process ends.
    """

    outlives = False

    @abstractmethod
    def exit_code(self) -> int | None:
        """Return the exit code; None while the job runs."""

    @abstractmethod
    def stop(self) -> None:
        """Ask the job to save and exit."""

    @abstractmethod
    def wait(self) -> None:
        """Wait until a stopped job has exited."""

    def error(self) -> str | None:
        """Return why the job failed, if the run itself could not report it."""
        return None


class LocalJob(Job):
    """A process of this machine, whose output is appended to `<run folder>/output.log`.

    That file is locked while the process lives, so that no other launcher starts the run again.

    Args:
        run: the run to start or to continue.
        slot: its number among those that run at once, from 0. It decides which GPU the run gets.
        jobs: how many run at once. They share the cores of this machine.

    Raises:
        BusyError: another process works on the run.
        ConfigError: the folder holds another run, or cannot be written.
    """

    def __init__(self, run: StudyRun, slot: int, jobs: int = 1) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        with writing(run.folder):
            run.folder.mkdir(parents=True, exist_ok=True)
            self.output: int | None = os.open(run.folder / OUTPUT_LOG, flags, 0o644)
        self.process: subprocess.Popen[bytes] | None = None
        try:
            if not lock_descriptor(self.output, wait=False):
                raise BusyError(f"{run.folder}: another process works on {run.name}")
            # Read only now, because another launcher may have finished the run before the lock
            if read_progress(run).state is not State.FINISHED:
                self.process = self._start(run, slot, jobs)
        except BaseException:
            os.close(self.output)
            raise

    def _start(self, run: StudyRun, slot: int, jobs: int) -> subprocess.Popen[bytes]:
        if not has_checkpoint(run.folder):
            # The run was killed before its first checkpoint; train.py refuses a folder with a
            # config but no checkpoint
            (run.folder / CONFIG).unlink(missing_ok=True)
        return subprocess.Popen(  # noqa: S603 - this project's own scripts
            command(run),
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=self.output,
            # The run inherits the lock, so it is held until both processes have ended. This
            # process keeps it, too: a network file system may give it to this process alone.
            pass_fds=(self.output,),
            preexec_fn=_terminate_with_parent if sys.platform == "linux" else None,
            env=_environment(run, slot, jobs),
        )

    def exit_code(self) -> int | None:
        """Return the exit code; None while the process lives; 0 if the run was finished already."""
        code = 0
        if self.process is not None:
            code = self.process.poll()
        if code is not None and self.output is not None:
            os.close(self.output)
            self.output = None
        return code

    def stop(self) -> None:
        if self.exit_code() is None:
            self.process.terminate()

    def wait(self) -> None:
        if self.process is not None:
            self.process.wait()
        # Closes the file and so releases the lock
        self.exit_code()


class ClusterJob(Job):
    """A job of submitit, which continues without the process that submitted it.

    Args:
        job: a job of submitit; its command is `command_of_job(run)`.
        run: the run that it works on.
    """

    outlives = True

    def __init__(self, job: Any, run: StudyRun) -> None:
        self.job = job
        self.run = run

    def exit_code(self) -> int | None:
        if not self.job.done():
            return None
        return 0 if self.error() is None else 1

    def error(self) -> str | None:
        error = self.job.exception()
        if error is not None:
            return _reason(str(error), self.run.name)
        # The folder is listed because a network file system may remember for a while that a single
        # file did not exist.
        if RESULT in {file.name for file in self.run.folder.glob("*")}:
            return None
        return "its job has worked on another config: the grid or a file under it has changed since"

    def stop(self) -> None:
        pass

    def wait(self) -> None:
        pass


Launch = Callable[[StudyRun, int], Job]
"""Launches a run in a slot, which is its number among those that run at once, from 0."""


def launcher(name: str, folder: Path, settings: Sequence[str], jobs: int = 1) -> Launch:
    """Return the function that launches a run.

    Args:
        name: `process` for this machine, `slurm` for a cluster, `local` for the cluster's code path
            on this machine.
        folder: where submitit writes its own files.
        settings: parameters of submitit's executor, such as `["slurm_partition=gpu",
            "timeout_min=600"]`.
        jobs: how many runs of this machine run at once; a cluster's jobs have their own cores.

    Raises:
        ConfigError: submitit is not installed or does not know a parameter, or there are parameters
            without submitit.
    """
    parameters: dict[str, int | str] = {}
    for key, value in set_overrides(settings, "--parameter"):
        parameters[key] = int(value) if value.isdecimal() else value
    if name == "process":
        if parameters:
            raise ConfigError(f"--parameter {settings[0]}: has no effect without --launcher slurm")
        return partial(LocalJob, jobs=jobs)
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

    def submit(run: StudyRun, slot: int) -> Job:
        try:
            return ClusterJob(executor.submit(work_of_job(run)), run)
        # The queue refuses the job: a wrong partition, a quota, no `sbatch`
        except (submitit.core.utils.FailedJobError, OSError) as error:
            raise ConfigError(f"--launcher {name}: {first_line(error)}") from None

    return submit


def command(run: StudyRun) -> list[str]:
    """Return the command that starts a run, or continues it if its folder holds a checkpoint.

    The command that continues a run overrides those keys of `WHERE_AND_HOW` that have changed.
    """
    if has_checkpoint(run.folder):
        script, *words = run.words_to_resume(changed_places(run))
    else:
        script, *words = run.words()
    return [sys.executable, str(ROOT / script), *words]


def format_command(run: StudyRun) -> str:
    """Format a run's command as one would type it; it is a comment if the run is finished."""
    _, script, *words = command(run)
    line = " ".join(map(_quoted, ["python", Path(script).name, *words]))
    if read_progress(run).state is State.FINISHED:
        return f"# finished: {line}"
    return line


def _quoted(word: str) -> str:
    """Quote a word for a shell."""
    if word.isprintable():
        return shlex.quote(word)
    # Bash and zsh read escapes such as \x1b in $'...', so that nothing unprintable is printed
    return "$'" + one_line(word.replace("\\", "\\\\").replace("'", "\\'")) + "'"


def command_of_job(run: StudyRun) -> list[str]:
    """Return the command of a cluster's job: a study of this run alone."""
    # The command of the run itself would not do: whether the run has a checkpoint to continue from
    # is known only when the job starts, perhaps again after a preemption.
    return [sys.executable, str(ROOT / "run_ablations.py"), *run.words_of_study()]


def work_of_job(run: StudyRun) -> Any:
    """Return what submitit runs for a run: its command, in the current folder."""
    from submitit.helpers import CommandFunction, DelayedSubmission

    # A function of this project would not do: to unpickle it, the job has to find its module.
    work = CommandFunction(command_of_job(run), cwd=Path.cwd())
    # submitit calls this when a job is preempted or at its time limit, and queues the result
    work.checkpoint = partial(DelayedSubmission, work)
    return work


def _reason(error: str, name: str) -> str:
    """Return why a job failed: the last line its command printed, without what surrounds it."""
    # submitit quotes the output of a failed command between two rules, or writes one of its own
    # messages, which begin with what matters
    rule = "\n----------------------\n"
    message, found, rest = error.strip().partition(rule)
    lines = message.splitlines()[:1]
    if found:
        lines = rest.partition(rule)[0].strip().splitlines()[-1:]
    line = "".join(lines)
    _, is_study, reason = line.partition(f"failed: {name} (")
    if is_study:
        return reason.removesuffix(")")
    line = line.rpartition("FailedJobError: ")[2].removeprefix("error: ")
    return line or "its job printed nothing"


def _environment(run: StudyRun, slot: int, jobs: int) -> dict[str, str]:
    """Return this process's environment, in which a run has its GPU and its share of the cores.

    A run on several GPUs sees all of them, and so does one whose config names its GPU, such as
    `cuda:1`. If there are more slots than GPUs, runs share GPUs.
    Where several runs share the cores, each process of each run computes with as many threads as it
    has cores, at least one. `OMP_NUM_THREADS` and `system.num_threads` come first.
    """
    environment = dict(os.environ)
    if jobs > 1 and run.config.system.num_threads is None:
        processes = jobs * max(1, run.config.n_gpu)
        threads = max(1, available_cpus() // processes)
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    asked = environment.get("CUDA_VISIBLE_DEVICES")
    if asked is None:
        visible = [str(index) for index in range(torch.cuda.device_count())]
    else:
        visible = asked.split(",")
    names_gpu = ":" in run.config.system.device
    if len(visible) > 1 and run.config.n_gpu <= 1 and not names_gpu:
        environment["CUDA_VISIBLE_DEVICES"] = visible[slot % len(visible)]
    return environment


def _terminate_with_parent() -> None:
    """Make Linux send this process SIGTERM when its parent dies.

    The new process calls it, so that a killed study leaves no run behind.
    """
    # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
