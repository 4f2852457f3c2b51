"""The state of optimizer and schedule in a checkpoint: what torch would misread is refused."""

from copy import deepcopy
from math import nan
from pathlib import Path

import pytest
import torch
from torch import nn

from base.checkpoint import load_checkpoint, save_checkpoint
from base.config.training import OptimizerConfig, SchedulerConfig
from base.errors import CheckpointError
from base.optim import OPTIMIZERS, SCHEDULERS, Schedule, build_optimizer, load_optimizer
from base.optim.optimizers import UNUSABLE
from base.optim.state import (
    checked_optimizer_state,
    checked_schedule_state,
    named_optimizer_state,
)

SOURCE = Path("file.pth")
ARGS = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "RMSprop": {"momentum": 0.5, "centered": True},
    "Adam": {"amsgrad": True},
}
STATEFUL = sorted(set(OPTIMIZERS) - set(UNUSABLE))


class Small(nn.Module):
    """Two convolutions of one shape, a bias of their width, and a group of its own for
    thresholds."""

    no_weight_decay = ("srelu_bias",)

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(5, 5, 3, padding=1)
        self.second = nn.Conv2d(5, 5, 3, padding=1)
        self.unused = nn.Linear(2, 3)
        self.srelu_bias = nn.Parameter(torch.full((5,), -1.0))

    def forward(self, images):
        return self.second(torch.maximum(self.first(images), self.srelu_bias.view(-1, 1, 1)))


def trained(name, steps=2):
    torch.manual_seed(0)
    model = Small()
    optimizer = build_optimizer(OptimizerConfig(type=name, args=ARGS.get(name, {})), model)
    step(model, optimizer, steps)
    return model, optimizer


def step(model, optimizer, steps):
    for number in range(steps):
        optimizer.zero_grad()
        model(torch.full((2, 5, 4, 4), number + 0.5)).square().mean().backward()
        optimizer.step()


def stored(folder, state):
    save_checkpoint(folder / "c.pth", {"state_dict": {}, "optimizer": state})
    return load_checkpoint(folder / "c.pth")["optimizer"]


def with_checksums(optimizer, model):
    """The state as earlier versions stored it, with a checksum in each entry."""
    saved = named_optimizer_state(optimizer, model)
    for entry in saved["state"].values():
        entry["checksum"] = "0"
    return saved


