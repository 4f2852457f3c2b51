"""Optimizers and schedules by name: checked before data is read, stepped at the right moment,
resumed exactly."""

import inspect
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from base.checkpoint import load_checkpoint, save_checkpoint
from base.config.training import OptimizerConfig, SchedulerConfig
from base.errors import ConfigError
from base.optim import (
    OPTIMIZERS,
    SCHEDULERS,
    Schedule,
    build_optimizer,
    check_optimization,
    load_optimizer,
)
from base.optim.arguments import NOT_FROM_CONFIG, check_arguments
from base.optim.optimizers import UNUSABLE
from base.optim.schedules import spans_whole_run
from base.optim.state import checked_optimizer_state, named_optimizer_state
from base.registry import ACTIVATION_LAYERS

SGD = OptimizerConfig(type="SGD", args={"lr": 0.1, "momentum": 0.9})
PARTS = [{"type": "LinearLR"}, {"type": "MultiStepLR", "args": {"milestones": [2]}}]
SCHEDULER_ARGS = {
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [2, 4]},
    "ExponentialLR": {"gamma": 0.9},
    "CosineAnnealingWarmRestarts": {"T_0": 2},
    "CyclicLR": {"base_lr": 0.1, "max_lr": 0.2, "step_size_up": 3},
    "OneCycleLR": {"max_lr": 0.3},
    "ReduceLROnPlateau": {"patience": 0},
    "SequentialLR": {"schedulers": PARTS, "milestones": [2]},
    "ChainedScheduler": {"schedulers": PARTS},
}


def start(name, epochs=5):
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(SGD, model)
    config = SchedulerConfig(type=name, args=SCHEDULER_ARGS.get(name, {}))
    return (
        model,
        optimizer,
        Schedule(config, optimizer, epochs, batches_per_epoch=2, has_validation=True),
    )


def train(model, optimizer, schedule, epochs):
    rates = []
    for epoch in epochs:
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(1, 2)).square().sum().backward()
            optimizer.step()
            rates.append(schedule.learning_rate)
            schedule.step_batch()
        schedule.step_epoch({"val_loss": 1.0 + epoch})
    return rates


@pytest.mark.parametrize("name", sorted(set(SCHEDULERS) - set(UNUSABLE)))
def test_every_scheduler_resumes_exactly_through_a_checkpoint_file(name, tmp_path):
    uninterrupted = start(name)
    rates = train(*uninterrupted, range(5))
    first = start(name)
    resumed_rates = train(*first, range(3))
    model, optimizer, schedule = first
    contents = {"optimizer": optimizer.state_dict(), "scheduler": schedule.state_dict()}
    save_checkpoint(tmp_path / "c.pth", {"state_dict": model.state_dict(), **contents})
    stored = load_checkpoint(tmp_path / "c.pth")
    second = start(name)
    second[0].load_state_dict(stored["state_dict"])
    second[1].load_state_dict(stored["optimizer"])
    second[2].load_state_dict(stored["scheduler"])
    resumed_rates += train(*second, range(3, 5))
    assert resumed_rates == rates
    assert torch.equal(second[0].weight, uninterrupted[0].weight)
    if name != "none":
        assert len(set(rates)) > 1 or name == "ConstantLR", (
            "a constant rate would not test the resume"
        )


def test_rates_by_hand():
    assert train(*start("StepLR"), range(4)) == pytest.approx(
        [0.1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.01]
    )
    # T_max defaults to the run's five epochs: 0.05 (1 + cos(pi e / 5))
    cosine = [0.1, 0.0904508, 0.0654508, 0.0345492, 0.0095492]
    assert train(*start("CosineAnnealingLR"), range(5))[::2] == pytest.approx(cosine, abs=1e-6)
    # total_steps defaults to the run's ten batches: stepped after each of them, the peak comes at
    # 30 %
    one_cycle = train(*start("OneCycleLR"), range(5))
    assert max(one_cycle) == pytest.approx(0.3)
    assert one_cycle.index(max(one_cycle)) == 2
    # The loss of this run rises from the second epoch on, so without patience every epoch divides
    # the rate by ten
    assert train(*start("ReduceLROnPlateau"), range(4))[::2] == pytest.approx(
        [0.1, 0.1, 0.01, 0.001]
    )


