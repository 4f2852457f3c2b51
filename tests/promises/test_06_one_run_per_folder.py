"""Promise 6: two runs never write into one folder."""

import os
import signal
from contextlib import contextmanager, suppress

import pytest

from base.errors import ConfigError
from base.run_folder import folder as run_folder
from experiment.experiment import Experiment
from tiny_runs import exit_code, forked, run

PROCESSES, ROUNDS = 6, 8


def check_race(folder):
    """Several processes that ask for the same new folder at the same time: one gets it, the others
    leave with exit code 2."""
    for number in range(ROUNDS):
        start, go = os.pipe()
        others, asking = os.pipe()

        def race(number=number, start=start, go=go, others=others, asking=asking):
            os.close(go)
            os.read(start, 1)  # the pipe ends when all processes are there
            with run_folder.create("unused", "name", str(folder / str(number))) as mine:
                os.close(asking)
                # it ends when everybody else has asked, and got the folder or left
                os.read(others, 1)
                (mine / "config.json").touch()

        processes = [forked(race) for _ in range(PROCESSES)]
        for end in (start, go, others, asking):
            os.close(end)
        codes = sorted(exit_code(process) for process in processes)
        assert codes == [0] + [2] * (PROCESSES - 1), codes


def check_running(folder):
    """A run that is at work cannot be continued by another process; when it has been killed, it
    can, although its loader's workers outlive it for a while."""
    folder.mkdir()
    sleepers, told = os.pipe()

    def train():
        with run_folder.open(folder):
            os.write(told, f"{forked(signal.pause)}\n".encode())
            signal.pause()

    process = forked(train)
    worker = int(os.read(sleepers, 20))
    try:
        with (
            pytest.raises(ConfigError, match="another process trains in this folder"),
            run_folder.open(folder),
        ):
            pass
        os.kill(process, signal.SIGKILL)
        exit_code(process)
        with run_folder.open(folder):
            pass
    finally:
        for number in (process, worker):
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)


def test_of_many_processes_one_gets_a_new_folder(tmp_path):
    check_race(tmp_path)


def test_a_run_at_work_is_left_alone_and_a_dead_one_can_be_continued_at_once(tmp_path):
    check_running(tmp_path / "run")


def test_a_folder_is_free_again_after_a_run_in_the_same_process(tmp_path, small):
    run(tmp_path / "run", small(trainer={"epochs": 1}))
    Experiment.resume(str(tmp_path / "run"), overrides=[("trainer.epochs", "2")])
    assert (tmp_path / "run" / ".lock").exists()


@pytest.mark.parametrize(
    "check", [check_race, lambda folder: check_running(folder / "run")], ids=["race", "running"]
)
def test_the_checks_can_fail(tmp_path, monkeypatch, check):
    @contextmanager
    def everyone(file):
        file.touch()
        yield True

    monkeypatch.setattr(run_folder, "process_lock", everyone)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(tmp_path)