FORMS = {
    "by name": named_optimizer_state,
    "by name with checksums": with_checksums,
    "by number": lambda optimizer, model: optimizer.state_dict(),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", STATEFUL)
def test_every_optimizer_resumes_exactly(tmp_path, name, form):
    model, optimizer = trained(name)
    saved = stored(tmp_path, FORMS[form](optimizer, model))
    other = deepcopy(model)
    again = build_optimizer(OptimizerConfig(type=name, args=ARGS.get(name, {})), other)
    load_optimizer(again, checked_optimizer_state(again, other, saved, SOURCE))
    step(model, optimizer, 2)
    step(other, again, 2)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


def buffer(entry):
    return next(
        key for key, value in entry.items() if isinstance(value, torch.Tensor) and value.ndim == 4
    )


def another_shape(state):
    entry = state["second.weight"]
    entry[buffer(entry)] = torch.zeros(5, 5, 9)


def not_a_tensor(state):
    entry = state["second.weight"]
    entry[buffer(entry)] = 3.0


SPOILED = {
    "shape": (
        another_shape,
        r"second.weight.\w+: is of shape \(5, 5, 9\), but \(5, 5, 3, 3\) was expected",
    ),
    "kind": (not_a_tensor, r"second.weight.\w+: is of type float; expected Tensor"),
    "lost": (lambda state: state.pop("unused.bias"), r"optimizer.state: 'unused.bias' is missing"),
    "lost value": (
        lambda state: state["first.bias"].pop("exp_avg"),
        r"first.bias: 'exp_avg' is missing",
    ),
    "unknown": (
        lambda state: state.update(third={}),
        r"optimizer.state: 'third' is not a parameter of this model",
    ),
    "unknown value": (
        lambda state: state["first.bias"].update(x=1),
        r"first.bias: 'x' is unknown; expected step, exp_avg",
    ),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_state_that_does_not_fit_is_an_error_that_names_the_parameter(tmp_path, what):
    spoil, message = SPOILED[what]
    model, optimizer = trained("AdamW", steps=3)
    saved = stored(tmp_path, named_optimizer_state(optimizer, model))
    checked_optimizer_state(optimizer, model, saved, SOURCE)
    spoil(saved["state"])
    with pytest.raises(CheckpointError, match=f"^file.pth: .*{message}") as caught:
        checked_optimizer_state(optimizer, model, saved, SOURCE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(), (1,), (5, 5, 3), (3, 5, 3, 3)])
def test_older_checkpoints_are_checked_by_shape(tmp_path, shape):
    model, optimizer = trained("SGD")
    saved = stored(tmp_path, optimizer.state_dict())
    assert set(saved["state"]) == {0, 1, 2, 3, 6}, "by number; two parameters are not used"
    saved["state"][2]["momentum_buffer"] = torch.zeros(shape)
    with pytest.raises(
        CheckpointError,
        match=rf"second.weight.momentum_buffer: is of shape .*{len(shape)}?.*\(5, 5, 3, 3\)",
    ):
        checked_optimizer_state(optimizer, model, saved, SOURCE)


GROUPS = {
    "fewer groups": (
        lambda groups: groups.pop(),
        "param_groups: 1 groups in the file, 2 in this run",
    ),
    "other order": (
        lambda groups: groups[0]["params"].reverse(),
        "param_groups.0.params: is not the list",
    ),
    "no list": (lambda groups: groups[1].pop("params"), "param_groups.1.params: is not the list"),
    "no rate": (lambda groups: groups[0].pop("lr"), "param_groups.0: 'lr' is missing"),
    "rate": (
        lambda groups: groups[0].update(lr="fast"),
        "param_groups.0.lr: is 'fast'; .* it starts as 0.1",
    ),
    "rate below 0": (lambda groups: groups[1].update(lr=-0.1), "param_groups.1.lr: is -0.1"),
    "momentum": (lambda groups: groups[0].update(momentum=1.0), "param_groups.0.momentum: is 1.0"),
    "sign": (lambda groups: groups[0].update(maximize=True), "param_groups.0.maximize: is True"),
    "decay": (
        lambda groups: groups[0].update(weight_decay=[0]),
        r"param_groups.0.weight_decay: is \[0\]",
    ),
    "kernel": (
        lambda groups: groups[0].update(fused="yes"),
        "param_groups.0.fused: is 'yes'; expected true, false or null",
    ),
}


@pytest.mark.parametrize("what", GROUPS)
def test_odd_settings_are_an_error(what):
    spoil, message = GROUPS[what]
    model, optimizer = trained("SGD")
    saved = deepcopy(named_optimizer_state(optimizer, model))
    spoil(saved["param_groups"])
    with pytest.raises(CheckpointError, match=message):
        checked_optimizer_state(optimizer, model, saved, SOURCE)


def test_settings_that_schedules_have_changed_are_restored():
    model, optimizer = trained("SGD")
    saved = deepcopy(named_optimizer_state(optimizer, model))
    saved["param_groups"][0] |= {"lr": 0.025, "momentum": 0.85, "fused": None}
    groups = checked_optimizer_state(optimizer, model, saved, SOURCE)["param_groups"]
    assert (groups[0]["lr"], groups[0]["momentum"], groups[0]["fused"]) == (0.025, 0.85, None)
    assert groups[1]["lr"] == 0.1


PARTS = [{"type": "LinearLR"}, {"type": "CosineAnnealingWarmRestarts", "args": {"T_0": 2}}]
SCHEDULES = {
    "StepLR": {"step_size": 3},
    "MultiStepLR": {"milestones": [1, 4]},
    "ExponentialLR": {"gamma": 0.7},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "CyclicLR": {"base_lr": 0.05, "max_lr": 0.2, "step_size_up": 4},
    "OneCycleLR": {"max_lr": 0.2},
    "SequentialLR": {"schedulers": PARTS, "milestones": [3]},
    "ChainedScheduler": {"schedulers": PARTS},
}


def schedule_after(name, epochs):
    _, optimizer = trained("SGD", steps=1)
    config = SchedulerConfig(type=name, args=SCHEDULES.get(name, {}))
    schedule = Schedule(config, optimizer, epochs=6, batches_per_epoch=3, has_validation=True)
    for epoch in range(epochs):
        for _ in range(3):
            optimizer.step()
            schedule.step_batch()
        schedule.step_epoch({"val_loss": 1.0 + epoch})
    return schedule, epochs * 3 if schedule.steps_by_batch else epochs


NAMES = sorted(set(SCHEDULERS) - set(UNUSABLE))


@pytest.mark.parametrize("name", NAMES)
def test_the_state_of_every_schedule_is_restored(tmp_path, name):
    for epochs in (0, 1, 4, 6):
        schedule, steps = schedule_after(name, epochs)
        save_checkpoint(tmp_path / "c.pth", {"state_dict": {}, "scheduler": schedule.state_dict()})
        saved = load_checkpoint(tmp_path / "c.pth")["scheduler"]
        new, _ = schedule_after(name, 0)
        assert (
            checked_schedule_state(saved, new.state_dict(), steps, SOURCE) == schedule.state_dict()
        )


@pytest.mark.parametrize("name", NAMES)
def test_no_value_of_a_schedule_may_be_missing_or_odd(name):
    schedule, steps = schedule_after(name, 2)
    new = schedule_after(name, 0)[0].state_dict()
    for key, value in schedule.state_dict().items():
        for odd in ("fast", None, -3, nan, [], {"a": 1}, torch.zeros(2)):
            if (value is None and odd is None) or (
                type(odd) is int and key in ("best", "mode_worse")
            ):
                continue
            with pytest.raises(CheckpointError, match=f"^file.pth: scheduler.{key}"):
                checked_schedule_state({**schedule.state_dict(), key: odd}, new, steps, SOURCE)
        if not isinstance(value, bool):
            lacking = {
                other: value for other, value in schedule.state_dict().items() if other != key
            }
            with pytest.raises(CheckpointError, match=f"^file.pth: scheduler: '{key}' is missing"):
                checked_schedule_state(lacking, new, steps, SOURCE)


def test_a_schedule_must_have_as_many_steps_as_the_run():
    schedule, steps = schedule_after("CosineAnnealingLR", 2)
    new = schedule_after("CosineAnnealingLR", 0)[0].state_dict()
    with pytest.raises(
        CheckpointError, match="scheduler.last_epoch: is 2 after 3 steps of the run"
    ):
        checked_schedule_state(schedule.state_dict(), new, steps + 1, SOURCE)
    chained, steps = schedule_after("ChainedScheduler", 2)
    new = schedule_after("ChainedScheduler", 0)[0].state_dict()
    with pytest.raises(
        CheckpointError, match="scheduler._schedulers.0.last_epoch: is 2 after 1 steps of the run"
    ):
        checked_schedule_state(chained.state_dict(), new, steps - 1, SOURCE)


def test_the_state_of_a_plateau_keeps_its_mode():
    _, optimizer = trained("SGD", steps=1)
    states = []
    for mode in ("min", "max"):
        config = SchedulerConfig(type="ReduceLROnPlateau", args={"mode": mode})
        states.append(Schedule(config, optimizer, 5, 2, has_validation=True).state_dict())
    assert checked_schedule_state(states[0], states[1], 0, SOURCE)["mode"] == "min"
