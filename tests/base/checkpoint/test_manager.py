"""CheckpointManager: the names of a run's checkpoints after a kill."""

import pytest

from base.checkpoint import load_checkpoint, save_checkpoint
from base.checkpoint.manager import CheckpointManager
from base.config.training import TrainerConfig
from base.train_state import TrainState


@pytest.mark.parametrize("best_epoch", [1, 2])
def test_a_resume_gives_the_last_checkpoint_the_names_that_a_kill_left_out(tmp_path, best_epoch):
    for epoch, names in {1: ["model_best", "model_epoch_1"], 2: ["model_last"]}.items():
        for name in names:
            save_checkpoint(tmp_path / f"{name}.pth", {"state_dict": {}, "epoch": epoch})
    manager = CheckpointManager(tmp_path, TrainerConfig(save_period=1))
    state = TrainState(epochs_done=2, best_epoch=best_epoch)
    assert manager.restore_names(state, tmp_path / "model_last.pth", finished=False) is None
    epochs = {file.name: load_checkpoint(file)["epoch"] for file in tmp_path.iterdir()}
    assert epochs == {
        "model_best.pth": best_epoch,
        "model_epoch_1.pth": 1,
        "model_epoch_2.pth": 2,
        "model_last.pth": 2,
    }


def test_a_checkpoint_in_the_middle_of_an_epoch_gets_no_other_name(tmp_path):
    last = tmp_path / "model_last.pth"
    save_checkpoint(last, {"state_dict": {}, "epoch": 2})
    manager = CheckpointManager(tmp_path, TrainerConfig(save_period=1))
    manager.restore_names(TrainState(epochs_done=2, batches_done=1), last, finished=False)
    assert list(tmp_path.iterdir()) == [last]