WARM_UP = {"type": "LinearLR", "args": {"start_factor": 0.25, "total_iters": 2}}


def sequence(milestones, *parts):
    return {"type": "SequentialLR", "args": {"milestones": milestones, "schedulers": list(parts)}}


@pytest.mark.parametrize(
    ("given", "lengths", "interval"),
    [
        (sequence([2], WARM_UP, {"type": "CosineAnnealingLR"}), [{"T_max": 4}], "epoch"),
        (sequence([2], WARM_UP, {"type": "CosineAnnealingLR"}), [{"T_max": 16}], "batch"),
        (
            sequence([2], WARM_UP, {"type": "OneCycleLR", "args": {"max_lr": 0.3}}),
            [{"total_steps": 16}],
            "batch",
        ),
        (
            sequence([1, 4], WARM_UP, {"type": "CosineAnnealingLR"}, {"type": "PolynomialLR"}),
            [{"T_max": 3}, {"total_iters": 2}],
            "epoch",
        ),
        (
            sequence(
                [4], sequence([1], WARM_UP, {"type": "CosineAnnealingLR"}), {"type": "PolynomialLR"}
            ),
            [{"T_max": 3}, {"total_iters": 2}],
            "epoch",
        ),
        (
            {
                "type": "ChainedScheduler",
                "args": {"schedulers": [WARM_UP, {"type": "PolynomialLR"}]},
            },
            [{"total_iters": 6}],
            "epoch",
        ),
        ({"type": "PolynomialLR", "args": {"power": 2.0}}, [{"total_iters": 6}], "epoch"),
        ({"type": "PolynomialLR"}, [{"total_iters": 18}], "batch"),
    ],
)
def test_a_part_without_a_length_lasts_until_the_next_milestone(given, lengths, interval):
    """Over 6 epochs of 3 batches the rates are the same as with the length given in the config."""

    def written(part):
        part = json.loads(json.dumps(part))
        for inner in part.get("args", {}).get("schedulers", []):
            inner.update(written(inner))
        if part["type"] in ("CosineAnnealingLR", "PolynomialLR", "OneCycleLR"):
            part.setdefault("args", {}).update(left.pop(0))
        return part

    def rates(tree):
        optimizer = build_optimizer(SGD, nn.Linear(2, 2))
        schedule = Schedule(
            SchedulerConfig(**tree, interval=interval), optimizer, 6, 3, has_validation=True
        )
        found = []
        for _ in range(6):
            for _ in range(3):
                optimizer.step()
                found.append(schedule.learning_rate)
                schedule.step_batch()
            schedule.step_epoch({})
        return found

    left = list(lengths)
    explicit = written(given)
    assert not left
    assert rates(given) == rates(explicit)
    assert len(set(rates(given))) >= 5


def test_what_consists_of_schedules_can_only_be_the_first_part_of_a_sequence():
    parts = [WARM_UP, {"type": "StepLR", "args": {"step_size": 1}}]
    chain = {"type": "ChainedScheduler", "args": {"schedulers": parts}}
    for later in (chain, sequence([2], *parts)):
        optimizer = build_optimizer(SGD, nn.Linear(2, 2))
        config = SchedulerConfig(**sequence([2], WARM_UP, later))
        with pytest.raises(
            ConfigError, match=r"lr_scheduler.args.schedulers.1.type: .* only be the first part"
        ):
            Schedule(config, optimizer, 9, 1, has_validation=True)


def test_a_resumed_run_keeps_the_lengths_that_it_started_with():
    """In older checkpoints a cosine after a warm-up is as long as the whole run."""

    def begin(tree):
        optimizer = build_optimizer(SGD, nn.Linear(2, 2))
        return Schedule(SchedulerConfig(**tree), optimizer, 6, 1, has_validation=True)

    def step(schedule, times):
        for _ in range(times):
            schedule.optimizer.step()
            schedule.step_epoch({})
            yield schedule.learning_rate

    old = sequence([2], WARM_UP, {"type": "CosineAnnealingLR", "args": {"T_max": 6}})
    uninterrupted = list(step(begin(old), 5))
    for done in range(5):
        first = begin(old)
        rates = list(step(first, done))
        second = begin(sequence([2], WARM_UP, {"type": "CosineAnnealingLR"}))
        second.optimizer.load_state_dict(first.optimizer.state_dict())
        second.load_state_dict(first.state_dict())
        assert rates + list(step(second, 5 - done)) == uninterrupted


