"""Work through the runs of a study: some at once, finished ones skipped, interrupted ones resumed.

Failures are reported at the end. Several processes may work through one study: a run that another
process works on is tried again after all others.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from shutil import get_terminal_size
from signal import Signals
from time import monotonic, sleep

from base.errors import ConfigError, Stopped
from base.run_folder.names import OUTPUT_LOG
from base.signals import StopSignals
from base.stopping import STOPPING
from studies.grid import StudyRun
from studies.launchers import BusyError, Job, Launch
from studies.progress import Progress, State, StatusRow, format_table, read_progress

POLL_SECONDS = 1.0

STOPPED = {code for number in STOPPING for code in (128 + number, -number)}
"""Exit codes of a run that a signal has stopped."""


class Study:
    """The runs of a study that one call works on, and their progress.

    Args:
        runs: the runs, in the order in which they are started.
        launch: starts a run; see `studies.launchers.launcher`.
        jobs: number of runs at once.
    """

    def __init__(self, runs: Sequence[StudyRun], launch: Launch, jobs: int) -> None:
        self.runs = runs
        self.launch = launch
        self.jobs = jobs
        self.failures: dict[StudyRun, str] = {}
        self.progress: dict[StudyRun, Progress] = {}
        for run in runs:
            self._update(run)
        to_do = (State.NEW, State.INTERRUPTED)
        self.waiting = [run for run in runs if self.progress[run].state in to_do]
        self.active: dict[StudyRun, _ActiveRun] = {}
        self.signals = StopSignals()

    def work(self) -> dict[StudyRun, str]:
        """Work until every run has finished or failed; return failed run -> reason.

        Raises:
            Stopped: a signal came. The runs have saved and exited; the same call continues them.
        """
        display = _Display()
        with self.signals.caught():
            while self.waiting or self.active:
                self._start_runs()
                self._poll()
                display.show(
                    [
                        StatusRow(run, self.progress[run], self._seconds_left(run))
                        for run in self.runs
                    ]
                )
                if self.signals.asked:
                    self._stop()
                if self.active or self.waiting:
                    sleep(POLL_SECONDS)
        return self.failures

    def _start_runs(self) -> None:
        """Start waiting runs while there are free slots."""

        def is_elsewhere(run: StudyRun) -> bool:
            return self.progress[run].state is State.ELSEWHERE

        # Runs that another process works on come last: there is nothing to do for them yet
        for run in sorted(self.waiting, key=is_elsewhere):
            if len(self.active) >= self.jobs or self.signals.asked:
                return
            slot = min(set(range(self.jobs)) - {active.slot for active in self.active.values()})
            try:
                job = self.launch(run, slot)
                self.active[run] = _ActiveRun(job, slot, monotonic(), self.progress[run].epoch)
            except BusyError:
                self._update(run, State.ELSEWHERE)
                continue
            except ConfigError as error:
                self.failures[run] = str(error)
            self.waiting.remove(run)

    def _poll(self) -> None:
        """Update the progress of active runs, and remove those that have ended."""
        for run, active in list(self.active.items()):
            code = active.job.exit_code()
            if code is None:
                self._update(run, State.RUNNING)
                continue
            del self.active[run]
            if self.signals.asked and code in STOPPED:
                # The terminal has sent the signal to the run, too: it has saved and stopped
                self._update(run)
                continue
            if code != 0:
                reason = f"{_describe_exit(code)}: {_last_line(run)}"
                self.failures[run] = active.job.error() or reason
            self._update(run, State.FINISHED)
        for run in self.failures:
            self.progress[run] = replace(self.progress[run], state=State.FAILED)

    def _update(self, run: StudyRun, state: State | None = None) -> None:
        """Read a run's progress; `state` overrides the state, which a folder cannot always tell."""
        try:
            progress = read_progress(run)
        except ConfigError as error:
            # A run writes while it works, perhaps on a network's disk: what counts is whether its
            # files can be read at its end.
            if state in (State.RUNNING, State.ELSEWHERE) and run in self.progress:
                return
            self.failures.setdefault(run, str(error))
            self.progress[run] = Progress(State.FAILED, 0, None)
            return
        if state is not None:
            progress = replace(progress, state=state)
        self.progress[run] = progress

    def _seconds_left(self, run: StudyRun) -> float | None:
        """Estimate the time from the epochs done since the start; None before the first of them."""
        if run not in self.active:
            return None
        active = self.active[run]
        epoch = self.progress[run].epoch
        # Epochs before a resume took their time in another process
        epochs_done = epoch - active.first_epoch
        if epochs_done <= 0:
            return None
        seconds_per_epoch = (monotonic() - active.started) / epochs_done
        return seconds_per_epoch * (run.config.trainer.epochs - epoch)

    def _stop(self) -> None:
        # All are asked before any is waited for, so that they save at the same time
        for active in self.active.values():
            active.job.stop()
        for run, active in self.active.items():
            active.job.wait()
            if not active.job.outlives:
                # It may have finished while it was asked to stop.
                self._update(run)
        over = (State.FINISHED, State.ELSEWHERE)
        left = sum(progress.state not in over for progress in self.progress.values())
        detached = sum(active.job.outlives for active in self.active.values())
        jobs = f"; {detached} jobs continue without this process" if detached else ""
        raise Stopped(
            f"stopped with {left} of {len(self.runs)} runs to do{jobs};"
            " the same command continues them",
            self.signals.asked,
        )


