"""Training from Python, as in a notebook or a user's own script."""

import json
import logging
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import experiment
from base.base_trainer import BaseTrainer
from base.errors import CheckpointError, ConfigError, Stopped
from tiny_runs import ROOT, TINY, config_of, difference

pytestmark = pytest.mark.usefixtures("only_few_digits")

SMALL = {
    "trainer.epochs": 1,
    "data_loader.args.num_batches": 2,
    "data_loader.args.batch_size": 8,
    "trainer.verbosity": 0,
}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The quickstart's run, shortened to two minibatches."""
    folder = tmp_path_factory.mktemp("python") / "run"
    constant = {"lr_scheduler.type": "none", "lr_scheduler.args": None}
    settings = {**SMALL, **constant, "seed": np.int64(5)}
    return experiment.train(ROOT / "configs" / "quickstart.json", settings, run_dir=folder)


def test_parts_are_made_of_a_resolved_config_only():
    with pytest.raises(TypeError, match=r"^config: .* base\.config\.validate\(tree\) .* a dict$"):
        experiment.Experiment.from_config(TINY)


def test_a_config_file_overrides_and_a_result(quick):
    written = json.loads((quick.folder / "result.json").read_text())
    assert quick == quick.as_dict() == written
    assert quick["epochs"] == 1
    config = json.loads((quick.folder / "config.json").read_text())
    assert (config["seed"], config["data_loader"]["args"]["batch_size"]) == (5, 8)


def test_a_finished_run_continues_with_more_epochs(quick):
    more = experiment.resume(quick.folder, {"trainer.epochs": 2})
    assert (more["epochs"], more.folder) == (2, quick.folder)
    with pytest.raises(
        ConfigError, match=r"^overrides seed=6: seed: the run was started with 5; 6 would"
    ):
        experiment.resume(str(quick.folder), {"seed": 6})
    with pytest.raises(CheckpointError):
        experiment.resume(quick.folder / "nothing")


def test_a_tree_and_a_resolved_config_train_alike_and_in_a_thread_without_signals(tmp_path):
    handlers = list(logging.getLogger().handlers)
    settings = {"trainer.epochs": 1, "optimizer.args": {"lr": 0.02}, "trainer.early_stop": None}
    experiment.train(TINY, settings, run_dir=tmp_path / "tree")
    config = config_of(trainer={"epochs": 1}, optimizer={"args": {"lr": 0.02}})
    thread = threading.Thread(
        target=experiment.train, args=(config,), kwargs={"run_dir": tmp_path / "thread"}
    )
    thread.start()
    thread.join()
    assert (
        difference(tmp_path / "tree" / "model_last.pth", tmp_path / "thread" / "model_last.pth")
        == []
    )
    assert logging.getLogger().handlers == handlers


def test_a_new_folder_is_made_where_none_is_named(tmp_path):
    result = experiment.train(
        TINY, {"trainer.epochs": 1, "trainer.save_dir": tmp_path, "name": "mine"}
    )
    assert result.folder.parent == tmp_path / "mine"
    assert (result.folder / "result.json").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"trainer.epoch": 3}, r"trainer\.epoch: unknown key; did you mean 'epochs'\?"),
        ({"trainer.epochs": 0}, r"trainer\.epochs: .*not 0$"),
        (
            {"trainer.epochs": torch.tensor(3)},
            r"^trainer\.epochs: tensor\(3\) is not a value that JSON can hold$",
        ),
        (
            {"n_gpu": 2},
            r"n_gpu: asks for 2 processes, but there is only one: train with train\.py or under",
        ),
    ],
)
def test_errors_are_exceptions_of_one_line(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        experiment.train(TINY, overrides, run_dir=tmp_path / "run")
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_ctrl_c_saves_and_is_an_exception(tmp_path, monkeypatch):
    update = BaseTrainer.update

    def interrupted(self, losses):
        update(self, losses)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(BaseTrainer, "update", interrupted)
        with pytest.raises(
            Stopped, match=r"^stopped by SIGINT after 0 epochs and 1 batch; continue with -r "
        ):
            experiment.train(TINY, {"trainer.epochs": 1}, run_dir=tmp_path / "run")
    experiment.train(TINY, {"trainer.epochs": 1}, run_dir=tmp_path / "whole")
    experiment.resume(tmp_path / "run")
    assert (
        difference(tmp_path / "whole" / "model_last.pth", tmp_path / "run" / "model_last.pth") == []
    )


def test_training_from_python_reads_no_command_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    monkeypatch.chdir(tmp_path)
    result = experiment.train(TINY, {"trainer.epochs": 1}, run_dir="here")
    assert result.folder == Path("here")


def test_one_run_changes_neither_the_caller_nor_the_next_run(tmp_path):
    one_epoch = {"trainer.epochs": 1}
    threads = torch.get_num_threads()
    first = experiment.train(TINY, one_epoch, run_dir=tmp_path / "first")
    generator = torch.get_rng_state()
    torch.use_deterministic_algorithms(True)
    try:
        more_threads = one_epoch | {"system.num_threads": threads + 1}
        experiment.train(TINY, more_threads, run_dir=tmp_path / "other")
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), generator)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        again = experiment.train(TINY, one_epoch, run_dir=tmp_path / "again")
    assert not difference(first.folder / "model_last.pth", again.folder / "model_last.pth")


def test_an_experiment_runs_once(tmp_path):
    made = experiment.Experiment.from_config(config_of(trainer={"epochs": 1}))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError):
        made.run(tmp_path / "file")
    made.run(tmp_path / "run")
    with pytest.raises(RuntimeError, match=r"^this experiment has run; make a new one with "):
        made.run(tmp_path / "again")
    assert not (tmp_path / "again").exists()
