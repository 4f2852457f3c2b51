"""Promise 5: SIGTERM, SIGINT and SIGHUP save at the current step and exit 143, 130 and 129; a
second signal during the save does no harm; resume is exact."""

import json
import os
import signal
from importlib import import_module

import numpy as np
import pytest

import base.checkpoint.checkpoint as checkpoint_module
import base.signals as signals_module
from base.base_trainer import BaseTrainer
from base.checkpoint import load_checkpoint
from base.errors import Stopped
from base.signals import Interrupted, StopSignals
from experiment.experiment import resume
from tiny_runs import difference, read_arrays, run

robustness_module = import_module("evaluation.robust_accuracy")

CODES = ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129))

STEPS = 9
"""Three epochs of three minibatches."""


def check_signals(folder, monkeypatch, config):
    """Send a signal after every step, and more signals while the checkpoint is written."""
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
        number, code = CODES[after % 3]
        done = 0

        with monkeypatch.context() as patched:
            patched.setattr(BaseTrainer, "update", counted)
            patched.setattr(checkpoint_module.torch, "save", hurried)
            with pytest.raises(Stopped) as caught:
                run(folder / str(after), config)
        assert caught.value.exit_code == code
        progress = load_checkpoint(folder / str(after) / "model_last.pth")["progress"]
        assert progress["epochs_done"] * 3 + progress["batches_done"] == after
        resume(str(folder / str(after)))
        assert (
            difference(folder / "whole" / "model_last.pth", folder / str(after) / "model_last.pth")
            == []
        )
        assert (folder / "whole" / "metrics.jsonl").read_bytes() == (
            folder / str(after) / "metrics.jsonl"
        ).read_bytes()


def test_every_step_can_be_the_last(tmp_path, monkeypatch, small):
    check_signals(tmp_path, monkeypatch, small())


def test_the_check_can_fail(tmp_path, monkeypatch, small):
    """A second signal raises an exception, as Python's own handler would."""

    class Hasty(signals_module.StopSignals):
        def __setattr__(self, name, value):
            if name == "asked" and getattr(self, "asked", None):
                raise KeyboardInterrupt
            super().__setattr__(name, value)

    monkeypatch.setattr("base.base_trainer.StopSignals", Hasty)
    with pytest.raises((AssertionError, KeyboardInterrupt)):
        check_signals(tmp_path, monkeypatch, small())


def test_no_exception_is_raised_where_python_would_drop_it():
    """In a finalizer a signal is only remembered, and the next signal interrupts."""
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


def test_nohup_keeps_a_closed_terminal_from_stopping_a_run():
    signals = StopSignals()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.caught():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.asked is None
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signals.asked == signal.SIGTERM


def reported(small):
    """A run that attacks its test set of nine images in three batches at the end."""
    return small(
        adversarial={"method": "none", "report": True, "validate_every": 0},
        pgd_attack={"K": 2},
        data_loader={"args": {"batch_size": 4, "num_batches": 1}},
        trainer={"epochs": 1, "monitor": "off", "ema_decay": None},
    )


def check_final_attack(folder, monkeypatch, config, number, code):
    """Send a signal in the second batch; a resume keeps the verdicts of the first one."""
    monkeypatch.setattr("data_loader.training_data_loader.EVALUATION_BATCH", 4)
    run(folder / "whole", config)
    attack, attacked = robustness_module.attack_batch, []

    def interrupted(model, images, labels, *arguments, **options):
        attacked.append(options["positions"].tolist())
        if len(attacked) == 2:
            os.kill(os.getpid(), number)
        return attack(model, images, labels, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(robustness_module, "attack_batch", interrupted)
        with pytest.raises(
            Stopped, match=rf"in the final attack, .* are kept; continue with -r {folder / 'run'}"
        ) as caught:
            run(folder / "run", config)
        assert caught.value.exit_code == code
        assert attacked == [[0, 1, 2, 3], [4, 5, 6, 7]]
        (partial,) = (folder / "run" / "eval").iterdir()
        assert read_arrays(partial)["position"].tolist() == [0, 1, 2, 3]
        assert not (folder / "run" / "result.json").exists()
        resume(str(folder / "run"))
    assert attacked[2:] == [[4, 5, 6, 7], [8]]
    names = [
        sorted(path.name for path in (folder / name / "eval").iterdir())
        for name in ("whole", "run")
    ]
    assert (
        names[0]
        == names[1]
        == ["pgd_best.json", "pgd_best.verdicts.npz", "pgd_last.json", "pgd_last.verdicts.npz"]
    )
    verdicts = [
        read_arrays(folder / name / "eval" / "pgd_last.verdicts.npz") for name in ("whole", "run")
    ]
    assert all(np.array_equal(verdicts[0][key], verdicts[1][key]) for key in verdicts[0])
    results = [json.loads((folder / name / "result.json").read_text()) for name in ("whole", "run")]
    assert results[0]["test_robust_top1"] == results[1]["test_robust_top1"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_in_the_final_attack_loses_no_verdicts(tmp_path, monkeypatch, small, number, code):
    check_final_attack(tmp_path, monkeypatch, reported(small), number, code)


def test_the_check_of_the_final_attack_can_fail(tmp_path, monkeypatch, small):
    monkeypatch.setattr(
        robustness_module, "known_verdicts", lambda partial: robustness_module.Verdicts.empty()
    )
    with pytest.raises(AssertionError):
        check_final_attack(tmp_path, monkeypatch, reported(small), signal.SIGTERM, 143)