@dataclass(frozen=True)
class _ActiveRun:
    """A started run.

    Attributes:
        job: its job.
        slot: its number among those that run at once, from 0.
        started: when it was started, by the clock `monotonic`.
        first_epoch: number of epochs that were finished then.
    """

    job: Job
    slot: int
    started: float
    first_epoch: int


class _Display:
    """Shows the table of runs: redrawn in place in a terminal, elsewhere a line per new state."""

    def __init__(self) -> None:
        self.printed: set[tuple[str, State]] = set()
        self.lines_drawn = 0

    def show(self, rows: Sequence[StatusRow]) -> None:
        if sys.stdout.isatty():
            self._redraw(rows)
        else:
            self._print_changes(rows)

    def _print_changes(self, rows: Sequence[StatusRow]) -> None:
        header, *lines = format_table(rows)
        if not self.printed:
            print(header, flush=True)
        for row, line in zip(rows, lines, strict=True):
            state = (row.run.name, row.progress.state)
            if state not in self.printed:
                self.printed.add(state)
                print(line, flush=True)

    def _redraw(self, rows: Sequence[StatusRow]) -> None:
        lines = format_table(rows)
        size = get_terminal_size()
        # What has scrolled out of the terminal cannot be drawn over, so a long table is cut
        if len(lines) >= size.lines:
            lines = _shorten(lines, rows, size.lines - 2)
        lines = [line[: size.columns - 1] for line in lines]
        if self.lines_drawn:
            # Cursor up, then clear to the end of the screen
            print(f"\x1b[{self.lines_drawn}A\x1b[J", end="")
        print("\n".join(lines), flush=True)
        self.lines_drawn = len(lines)


def _shorten(lines: Sequence[str], rows: Sequence[StatusRow], count: int) -> list[str]:
    """Keep the header and the active runs, at most `count` lines, and add one line of counts."""
    header, *body = lines
    states = [row.progress.state for row in rows]
    active = [line for line, state in zip(body, states, strict=True) if state is State.RUNNING]
    finished = states.count(State.FINISHED)
    failed = states.count(State.FAILED)
    counts = f"{len(rows)} runs, {finished} finished, {failed} failed"
    return [header, *active[: count - 2], counts]


def _describe_exit(code: int) -> str:
    if code < 0:
        # Real-time signals have no names in `Signals`.
        names = {number.value: number.name for number in Signals}
        return f"killed by {names.get(-code, f'signal {-code}')}"
    return f"exit code {code}"


def _last_line(run: StudyRun) -> str:
    """Return the last line that the run printed, which is its error."""
    file = run.folder / OUTPUT_LOG
    if file.exists():
        for line in reversed(file.read_text(errors="replace").splitlines()):
            if line.strip():
                return line.removeprefix("error: ")
    return "it printed nothing"
