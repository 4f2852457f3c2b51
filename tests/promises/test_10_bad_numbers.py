"""Promise 10: a loss or gradient that is infinite or NaN stops training before the update, names
epoch, step and the first layer that answered with it, and leaves the last good checkpoint."""

import json
import os
import signal

import pytest
import torch

import base.nan_guard
from base.base_trainer import BaseTrainer
from base.checkpoint import load_checkpoint, save_checkpoint
from base.config.tree import merge
from base.errors import NonFiniteError, Stopped
from base.registry import TRAINERS
from experiment.experiment import Experiment, resume
from tiny_runs import difference, run

WIDE = {
    "arch": {
        "type": "wide_resnet",
        "args": {
            "conv_layer_type": "conv",
            "norm_layer_type": "bn",
            "depth": 10,
            "widen_factor": 1,
        },
    }
}
NETWORKS = {
    "ConvNorm": {"arch": {"args": {"conv_layer_type": "prec_conv", "norm_layer_type": "no"}}},
    "wide ResNet": WIDE,
}


def poison(monkeypatch, layer, step):
    """From that step on one layer answers with a NaN, as a kernel that overflows would."""
    train = BaseTrainer._train_epoch
    done = 0

    def poisoned(self):
        def answer(module, inputs, output):
            if done >= step and module.training:
                output = output.clone()
                output.view(-1)[5] = torch.nan
            return output

        handle = self.model.get_submodule(layer).register_forward_hook(answer)
        try:
            return train(self)
        finally:
            handle.remove()

    update = BaseTrainer.update

    def counted(self, loss):
        nonlocal done
        update(self, loss)
        done += 1

    monkeypatch.setattr(BaseTrainer, "_train_epoch", poisoned)
    monkeypatch.setattr(BaseTrainer, "update", counted)


