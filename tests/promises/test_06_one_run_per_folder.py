"""Promise 6: two runs never write into one folder."""

import os
import signal
from contextlib import contextmanager, suppress

import pytest

from base.errors import ConfigError
from base.run_folder import folder as run_folder
from experiment.experiment import resume
from tiny_runs import exit_code, forked, run

PROCESSES, ROUNDS = 6, 8


def check_race(folder):
    """Of several processes that create a folder at once, one gets it and the others exit with 2."""
    for number in range(ROUNDS):
        start, go = os.pipe()
        others, asking = os.pipe()

        def race(number=number, start=start, go=go, others=others, asking=asking):
            os.close(go)
            # The pipe ends when all processes have started
            os.read(start, 1)
            with run_folder.create("unused", "name", str(folder / str(number))) as created:
                os.close(asking)
                # It ends when all others have asked for the folder
                os.read(others, 1)
                (created / "config.json").touch()

        processes = [forked(race) for _ in range(PROCESSES)]
        for end in (start, go, others, asking):
            os.close(end)
        codes = sorted(exit_code(process) for process in processes)
        assert codes == [0] + [2] * (PROCESSES - 1), codes


def check_running(folder):
    """A run that is running cannot be continued by another process; a killed one can.

    The data loader's workers, which outlive a killed run for a while, do not hold its lock.
    """
    folder.mkdir()
    workers, report = os.pipe()

    def train():
        with run_folder.open(folder):
            os.write(report, f"{forked(signal.pause)}\n".encode())
            signal.pause()

    process = forked(train)
    worker = int(os.read(workers, 20))
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


def test_one_of_many_processes_gets_a_new_folder(tmp_path):
    check_race(tmp_path)


def test_a_running_run_is_left_alone_and_a_killed_one_can_be_continued_at_once(tmp_path):
    check_running(tmp_path / "run")


def test_a_folder_is_free_again_after_a_run_in_the_same_process(tmp_path, small):
    run(tmp_path / "run", small(trainer={"epochs": 1}))
    resume(str(tmp_path / "run"), overrides=[("trainer.epochs", "2")])
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