def test_a_cycle_may_have_half_steps():
    config = SchedulerConfig(
        type="CyclicLR",
        args={"base_lr": 0.0, "max_lr": 0.3, "step_size_up": 1.5, "step_size_down": 4.5},
    )
    check_optimization(SGD, config)
    schedule = Schedule(config, build_optimizer(SGD, nn.Linear(2, 2)), 6, 1, has_validation=True)
    rates = []
    for _ in range(6):
        rates.append(schedule.learning_rate)
        schedule.optimizer.step()
        schedule.step_batch()
    assert rates == pytest.approx([0, 0.2, 0.3 - 0.1 / 3, 0.2, 0.4 / 3, 0.2 / 3])


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - set(UNUSABLE)))
def test_every_optimizer_works_without_arguments_and_changes_the_weights(name):
    check_optimization(OptimizerConfig(type=name), SchedulerConfig())
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2))
    optimizer = build_optimizer(OptimizerConfig(type=name), model)
    before = [parameter.clone() for parameter in model.parameters()]
    model(torch.rand(4, 3, 4, 4)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before[0], next(iter(model.parameters())))


@pytest.mark.parametrize(
    ("scheduler", "spans"),
    [
        (("CosineAnnealingLR", {}), True),
        (("CosineAnnealingLR", {"T_max": 3}), False),
        (
            (
                "SequentialLR",
                {
                    "schedulers": [{"type": "LinearLR"}, {"type": "CosineAnnealingLR"}],
                    "milestones": [2],
                },
            ),
            True,
        ),
        (("StepLR", {"step_size": 2}), False),
        (("none", {}), False),
    ],
)
def test_which_schedules_have_the_length_of_the_run(scheduler, spans):
    assert spans_whole_run(SchedulerConfig(type=scheduler[0], args=scheduler[1])) is spans


