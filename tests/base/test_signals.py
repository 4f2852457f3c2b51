"""A signal ends a process that waits in vain for another one."""

import signal

import pytest

from tests.base.distributed.two_processes import ended, start_two

SCRIPT = """
import sys, time
import torch
import base.signals
from base.command_line import run_script
from base.distributed import all_gather_object, rank, distributed_session
from base.distributed.ddp import wrap_ddp
from base.signals import StopSignals

base.signals.PATIENCE = 1.0

def wait_in(place):
    if place == "evaluation":
        if rank() == 1:
            time.sleep(1000)
        print("waiting", flush=True)
        all_gather_object("verdicts")
    model = wrap_ddp(torch.nn.Linear(3, 2))
    with StopSignals().caught():
        loss = model(torch.ones(5, 3)).sum()
        if rank() == 1:
            time.sleep(1000)
        print("waiting", flush=True)
        loss.backward()

def main():
    with distributed_session(training=True):
        wait_in(sys.argv[1])

run_script(main)
"""


@pytest.mark.parametrize(
    ("place", "number", "code", "message"),
    [
        (
            "update",
            signal.SIGTERM,
            143,
            "stopped by SIGTERM while it waited for another process",
        ),
        ("evaluation", signal.SIGINT, 130, "interrupted"),
    ],
)
def test_a_process_that_waits_in_a_collective_ends_with_its_exit_code(
    tmp_path, place, number, code, message
):
    (tmp_path / "script.py").write_text(SCRIPT)
    processes = start_two(tmp_path / "script.py", place)
    try:
        # The gloo of torch 2.10 writes lines of its own before.
        assert "waiting\n" in processes[0].stdout
        processes[0].send_signal(number)
        codes, errors = ended(processes[:1])
        assert codes == [code]
        assert "Traceback" not in errors[0]
        if place == "update":
            # The signal has reached the other process, too, which neither computes nor answers.
            # Either of them may report it first.
            other_codes, other_errors = ended(processes[1:])
            assert other_codes == [code]
            errors += other_errors
        assert message in "".join(errors)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
