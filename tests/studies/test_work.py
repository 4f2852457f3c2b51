"""What a study makes of runs that end, cannot be read, or are stopped."""

import signal
from dataclasses import dataclass, replace

import pytest

from base.errors import ConfigError, Stopped
from studies import work
from studies.launchers import BusyError, Job
from studies.progress import Progress, State
from studies.work import Study, _describe_exit


@dataclass
class ScriptedJob(Job):
    """Ends with 0 after a number of questions."""

    questions: int

    def exit_code(self):
        self.questions -= 1
        return None if self.questions >= 0 else 0

    def error(self):
        return None

    def stop(self):
        self.questions = 0

    def wait(self):
        pass


def scripted(monkeypatch, *answers):
    """Let `read_progress` give these answers, the last one from then on."""
    left = list(answers)

    def read(run):
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(work, "read_progress", read)
    monkeypatch.setattr(work, "POLL_SECONDS", 0)


NEW, HALF = Progress(State.NEW, 0, None), Progress(State.INTERRUPTED, 2, 0.5)
DONE = Progress(State.FINISHED, 4, 0.7)
UNREADABLE = ConfigError("metrics.jsonl: stale file handle")


def test_a_file_that_cannot_be_read_for_a_moment_fails_no_run(run, monkeypatch):
    scripted(monkeypatch, NEW, HALF, UNREADABLE, HALF, DONE)
    study = Study([run], lambda run, slot: ScriptedJob(3), jobs=1)
    assert study.work() == {}
    assert study.progress[run] == DONE


def test_a_file_that_cannot_be_read_at_the_end_is_the_reason(run, monkeypatch):
    scripted(monkeypatch, NEW, HALF, UNREADABLE)
    study = Study([run], lambda run, slot: ScriptedJob(1), jobs=1)
    assert study.work() == {run: str(UNREADABLE)}
    assert study.progress[run].state is State.FAILED


@pytest.mark.parametrize(("at_the_end", "to_do"), [(DONE, 0), (HALF, 1)])
def test_a_run_that_finishes_while_it_is_stopped_is_not_to_do(run, monkeypatch, at_the_end, to_do):
    scripted(monkeypatch, NEW, HALF, at_the_end)
    study = Study([run], lambda run, slot: ScriptedJob(9), jobs=1)

    def stop(rows):
        study.signals.asked = signal.SIGINT

    monkeypatch.setattr(work._Display, "show", lambda self, rows: stop(rows))
    with pytest.raises(Stopped, match=f"^stopped with {to_do} of 1 runs to do; the same command"):
        study.work()


@pytest.mark.parametrize(
    ("code", "failed"), [(128 + signal.SIGINT, False), (-signal.SIGTERM, False), (5, True)]
)
def test_a_run_that_a_signal_stopped_beside_the_study_has_not_failed(
    run, monkeypatch, code, failed
):
    """A terminal's Ctrl-C reaches the study and its runs at once."""
    scripted(monkeypatch, NEW, HALF, HALF)

    class StoppedJob(ScriptedJob):
        def exit_code(self):
            study.signals.asked = signal.SIGINT
            return code

    study = Study([run], lambda run, slot: StoppedJob(1), jobs=1)
    with pytest.raises(Stopped, match="^stopped with 1 of 1 runs to do; the same command"):
        study.work()
    assert bool(study.failures) == failed
    assert study.progress[run].state is (State.FAILED if failed else State.INTERRUPTED)


def test_the_end_of_a_process_is_named():
    assert _describe_exit(3) == "exit code 3"
    assert _describe_exit(-signal.SIGKILL) == "killed by SIGKILL"
    assert _describe_exit(-(signal.SIGRTMIN + 1)) == f"killed by signal {signal.SIGRTMIN + 1}"


def test_epochs_before_a_resume_do_not_count_in_the_time_left(run, monkeypatch):
    """Two of four epochs were done before; the third has taken 10 s, so the fourth takes 10 s."""
    scripted(monkeypatch, HALF)
    study = Study([run], lambda run, slot: ScriptedJob(9), jobs=1)
    clock = iter([100.0, 110.0])
    monkeypatch.setattr(work, "monotonic", lambda: next(clock))
    study._start_runs()
    assert study._seconds_left(run) is None
    study.progress[run] = Progress(State.RUNNING, 3, 0.5)
    assert study._seconds_left(run) == 10


def test_a_run_that_another_process_works_on_is_not_to_do(run, monkeypatch):
    scripted(monkeypatch, NEW)

    def busy(run, slot):
        raise BusyError("another process works on it")

    study = Study([run], busy, jobs=1)
    monkeypatch.setattr(
        work._Display, "show", lambda self, rows: setattr(study.signals, "asked", signal.SIGINT)
    )
    with pytest.raises(Stopped, match="^stopped with 0 of 1 runs to do; the same command"):
        study.work()


def test_a_run_of_another_process_is_tried_again_after_all_others(run, monkeypatch):
    runs = [replace(run, variant=name) for name in "abc"]
    scripted(monkeypatch, NEW)
    tried = []

    def launch(run, slot):
        tried.append(run.variant)
        if tried == ["a"]:
            raise BusyError("another process works on it")
        return ScriptedJob(1)

    assert Study(runs, launch, jobs=1).work() == {}
    assert tried == ["a", "b", "c", "a"]
