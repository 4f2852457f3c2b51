"""Promise 5: SIGTERM and SIGINT save at the current step and exit 143 and 130; a second signal during the save does no harm;
resume is exact."""

import os
import signal

import pytest

import base.checkpoint as checkpoint_module
import base.signals as signals_module
from base.base_trainer import BaseTrainer
from base.checkpoint import load_checkpoint
from base.errors import Stopped
from base.signals import Interrupted, StopSignals
from experiment import Experiment
from tiny_runs import difference, run

STEPS = 9
"""Three epochs of three minibatches."""


def check_signals(folder, monkeypatch, config):
    """A signal after every step, and several more while the checkpoint is written."""
    run(folder / "whole", config)
    update, save = BaseTrainer.update, checkpoint_module.torch.save
    done = after = number = 0

    def counted(self, loss):
        nonlocal done
        update(self, loss)
        done += 1
        if done == after:
            os.kill(os.getpid(), number)

    def hurried(contents, file):
        if done == after:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
        save(contents, file)
        if done == after:
            os.kill(os.getpid(), signal.SIGINT)

    for after in range(1, STEPS):
        number, code = ((signal.SIGTERM, 143), (signal.SIGINT, 130))[after % 2]
        done = 0

        with monkeypatch.context() as patched:
            patched.setattr(BaseTrainer, "update", counted)
            patched.setattr(checkpoint_module.torch, "save", hurried)
            with pytest.raises(Stopped) as caught:
                run(folder / str(after), config)
        assert caught.value.exit_code == code
        progress = load_checkpoint(folder / str(after) / "model_last.pth")["progress"]
        assert progress["epochs_done"] * 3 + progress["batches_done"] == after
        Experiment.resume(str(folder / str(after)))
        assert difference(folder / "whole" / "model_last.pth", folder / str(after) / "model_last.pth") == []
        assert (folder / "whole" / "metrics.jsonl").read_bytes() == (folder / str(after) / "metrics.jsonl").read_bytes()


def test_every_step_can_be_the_last(tmp_path, monkeypatch, small):
    check_signals(tmp_path, monkeypatch, small())


def test_the_check_can_fail(tmp_path, monkeypatch, small):
    """A second signal that ends what is going on, as Python's own handler would."""

    class Hasty(signals_module.StopSignals):
        def __setattr__(self, name, value):
            if name == "asked" and getattr(self, "asked", None):
                raise KeyboardInterrupt
            super().__setattr__(name, value)

    monkeypatch.setattr("base.base_trainer.StopSignals", Hasty)
    with pytest.raises((AssertionError, KeyboardInterrupt)):
        check_signals(tmp_path, monkeypatch, small())


def test_no_exception_is_raised_where_python_would_forget_it():
    """In a finaliser; the signal is remembered all the same, and the next one interrupts."""
    signals = StopSignals()

    class Cleared:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)

    with signals.caught(), signals.interrupting():
        Cleared()
        assert signals.asked == signal.SIGTERM
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGINT)
    assert signals.asked == signal.SIGTERM