@pytest.mark.parametrize(
    ("optimizer", "scheduler", "message"),
    [
        (("SDG", {}), None, r"optimizer.type: 'SDG' is not one of: .*did you mean 'SGD'\?"),
        (
            ("SGD", {"momentun": 0.9}),
            None,
            r"optimizer.args.momentun: SGD takes no such argument; did you mean 'momentum'\?",
        ),
        (
            ("SGD", {"lr": -1}),
            None,
            "optimizer.args.lr: SGD does not accept -1: Invalid learning rate: -1",
        ),
        (("SGD", {"lr": "fast"}), None, 'optimizer.args.lr: expected a number, not "fast"'),
        (("SGD", {"lr": True}), None, "optimizer.args.lr: expected a number, not true"),
        (("SGD", {"lr": {"a": 1}}), None, "optimizer.args.lr: expected a number, not"),
        (
            ("SGD", {"momentum": 1}),
            None,
            "optimizer.args.momentum: expected at least 0 and below 1, not 1",
        ),
        (
            ("SGD", {"nesterov": 1, "momentum": 0.9}),
            None,
            "optimizer.args.nesterov: expected true or false, not 1",
        ),
        (
            ("SGD", {"momentum": 0, "nesterov": True}),
            None,
            "optimizer.args.nesterov: SGD does not accept true: Nest",
        ),
        (
            ("SGD", {"momentum": 0.9, "lr": 1e300}),
            None,
            r'optimizer.args: a step with {"momentum": 0.9, "lr": 1e\+300} fails:'
            " the weights are not finite",
        ),
        (
            ("Adam", {"lr": 1e-3, "eps": -1}),
            None,
            "optimizer.args.eps: Adam does not accept -1: Invalid epsilon value",
        ),
        (
            ("AdamW", {"betas": [0.9, 0.99, 0.999]}),
            None,
            "optimizer.args.betas: expected a list of 2: a number, a number, not",
        ),
        (
            ("AdamW", {"betas": [0.9, 1.5]}),
            None,
            "optimizer.args.betas: AdamW does not accept .*: Invalid beta parameter at index 1",
        ),
        (
            ("AdamW", {"betas": 0.9}),
            None,
            "optimizer.args.betas: expected a list of 2: a number, a number, not 0.9",
        ),
        (
            ("LBFGS", {}),
            None,
            "optimizer.type: LBFGS cannot be used from a config: it evaluates the loss several",
        ),
        (("AdamW", {"betas": [0.9]}), None, "optimizer.args.betas: expected a list of 2"),
        (
            ("Muon", {}),
            None,
            "optimizer.type: Muon cannot be used from a config: it takes matrices only",
        ),
        (
            None,
            ("StepLR", {"step_size": 0}),
            "lr_scheduler.args.step_size: expected at least 1, not 0",
        ),
        (
            None,
            ("StepLR", {"step_size": 2.5}),
            "lr_scheduler.args.step_size: expected an integer, not 2.5",
        ),
        (
            None,
            ("StepLR", {"step_size": 2, "gamma": -0.1}),
            "lr_scheduler.args.gamma: expected at least 0, not -0.1",
        ),
        (
            None,
            ("CosineAnnealingLR", {"eta_min": -0.1}),
            "lr_scheduler.args.eta_min: expected at least 0, not -0.1",
        ),
        (
            None,
            ("OneCycleLR", {"max_lr": 0.1, "pct_start": 2}),
            "lr_scheduler.args.pct_start: OneCycleLR does not accept 2: Expected float between 0",
        ),
        (
            None,
            ("OneCycleLR", {"max_lr": 0.1, "anneal_strategy": "cosine"}),
            "lr_scheduler.args.anneal_strategy: expected 'cos' or 'linear', not \"cosine\"",
        ),
        (
            None,
            ("ReduceLROnPlateau", {"factor": 1.5}),
            "lr_scheduler.args.factor: ReduceLROnPlateau does not accept 1.5: Factor should be <",
        ),
        (
            None,
            ("ChainedScheduler", {"schedulers": []}),
            "lr_scheduler.args.schedulers: expected a list of",
        ),
        (("SparseAdam", {}), None, "optimizer.type: SparseAdam cannot be used"),
        (None, ("StepLR", {}), "lr_scheduler.args.step_size: required by StepLR, but not given"),
        (None, ("steplr", {}), r"lr_scheduler.type: 'steplr' .*did you mean 'StepLR'\?"),
        (
            None,
            ("MultiStepLR", {"milestones": 3}),
            "lr_scheduler.args.milestones: expected a list, each element an int",
        ),
        (
            None,
            ("MultiStepLR", {"milestones": [40, 20]}),
            "lr_scheduler.args.milestones: expected ascending numbers, not",
        ),
        (
            None,
            ("MultiStepLR", {"milestones": [0, 20]}),
            "lr_scheduler.args.milestones: expected numbers at least 1, not",
        ),
        (
            None,
            (
                "SequentialLR",
                {
                    "schedulers": [PARTS[0], {"type": "StepLR", "args": {"step_size": -1}}],
                    "milestones": [2],
                },
            ),
            "lr_scheduler.args.schedulers.1.args.step_size: expected at least 1, not -1",
        ),
        (
            None,
            (
                "SequentialLR",
                {"schedulers": [PARTS[0], {"type": "ReduceLROnPlateau"}], "milestones": [2]},
            ),
            "lr_scheduler.args.schedulers.1.type: ReduceLROnPlateau cannot be part of another",
        ),
        (
            None,
            ("CyclicLR", {"base_lr": 0.1, "max_lr": 0.2, "scale_fn": "x"}),
            "lr_scheduler.args.scale_fn: expected a Python object, which JSON cannot hold, not",
        ),
        (
            None,
            ("SequentialLR", {"schedulers": PARTS, "milestones": [2, 4]}),
            "lr_scheduler.args.*: SequentialLR does not",
        ),
        (
            None,
            ("LambdaLR", {}),
            "lr_scheduler.type: LambdaLR cannot be used from a config: it takes a Python function",
        ),
        (
            None,
            ("SequentialLR", {"schedulers": [1], "milestones": [2]}),
            "lr_scheduler.args.schedulers: expected a list of",
        ),
        (
            None,
            ("ChainedScheduler", {"schedulers": [{"type": "StepLR", "args": {"size": 1}}]}),
            "lr_scheduler.args.schedulers.0.args.size: StepLR takes no such argument",
        ),
    ],
)
def test_wrong_names_and_arguments_are_one_line(optimizer, scheduler, message):
    optimizer_config = OptimizerConfig(type=optimizer[0], args=optimizer[1]) if optimizer else SGD
    scheduler_config = (
        SchedulerConfig(type=scheduler[0], args=scheduler[1]) if scheduler else SchedulerConfig()
    )
    with pytest.raises(ConfigError, match=message) as caught:
        check_optimization(optimizer_config, scheduler_config)
    assert "\n" not in str(caught.value)


