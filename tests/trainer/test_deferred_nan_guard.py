"""Training where the host seldom asks whether all numbers are finite, as on a GPU."""

import math
import signal

import pytest
import torch

from base.checkpoint import load_checkpoint
from base.errors import NonFiniteError
from tests.base.test_nan_guard import Reads
from tests.trainer.test_trainer import TinyLoader, TinyModel, build, lines


def defer(trainer):
    trainer.nan_guard.deferred_on = ("cpu",)
    return trainer


def new(folder):
    folder.mkdir()
    return folder


class OneBadBatch(TinyLoader):
    """The second of three minibatches holds a NaN; `then` is called when the third is asked for."""

    then = staticmethod(lambda: None)

    def __iter__(self):
        for number, (images, labels) in enumerate(super().__iter__()):
            if number == 2:
                self.then()
            yield (
                (images.index_fill(1, torch.tensor([0]), math.nan) if number == 1 else images),
                labels,
            )


@pytest.mark.parametrize("stopped", [False, True])
def test_a_bad_batch_found_later_has_changed_no_weight_and_no_checkpoint(tmp_path, stopped):
    loader = OneBadBatch()
    settings = {"trainer": {"ema_decay": 0.9}}
    trainer = defer(build(tmp_path, settings, train_loader=loader))
    if stopped:
        loader.then = lambda: setattr(trainer.signals, "asked", signal.SIGTERM)
    message = (
        "epoch 1, batch 2: the loss or the gradient is not finite: training stopped before "
        ".*model_last.pth holds the weights that training began with"
    )
    with pytest.raises(NonFiniteError, match=message):
        trainer.train()
    assert trainer.state.batches_done == 3
    one_batch = build(new(tmp_path / "one"), settings)
    one_batch.model.train()
    one_batch.train_batch(*next(iter(TinyLoader())))
    for ours, theirs in zip(trainer.model.parameters(), one_batch.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    kept = load_checkpoint(tmp_path / "model_last.pth")
    assert (kept["epoch"], kept["batch"]) == (0, 0)
    assert all(
        torch.equal(value, kept["state_dict"][name])
        for name, value in TinyModel().state_dict().items()
    )
    for _ in range(2):
        with pytest.raises(NonFiniteError, match="epoch 1, batch 2"):
            trainer.checkpoint()


def test_after_a_bad_batch_the_same_trainer_resumes_the_last_checkpoint(tmp_path):
    trainer = defer(build(tmp_path, train_loader=OneBadBatch()))
    undisturbed = build(new(tmp_path / "other"))
    with pytest.raises(NonFiniteError):
        trainer.train()
    trainer.train_loader = TinyLoader()
    trainer.resume(load_checkpoint(tmp_path / "model_last.pth"), tmp_path / "model_last.pth")
    trainer.train()
    undisturbed.train()
    states = [one.model.state_dict() for one in (trainer, undisturbed)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_runs_whose_host_asks_later_are_the_same_bit_for_bit(tmp_path):
    settings = {"trainer": {"ema_decay": 0.9}}
    trainers = [
        build(new(tmp_path / "at_once"), settings),
        defer(build(new(tmp_path / "later"), settings)),
    ]
    for trainer in trainers:
        trainer.train()
    assert lines(tmp_path / "at_once") == lines(tmp_path / "later")
    states = [load_checkpoint(trainer.folder / "model_last.pth") for trainer in trainers]
    for key in ("state_dict", "ema_state_dict"):
        assert all(
            torch.equal(value, states[1][key][name]) for name, value in states[0][key].items()
        )


def test_no_minibatch_is_waited_for(tmp_path):
    settings = {
        "trainer": {"ema_decay": 0.9},
        "lr_scheduler": {"type": "OneCycleLR", "args": {"max_lr": 0.3}},
    }
    trainer = defer(
        build(tmp_path, settings, penalty=lambda model: model.linear.weight.square().sum())
    )
    trainer.model.train()
    with Reads() as reads:
        for images, labels in TinyLoader():
            trainer.meters.add(trainer.train_batch(images, labels))
            trainer.schedule.step_batch()
        assert reads.count == 0
        trainer.nan_guard.check_pending()
        assert reads.count == 1, "the count can see what it counts"