def layers_of(config):
    """Some leaves of the network, from the first to the last."""
    model = Experiment.from_config(config).model
    leaves = [name for name, module in model.named_modules() if name and not any(module.children())]
    return [leaves[0], leaves[len(leaves) // 2], leaves[-1]]


def check_stops(folder, config, layer):
    """In the second minibatch of the second epoch, of three."""
    updates_per_batch = 1
    if "trainer.adv_repeats" in config.method_attribute("reads", ()):
        updates_per_batch = config.trainer.adv_repeats
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, layer, 4 * updates_per_batch)
        with pytest.raises(NonFiniteError) as stopped:
            run(folder, config)
    message = str(stopped.value)
    assert message.startswith("epoch 2, batch 2: the loss is not finite, first in ")
    assert f"the output of {layer} (" in message
    assert f"{folder / 'model_last.pth'} is of the last good epoch" in message
    saved = load_checkpoint(folder / "model_last.pth")
    assert saved["epoch"] == 1
    assert all(
        torch.isfinite(value).all()
        for value in saved["state_dict"].values()
        if value.is_floating_point()
    )


@pytest.mark.parametrize("network", NETWORKS)
def test_the_first_bad_layer_is_named_and_the_last_good_epoch_kept(tmp_path, small, network):
    config = small(**NETWORKS[network])
    run(tmp_path / "whole", config)
    for layer in layers_of(config):
        check_stops(tmp_path / layer, config, layer)
        # The poison is gone: a resumed run comes to the same end
        resume(str(tmp_path / layer))
        assert (
            difference(tmp_path / "whole" / "model_last.pth", tmp_path / layer / "model_last.pth")
            == []
        )


@pytest.mark.parametrize(
    "method", [name for name in TRAINERS if TRAINERS[name].attacks_while_training]
)
def test_every_method_stops_and_names_the_layer(tmp_path, small, method):
    config = small(
        adversarial={"method": method, "validate_every": 0, "steps": 1}, trainer={"adv_repeats": 2}
    )
    check_stops(tmp_path / "run", config, layers_of(config)[1])


@pytest.mark.parametrize("broken", ["first_bad_layer", "isfinite"])
def test_the_check_can_fail(tmp_path, small, monkeypatch, broken):
    if broken == "first_bad_layer":
        monkeypatch.setattr(base.nan_guard, broken, lambda model, images: None)
    else:
        monkeypatch.setattr(
            base.nan_guard.NanGuard, "check", lambda self, model, loss, state, images: None
        )
    config = small()
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check_stops(tmp_path / "run", config, layers_of(config)[1])


def test_the_search_leaves_no_trace_in_the_network(small):
    experiment = Experiment.from_config(small(**WIDE))
    model = experiment.model.train()
    images, _ = next(iter(experiment.train_loader))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    assert base.nan_guard.first_bad_layer(model, images) is None
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(generator, torch.get_rng_state())
    assert not any(module._forward_hooks for module in model.modules())


def test_without_a_good_epoch_the_message_does_not_promise_one(tmp_path, small):
    config = small(optimizer={"args": {"lr": 1e30}})
    message = r"^epoch 1, batch 2: .*model_last.pth holds the weights that training began with"
    with pytest.raises(NonFiniteError, match=message) as stopped:
        run(tmp_path, config)
    assert "good epoch" not in str(stopped.value)
    assert load_checkpoint(tmp_path / "model_last.pth")["epoch"] == 0


EXPLODES = {
    "optimizer": {"args": {"lr": 0.01, "momentum": 0.0, "weight_decay": 0.0}},
    "lr_scheduler": {
        "type": "MultiStepLR",
        "args": {"milestones": [5], "gamma": 1e36},
        "interval": "batch",
    },
}
"""The second epoch's last update, of three, is 1e36 times too long: its gradient is finite."""


@pytest.mark.parametrize("method", ["none", "pgd"])
@pytest.mark.parametrize("validated", [True, False])
def test_weights_that_explode_in_an_epochs_last_update_are_never_saved(
    tmp_path, small, method, validated
):
    unwatched = {"trainer": {"monitor": "off"}, "data_loader": {"args": {"validation_split": 0.0}}}
    attacked = {
        "adversarial": {
            "method": method,
            "steps": 1,
            "validate_every": int(validated),
            "report": True,
        }
    }
    config = small(**merge(merge(EXPLODES, attacked), {} if validated else unwatched))
    with pytest.raises(
        NonFiniteError, match=r"epoch 2, batch 3: .* not finite after its update.*training stopped"
    ) as stopped:
        run(tmp_path, config)
    assert stopped.value.exit_code == 5
    assert f"{tmp_path / 'model_last.pth'} is of the last good epoch" in str(stopped.value)
    for name in ("model_last.pth", "model_best.pth"):
        assert load_checkpoint(tmp_path / name)["epoch"] == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    assert not (tmp_path / "result.json").exists()


def test_a_signal_after_an_update_that_explodes_saves_nothing(tmp_path, small, monkeypatch):
    update = BaseTrainer.update
    done = 0

    def counted(self, loss):
        nonlocal done
        update(self, loss)
        done += 1
        if done == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(BaseTrainer, "update", counted)
    with pytest.raises(
        NonFiniteError,
        match="epoch 2, batch 3: the model's answers are not finite after its update, first in",
    ):
        run(tmp_path, small(**EXPLODES))
    assert load_checkpoint(tmp_path / "model_last.pth")["epoch"] == 1


@pytest.mark.parametrize(
    ("stop_after", "explode_at", "kept"),
    [
        (None, 2, "holds the weights that training began with"),
        (1, 2, "is of epoch 1, batch 1"),
        (4, 5, "is of epoch 2, batch 1"),
        (4, 7, "is of the last good epoch"),
    ],
    ids=["first epoch", "resumed in the first epoch", "resumed in the second", "later"],
)
def test_the_message_says_what_the_last_checkpoint_holds(
    tmp_path, small, monkeypatch, stop_after, explode_at, kept
):
    update = BaseTrainer.update
    done = 0

    def counted(self, loss):
        nonlocal done
        done += 1
        update(self, loss * torch.nan if done == explode_at else loss)
        if done == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(BaseTrainer, "update", counted)
    config = small()
    if stop_after is not None:
        with pytest.raises(Stopped):
            run(tmp_path, config)
        stopped = load_checkpoint(tmp_path / "model_last.pth")
        assert (stopped["epoch"], stopped["batch"]) == divmod(stop_after, 3)
    with pytest.raises(NonFiniteError) as raised:
        run(tmp_path, config) if stop_after is None else resume(str(tmp_path))
    assert str(raised.value).endswith(f"; {tmp_path / 'model_last.pth'} {kept}")


def test_a_run_that_has_diverged_is_not_continued(tmp_path, small):
    run(tmp_path, small())
    contents = load_checkpoint(tmp_path / "model_last.pth")
    name = next(key for key, value in contents["state_dict"].items() if value.ndim == 2)
    contents["state_dict"][name][0, 0] = torch.inf
    save_checkpoint(tmp_path / "model_last.pth", contents)
    with pytest.raises(
        NonFiniteError, match=f"model_last.pth: {name} is not finite: the run has diverged"
    ):
        resume(str(tmp_path))


def test_a_result_that_is_not_finite_is_null_and_exit_code_5(tmp_path, small, monkeypatch):
    """The answers to the validation set are finite, those to the test set are not."""
    monkeypatch.setattr(
        "experiment.final_test._Tester.test", lambda *_: {"test_loss": torch.nan, "test_top1": 0.0}
    )
    with pytest.raises(
        NonFiniteError, match=r"result.json: test_loss is not finite, and null there"
    ):
        run(tmp_path, small())
    text = (tmp_path / "result.json").read_text()
    assert json.loads(text)["test_loss"] is None
    assert "NaN" not in text