def test_cycles_are_as_long_as_the_run_or_longer():
    config = SchedulerConfig(type="OneCycleLR", args={"max_lr": 0.1, "total_steps": 9})
    check_optimization(SGD, config)
    check_optimization(
        SGD,
        SchedulerConfig(type="OneCycleLR", args={"max_lr": 0.1, "epochs": 1, "steps_per_epoch": 2}),
    )
    parts = [{"type": "LinearLR"}, {"type": "OneCycleLR", "args": {"max_lr": 1, "total_steps": 3}}]
    sequence = SchedulerConfig(type="SequentialLR", args={"schedulers": parts, "milestones": [2]})
    chain = SchedulerConfig(type="ChainedScheduler", args={"schedulers": parts})
    check_optimization(SGD, sequence)

    def schedule(config, epochs, batches):
        optimizer = build_optimizer(SGD, nn.Linear(2, 2))
        return Schedule(config, optimizer, epochs, batches, has_validation=True)

    schedule(sequence, 5, 7)
    schedule(chain, 3, 7)
    schedule(config, 3, 3)
    for shorter, epochs, batches, cycle, steps in (
        (sequence, 6, 7, 3, 4),
        (chain, 4, 7, 3, 4),
        (config, 4, 3, 9, 12),
    ):
        message = f"lr_scheduler.args: the cycle has {cycle} steps, the run takes {steps}"
        with pytest.raises(ConfigError, match=message):
            schedule(shorter, epochs, batches)


@pytest.mark.parametrize("name", sorted((set(OPTIMIZERS) | set(SCHEDULERS)) - set(UNUSABLE)))
def test_defaults_of_every_class_fit_the_types_and_ranges(name):
    cls = (OPTIMIZERS | SCHEDULERS)[name]
    parameters = inspect.signature(cls).parameters.values()
    defaults = {
        p.name: p.default
        for p in parameters
        if p.default is not p.empty and p.name not in NOT_FROM_CONFIG
    }
    defaults = json.loads(json.dumps(defaults))
    required = json.loads(json.dumps(SCHEDULER_ARGS.get(name, {})))
    for argument, value in defaults.items():
        given = (
            {"T_max": 5, **required, argument: value}
            if name == "CosineAnnealingLR"
            else {**required, argument: value}
        )
        check_arguments(cls, given, "key", positional=1)
        with pytest.raises(ConfigError, match=rf"^key\.{argument}: expected "):
            check_arguments(cls, given | {argument: {"wrong": 1}}, "key", positional=1)


def test_plateau_watches_a_logged_value_and_steps_by_epoch_only():
    _, optimizer, _ = start("none")
    plateau = SchedulerConfig(type="ReduceLROnPlateau", monitor="val_my_metric")
    schedule = Schedule(plateau, optimizer, 5, 2, has_validation=True)
    schedule.step_epoch({"val_top1": 0.5})
    schedule.step_epoch({"loss": 1.0, "top1": 0.5})
    assert schedule.scheduler.last_epoch == 1, "an epoch without the value does not count"
    with pytest.raises(ConfigError, match="ReduceLROnPlateau steps after every epoch"):
        Schedule(
            SchedulerConfig(type="ReduceLROnPlateau", interval="batch"),
            optimizer,
            5,
            2,
            has_validation=True,
        )
    assert (
        Schedule(
            SchedulerConfig(type="ReduceLROnPlateau"), optimizer, 5, 2, has_validation=False
        ).monitor
        == "loss"
    )


@pytest.mark.parametrize("monitor", ["val_robust_top1", "val_ema_top1"])
def test_a_plateau_may_watch_every_value_that_a_config_accepts(monitor):
    plateau = SchedulerConfig(type="ReduceLROnPlateau", monitor=monitor, args={"mode": "max"})
    check_optimization(OptimizerConfig(type="SGD", args={"lr": 0.1}), plateau)


