"""Working through the runs of a study: some at once, finished ones skipped, broken ones continued, failures told at the end."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from shutil import get_terminal_size
from time import monotonic, sleep

from base.errors import ConfigError, Stopped
from base.signals import StopSignals
from studies.grid import Run
from studies.launchers import Job
from studies.progress import BROKEN, FAILED, FINISHED, NEW, RUNNING, Progress, look, table

SECONDS_BETWEEN_LOOKS = 1.0


class Study:
    """The runs of one call, and how far they are.

    Args:
        runs: what to work through, in this order.
        start: starts a run; see `studies.launchers.launcher`.
        jobs: how many at once.

    Raises:
        ConfigError: a run folder holds something else.
    """

    def __init__(self, runs: Sequence[Run], start: Callable[[Run], Job], jobs: int) -> None:
        self.runs, self.start, self.jobs = runs, start, jobs
        self.progress: dict[Run, Progress] = {run: look(run) for run in runs}
        self.waiting = [run for run in runs if self.progress[run].state in (NEW, BROKEN)]
        self.working: dict[Run, tuple[Job, float, int]] = {}
        self.failures: dict[Run, str] = {}
        self.signals = StopSignals()

    def work(self) -> dict[Run, str]:
        """Work until every run is finished or has failed; returns what went wrong with those that failed.

        Raises:
            Stopped: a signal came; the runs have saved and left, and the same call continues them.
        """
        screen = _Screen()
        with self.signals.caught():
            while self.waiting or self.working:
                while self.waiting and len(self.working) < self.jobs and not self.signals.asked:
                    self._begin(self.waiting.pop(0))
                self._look()
                screen.show(table([(run, self.progress[run], self._seconds_left(run)) for run in self.runs]))
                if self.signals.asked:
                    self._leave()
                if self.working:
                    sleep(SECONDS_BETWEEN_LOOKS)
        return self.failures

    def _begin(self, run: Run) -> None:
        try:
            self.working[run] = (self.start(run), monotonic(), self.progress[run].epoch)
        except ConfigError as error:
            self.failures[run] = str(error)

    def _look(self) -> None:
        for run in self.runs:
            if run not in self.working:
                state = FAILED if run in self.failures else self.progress[run].state
                self.progress[run] = replace(self.progress[run], state=state)
                continue
            code = self.working[run][0].exit_code()
            self.progress[run] = replace(look(run), state=RUNNING if code is None else FINISHED if code == 0 else FAILED)
            if code is not None:
                del self.working[run]
            if code:
                self.failures[run] = f"exit code {code}: {_last_line(run)}"

    def _seconds_left(self, run: Run) -> float | None:
        """By the epochs it has done since it was started here; None where that says nothing."""
        if run not in self.working:
            return None
        _, begun, first = self.working[run]
        done, left = self.progress[run].epoch - first, run.config.trainer.epochs - self.progress[run].epoch
        return (monotonic() - begun) / done * left if done > 0 else None

    def _leave(self) -> None:
        for job, _, _ in self.working.values():
            job.stop()
        for job, _, _ in self.working.values():
            job.wait()
        left = sum(progress.state != FINISHED for progress in self.progress.values())
        raise Stopped(
            f"stopped with {left} of {len(self.runs)} runs to do; the same command continues them", self.signals.asked
        )


class _Screen:
    """Shows a table over and over: in a terminal in place, elsewhere only the lines that have a new state."""

    def __init__(self) -> None:
        self.shown: set[str] = set()
        self.drawn = 0

    def show(self, text: str) -> None:
        if sys.stdout.isatty():
            self._draw(text.splitlines())
            return
        for line in text.splitlines():
            state = next((state for state in (FINISHED, FAILED, RUNNING, BROKEN, NEW) if f"  {state}" in line), "")
            key = f"{line.split('  ')[0]} {state}"
            if key not in self.shown:
                self.shown.add(key)
                print(line, flush=True)

    def _draw(self, lines: list[str]) -> None:
        """Over what was drawn before; of a table that is higher than the terminal only the runs at work."""
        if len(lines) >= get_terminal_size().lines:
            working = [line for line in lines[1:] if f"  {RUNNING}" in line]
            finished = sum(f"  {FINISHED}" in line for line in lines)
            lines = [lines[0], *working, f"{len(lines) - 1} runs, {finished} finished"]
        up = f"\x1b[{self.drawn}A\x1b[J" if self.drawn else ""
        print(up + "\n".join(lines), flush=True)
        self.drawn = len(lines)


def _last_line(run: Run) -> str:
    """What the run said last, which is its error."""
    file = run.folder / "output.log"
    lines = file.read_text(errors="replace").splitlines() if file.exists() else []
    return next((line for line in reversed(lines) if line.strip()), "it said nothing")
