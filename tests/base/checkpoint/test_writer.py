"""CheckpointWriter: the copy, the thread, its errors, and forks."""

import os
import threading

import pytest
import torch

import base.checkpoint.writer as writer_module
from base.checkpoint import load_checkpoint
from base.checkpoint.manager import CheckpointManager
from base.checkpoint.writer import CheckpointWriter
from base.config.training import TrainerConfig
from base.errors import CheckpointError, NonFiniteError


@pytest.fixture
def held(monkeypatch):
    """An event: no checkpoint is written before it is set."""
    event = threading.Event()
    save = writer_module.save_checkpoint

    def late(path, contents):
        event.wait(10)
        save(path, contents)

    monkeypatch.setattr(writer_module, "save_checkpoint", late)
    yield event
    event.set()


def test_what_changes_during_the_write_is_not_saved(tmp_path, held):
    weight, history = torch.ones(3), [{"epoch": 1}]
    writer = CheckpointWriter()
    writer.write(tmp_path / "c.pth", {"state_dict": {"w": weight}, "history": history})
    weight.zero_()
    history[0]["epoch"] = 2
    history.append({})
    held.set()
    writer.join()
    saved = load_checkpoint(tmp_path / "c.pth")
    assert saved["state_dict"]["w"].tolist() == [1, 1, 1]
    assert saved["history"] == [{"epoch": 1}]


def test_training_goes_on_during_the_write_and_the_log_follows_it(tmp_path, held):
    calls = []
    writer = CheckpointWriter()
    file = tmp_path / "c.pth"
    writer.write(
        file,
        {"state_dict": {}},
        lambda: calls.append(("published", file.exists())),
        lambda: calls.append(("logged", threading.current_thread() is threading.main_thread())),
    )
    writer.poll()
    assert calls == []
    assert not file.exists()
    held.set()
    writer.wait()
    assert calls == [("published", True)]
    writer.poll()
    writer.join()
    assert calls == [("published", True), ("logged", True)]


@pytest.mark.parametrize("ask", ["poll", "join", "write"])
def test_an_error_is_raised_once_and_nothing_is_logged(tmp_path, ask):
    logged = []
    writer = CheckpointWriter()
    writer.write(tmp_path / "gone" / "c.pth", {"state_dict": {}}, then=lambda: logged.append(1))
    writer.wait()
    arguments = (tmp_path / "c.pth", {"state_dict": {}}) if ask == "write" else ()
    with pytest.raises(CheckpointError, match="c.pth: cannot be written: "):
        getattr(writer, ask)(*arguments)
    writer.join()
    assert logged == []
    assert not (tmp_path / "c.pth").exists()


def test_a_fork_waits_for_the_write(tmp_path, held):
    writer = CheckpointWriter()
    writer.write(tmp_path / "c.pth", {"state_dict": {}})
    threading.Timer(0.1, held.set).start()
    process = os.fork()
    if process == 0:
        os._exit(0 if (tmp_path / "c.pth").exists() else 1)
    _, status = os.waitpid(process, 0)
    assert status == 0
    writer.join()


def ended(manager, error=None):
    with manager.completed():
        manager.save_last({"state_dict": {}})
        if error is not None:
            raise error


def test_an_error_of_the_run_wins_over_one_of_its_last_save(tmp_path, caplog):
    manager = CheckpointManager(tmp_path / "gone", TrainerConfig())
    with pytest.raises(NonFiniteError):
        ended(manager, NonFiniteError("diverged"))
    assert "model_last.pth: cannot be written" in caplog.text
    with pytest.raises(CheckpointError, match="cannot be written"):
        ended(manager)