@pytest.mark.parametrize(
    ("monitor", "right", "wrong"),
    [
        ("val_clean_top5", "max", "min"),
        ("val_robust_top1", "max", "min"),
        ("val_my_metric2", "max", "min"),
        ("loss", "min", "max"),
        ("val_ema_loss", "min", "max"),
        (None, "min", "max"),
    ],
)
def test_a_plateau_knows_the_better_direction_and_refuses_the_other(monitor, right, wrong):
    def plateau(**args):
        return SchedulerConfig(
            type="ReduceLROnPlateau", monitor=monitor, args={"patience": 0, **args}
        )

    for config in (plateau(), plateau(mode=right)):
        check_optimization(SGD, config)
        schedule = Schedule(
            config, build_optimizer(SGD, nn.Linear(2, 2)), 5, 2, has_validation=True
        )
        for value in (1.0, 2.0, 3.0) if right == "max" else (3.0, 2.0, 1.0):
            schedule.step_epoch({schedule.monitor: value})
        assert schedule.learning_rate == 0.1
        schedule.step_epoch({schedule.monitor: 1.5})
        assert schedule.learning_rate == pytest.approx(0.01)
    message = (
        f"lr_scheduler.args.mode: '{wrong}' lowers the learning rate while .* improves:"
        f" expected '{right}'"
    )
    with pytest.raises(ConfigError, match=message):
        check_optimization(SGD, plateau(mode=wrong))
    check_optimization(SGD, plateau(mode=wrong), resumed=True)


def test_a_resumed_run_keeps_the_mode_that_its_plateau_started_with(caplog):
    """In older checkpoints the mode is min for accuracies, too."""
    config = SchedulerConfig(type="ReduceLROnPlateau", monitor="val_top1", args={"patience": 0})
    schedule = Schedule(config, build_optimizer(SGD, nn.Linear(2, 2)), 5, 2, has_validation=True)
    state = schedule.state_dict() | {"mode": "min", "best": 0.5}
    schedule.load_state_dict(state)
    schedule.step_epoch({"val_top1": 0.6})
    assert schedule.learning_rate == pytest.approx(0.01)
    assert "the run started with mode 'min' for val_top1 and keeps it" in caplog.text


class PickySGD(torch.optim.SGD):
    """A user's own optimizer that passes its arguments on, and does not accept the rate 0."""

    def __init__(self, params, **others):
        assert others["lr"] > 0
        super().__init__(params, **others)


def test_an_optimizer_of_a_user_may_pass_its_arguments_on(monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "PickySGD", PickySGD)
    config = OptimizerConfig(type="PickySGD", args={"lr": 0.1, "momentum": 0.9})
    check_optimization(config, SchedulerConfig())
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(config, model)
    saved = named_optimizer_state(optimizer, model)
    assert checked_optimizer_state(optimizer, model, saved, Path("file.pth"))["state"] == {}
    wrong = OptimizerConfig(type="PickySGD", args={"momentun": 0.9})
    with pytest.raises(ConfigError, match=r"PickySGD takes no such argument; did you mean 'mom"):
        check_optimization(wrong, SchedulerConfig())


class Thresholds(nn.Module):
    no_weight_decay = ("threshold",)

    def __init__(self):
        super().__init__()
        self.weight, self.threshold = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))


def test_parameters_that_a_layers_class_exempts_do_not_decay():
    model = nn.Sequential(nn.Identity(), Thresholds())
    # A parameter of this name decays where the class does not say so
    model.threshold = nn.Parameter(torch.ones(2))
    optimizer = build_optimizer(
        OptimizerConfig(type="SGD", args={"lr": 1.0, "weight_decay": 0.5}), model
    )
    sum(parameter.sum() * 0 for parameter in model.parameters()).backward()
    optimizer.step()
    assert [parameter.tolist() for parameter in (model[1].weight, model.threshold)] == [
        [0.5, 0.5],
        [0.5, 0.5],
    ]
    assert model[1].threshold.tolist() == [1.0, 1.0]
    srelu = ACTIVATION_LAYERS["srelu"](3)
    assert [
        group["weight_decay"]
        for group in build_optimizer(SGD, nn.Sequential(nn.Linear(2, 2), srelu)).param_groups
    ][1] == 0


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(8, 2)
    )


