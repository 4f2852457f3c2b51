"""Working through the runs of a study: some at once, finished ones skipped, broken ones continued,
failures told at the end.

Several processes may work through one study: a run that another one works on is looked at again
when all else is done."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from shutil import get_terminal_size
from signal import Signals
from time import monotonic, sleep

from base.errors import ConfigError, Stopped
from base.signals import StopSignals
from studies.grid import Run
from studies.launchers import BusyError, Job, Start
from studies.progress import (
    BROKEN,
    ELSEWHERE,
    FAILED,
    FINISHED,
    NEW,
    RUNNING,
    Progress,
    look,
    table,
)

SECONDS_BETWEEN_LOOKS = 1.0
STATES = (FINISHED, FAILED, RUNNING, ELSEWHERE, BROKEN, NEW)


class Study:
    """The runs of one call, and how far they are.

    Args:
        runs: what to work through, in this order.
        start: starts a run; see `studies.launchers.launcher`.
        jobs: how many at once.

    """

    def __init__(self, runs: Sequence[Run], start: Start, jobs: int) -> None:
        self.runs, self.start, self.jobs = runs, start, jobs
        self.failures: dict[Run, str] = {}
        self.progress: dict[Run, Progress] = {}
        for run in runs:
            self._read(run)
        self.waiting = [run for run in runs if self.progress[run].state in (NEW, BROKEN)]
        self.working: dict[Run, _Work] = {}
        self.signals = StopSignals()

    def work(self) -> dict[Run, str]:
        """Work until every run is finished or has failed; returns what went wrong with those that
        failed.

        Raises:
            Stopped: a signal came; the runs have saved and left, and the same call continues them.
        """
        screen = _Screen()
        with self.signals.caught():
            while self.waiting or self.working:
                self._begin()
                self._look()
                screen.show(
                    table([(run, self.progress[run], self._seconds_left(run)) for run in self.runs])
                )
                if self.signals.asked:
                    self._leave()
                if self.working or self.waiting:
                    sleep(SECONDS_BETWEEN_LOOKS)
        return self.failures

    def _begin(self) -> None:
        """Start runs while there is room; those that another process works on go on waiting, behind
        the others."""
        for run in sorted(self.waiting, key=lambda run: self.progress[run].state == ELSEWHERE):
            if len(self.working) >= self.jobs or self.signals.asked:
                return
            slot = min(set(range(self.jobs)) - {work.slot for work in self.working.values()})
            try:
                self.working[run] = _Work(
                    self.start(run, slot), slot, monotonic(), self.progress[run].epoch
                )
            except BusyError:
                self._read(run, ELSEWHERE)
                continue
            except ConfigError as error:
                self.failures[run] = str(error)
            self.waiting.remove(run)

    def _look(self) -> None:
        for run, work in list(self.working.items()):
            code = work.job.exit_code()
            if code is not None:
                del self.working[run]
            if code:
                self.failures[run] = work.job.error() or f"{_ending(code)}: {_last_line(run)}"
            self._read(run, RUNNING if code is None else FINISHED)
        for run in self.failures:
            self.progress[run] = replace(self.progress[run], state=FAILED)

    def _read(self, run: Run, state: str | None = None) -> None:
        """What the folder says, and the state that it cannot know."""
        try:
            progress = look(run)
            self.progress[run] = replace(progress, state=state or progress.state)
        except ConfigError as error:
            self.failures.setdefault(run, str(error))
            self.progress[run] = Progress(FAILED, 0, None)

    def _seconds_left(self, run: Run) -> float | None:
        """By the epochs it has done since it was started here; None where that says nothing."""
        if run not in self.working:
            return None
        work, epoch = self.working[run], self.progress[run].epoch
        done, left = epoch - work.first_epoch, run.config.trainer.epochs - epoch
        return (monotonic() - work.begun) / done * left if done > 0 else None

    def _leave(self) -> None:
        for work in self.working.values():
            work.job.stop()
        for work in self.working.values():
            work.job.wait()
        left = sum(
            progress.state not in (FINISHED, ELSEWHERE) for progress in self.progress.values()
        )
        going_on = sum(work.job.outlives for work in self.working.values())
        jobs = f"; {going_on} jobs go on without this process" if going_on else ""
        raise Stopped(
            f"stopped with {left} of {len(self.runs)} runs to do{jobs}; the same command continues them",
            self.signals.asked,
        )


@dataclass(frozen=True)
class _Work:
    """A run at work: its job, its place among those at once, when it was begun (of `monotonic`),
    after how many epochs."""

    job: Job
    slot: int
    begun: float
    first_epoch: int


class _Screen:
    """Shows a table over and over: in a terminal in place, elsewhere only the lines that have a new
    state."""

    def __init__(self) -> None:
        self.shown: set[str] = set()
        self.drawn = 0

    def show(self, text: str) -> None:
        if sys.stdout.isatty():
            self._draw(text.splitlines())
            return
        for line in text.splitlines():
            state = next((state for state in STATES if f"  {state}" in line), "")
            key = f"{line.split('  ')[0]} {state}"
            if key not in self.shown:
                self.shown.add(key)
                print(line, flush=True)

    def _draw(self, lines: list[str]) -> None:
        """Over what was drawn before; of a table that is higher than the terminal only the runs at
        work, cut at its edges."""
        size = get_terminal_size()
        if len(lines) >= size.lines:
            working = [line for line in lines[1:] if f"  {RUNNING}" in line]
            counts = ", ".join(
                f"{sum(f'  {state}' in line for line in lines)} {state}"
                for state in (FINISHED, FAILED)
            )
            lines = [lines[0], *working[: size.lines - 4], f"{len(lines) - 1} runs, {counts}"]
        lines = [line[: size.columns - 1] for line in lines]
        up = f"\x1b[{self.drawn}A\x1b[J" if self.drawn else ""
        print(up + "\n".join(lines), flush=True)
        self.drawn = len(lines)


def _ending(code: int) -> str:
    """`exit code 2`, or `killed by SIGKILL`."""
    return f"exit code {code}" if code > 0 else f"killed by {Signals(-code).name}"


def _last_line(run: Run) -> str:
    """What the run said last, which is its error."""
    file = run.folder / "output.log"
    lines = file.read_text(errors="replace").splitlines() if file.exists() else []
    last = next((line for line in reversed(lines) if line.strip()), "it said nothing")
    return last.removeprefix("error: ")