def take_steps(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        model(
            torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        ).square().sum().backward()
        optimizer.step()


def flags(optimizer):
    return {(group["fused"], group["foreach"]) for group in optimizer.param_groups}


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
        ("SGD", {"lr": 0.05, "maximize": True}),
        ("Adam", {"lr": 0.01, "weight_decay": 0.01, "amsgrad": True}),
        ("AdamW", {"lr": 0.01}),
        ("Adagrad", {"lr": 0.01}),
    ],
)
def test_fused_updates_are_the_default_and_equal_the_plain_formula(name, args):
    model, plain = network(), network()
    optimizer = build_optimizer(OptimizerConfig(type=name, args=args), model)
    assert flags(optimizer) == {(True, None)}
    take_steps(model, optimizer, range(5))
    take_steps(
        plain, OPTIMIZERS[name](plain.parameters(), **args, fused=False, foreach=False), range(5)
    )
    torch.testing.assert_close(list(model.parameters()), list(plain.parameters()))


@pytest.mark.parametrize(
    "given", [{"fused": False}, {"fused": None}, {"foreach": True}, {"foreach": False}]
)
def test_settings_of_kernels_in_a_config_are_kept(given):
    optimizer = build_optimizer(OptimizerConfig(type="SGD", args={"lr": 0.1, **given}), network())
    assert flags(optimizer) == {(given.get("fused"), given.get("foreach"))}


def test_without_a_fused_kernel_the_plain_one_is_used():
    assert flags(
        build_optimizer(OptimizerConfig(type="Adam", args={"differentiable": True}), network())
    ) == {(None, None)}
    assert (
        "fused" not in build_optimizer(OptimizerConfig(type="RMSprop"), network()).param_groups[0]
    )


@pytest.mark.parametrize("name", ["SGD", "Adam", "Adagrad"])
def test_runs_that_started_without_fused_kernels_resume_bit_for_bit(name, tmp_path):
    args = {"lr": 0.01, "momentum": 0.9} if name == "SGD" else {"lr": 0.01}
    whole, part = network(), network()
    take_steps(whole, OPTIMIZERS[name](whole.parameters(), **args), range(6))
    first = OPTIMIZERS[name](part.parameters(), **args)
    take_steps(part, first, range(3))
    save_checkpoint(
        tmp_path / "c.pth", {"state_dict": part.state_dict(), "optimizer": first.state_dict()}
    )
    stored = load_checkpoint(tmp_path / "c.pth")
    resumed = network()
    resumed.load_state_dict(stored["state_dict"])
    second = build_optimizer(OptimizerConfig(type=name, args=args), resumed)
    load_optimizer(second, stored["optimizer"])
    assert flags(second) == {(None, None)}
    take_steps(resumed, second, range(3, 6))
    assert all(
        torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True)
    )


@pytest.mark.parametrize("name", ["SGD", "Adam"])
@pytest.mark.parametrize(
    "formats", [("contiguous_format", "channels_last"), ("channels_last", "contiguous_format")]
)
def test_a_run_may_resume_in_another_memory_format(name, formats):
    args = {"lr": 0.05, "momentum": 0.9} if name == "SGD" else {"lr": 0.01}
    config = OptimizerConfig(type=name, args=args)
    before, after = (getattr(torch, name) for name in formats)
    whole, part = network(), network().to(memory_format=before)
    take_steps(
        whole, OPTIMIZERS[name](whole.parameters(), **args, fused=False, foreach=False), range(4)
    )
    first = build_optimizer(config, part)
    take_steps(part, first, range(2))
    resumed = network().to(memory_format=after)
    resumed.load_state_dict(part.state_dict())
    second = build_optimizer(config, resumed)
    load_optimizer(second, first.state_dict())
    take_steps(resumed, second, range(2, 4))
    torch.testing.assert_close(list(resumed.parameters()), list(whole.parameters()))


def test_a_part_whose_milestone_is_beyond_the_run_ends_with_the_run():
    parts = [{"type": "CosineAnnealingLR"}, {"type": "ConstantLR"}]
    args = {"schedulers": parts, "milestones": [9]}
    optimizer = build_optimizer(SGD, nn.Linear(2, 2))
    schedule = Schedule(
        SchedulerConfig(type="SequentialLR", args=args), optimizer, 6, 3, has_validation=True
    )
    for _ in range(6):
        optimizer.step()
        schedule.step_epoch({})
    assert schedule.learning_rate == pytest.approx(0, abs=1e-9)
