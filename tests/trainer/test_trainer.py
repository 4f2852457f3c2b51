"""The epoch loop, on a model and data small enough to follow by hand."""

import json
import logging
import math
import os
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import base.checkpoint.manager as run_checkpoints_module
import experiment  # noqa: F401 - fills the tables
from base.base_data_loader import BaseDataLoader
from base.base_model import BaseModel
from base.base_trainer import BaseTrainer, TrainerParts
from base.checkpoint import load_checkpoint
from base.config import validate
from base.config.tree import merge
from base.errors import CheckpointError, ConfigError, NonFiniteError
from base.optim import Schedule, build_optimizer
from base.tracking.tracker import RunLog, Trackers
from evaluation.accuracy import evaluate
from models.losses import LOSSES
from models.metrics import METRICS
from trainer.trainer import Trainer

METRICS_USED = {name: METRICS[name] for name in ("top1", "top5")}
BASE = {
    "data_loader": {"type": "DigitsDataLoader"},
    "optimizer": {"type": "SGD", "args": {"lr": 0.5, "momentum": 0.9}},
    "trainer": {"epochs": 3, "monitor": "max val_top1"},
}


class TinyLoader(BaseDataLoader):
    """Eleven images of 2x2 in batches of four: the last batch is smaller."""

    def __init__(self, noisy=False, values=None):
        generator = torch.Generator().manual_seed(3)
        self.images = torch.rand(11, 3, 2, 2, generator=generator) if values is None else values
        self.labels = torch.randint(7, (11,), generator=generator)
        self.clean_labels = torch.randint(7, (11,), generator=generator) if noisy else None
        self.batch_size, self.n_samples, self.num_classes = 4, 11, 7

    def __iter__(self):
        return zip(self.images.split(4), self.labels.split(4), strict=True)

    def __len__(self):
        return 3

    def set_epoch(self, epoch, first_batch=0):
        assert first_batch == 0

    def images_at(self, positions):
        return self.images[positions]

    def subset(self, index):
        raise NotImplementedError

    def split_validation(self):
        return None

    def test_loader(self):
        return self


class TinyModel(BaseModel):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm2d(3)
        self.linear = nn.Linear(12, 7)

    def forward_normalized(self, inputs):
        return self.linear(self.norm(inputs).flatten(1))


def evaluate_tiny(model, loader):
    return evaluate(
        model, loader, loss=LOSSES["cross_entropy"], metrics=METRICS_USED, autocast=nullcontext
    )


def test_an_evaluation_sums_no_means():
    loss = F.cross_entropy
    with pytest.raises(ConfigError, match=r"^losses: expected one loss per sample.*, not \(\)$"):
        evaluate(TinyModel(), TinyLoader(), loss=loss, metrics={}, autocast=nullcontext)


class Elsewhere:
    """A tensor that has to be moved to the model's device before use."""

    def __init__(self, tensor):
        self.tensor = tensor

    def to(self, device):
        assert device == torch.device("cpu")
        return self.tensor


class LoaderElsewhere(TinyLoader):
    def __iter__(self):
        return ((Elsewhere(images), Elsewhere(labels)) for images, labels in super().__iter__())


def test_batches_are_moved_to_the_models_device(tmp_path):
    trainer = build(tmp_path, train_loader=LoaderElsewhere(), validation_loader=LoaderElsewhere())
    trainer.train()
    assert trainer.state.history[-1]["val_loss"] > 0


def build(
    folder, settings=None, *, train_loader=None, validation_loader="same", scheduler=None, **options
):
    config = validate(merge(BASE, settings or {}))
    model = TinyModel()
    optimizer = build_optimizer(config.optimizer, model)
    loader = train_loader or TinyLoader()
    validation = TinyLoader() if validation_loader == "same" else validation_loader
    parts = TrainerParts(
        loss=LOSSES["cross_entropy"],
        metrics=METRICS_USED,
        penalty=options.pop("penalty", None),
        norm="linf",
        epsilon=8 / 255,
        config=config,
        model=model,
        optimizer=optimizer,
        schedule=Schedule(
            config.lr_scheduler,
            optimizer,
            config.trainer.epochs,
            len(loader),
            validation is not None,
        ),
        train_loader=loader,
        validate=options.pop(
            "validate", lambda model, epoch: evaluate_tiny(model, validation) if validation else {}
        ),
        precision="fp32",
        folder=folder,
        metadata={"config": config.dump()},
        **options,
    )
    trainer = Trainer(parts)
    trainer.trackers = Trackers([RunLog(folder / "metrics.jsonl")])
    return trainer


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_update_and_every_logged_value_against_a_plain_loop(tmp_path):
    settings = {"lr_scheduler": {"type": "StepLR", "args": {"step_size": 1, "gamma": 0.5}}}
    trainer = build(tmp_path, settings)
    trainer.train()
    model, loader = TinyModel(), TinyLoader()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for epoch, log in enumerate(lines(tmp_path)):
        outputs, losses = [], []
        for images, labels in loader:
            optimizer.param_groups[0]["lr"] = 0.5**epoch * 0.5
            optimizer.zero_grad()
            logits = model(images)
            loss = F.cross_entropy(logits, labels, reduction="none")
            loss.mean().backward()
            optimizer.step()
            outputs.append(logits.detach())
            losses.append(loss.detach())
        assert log["epoch"] == epoch + 1
        assert log["lr"] == 0.5**epoch * 0.5
        assert log["loss"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-6)
        assert log["top1"] == pytest.approx(
            float((torch.cat(outputs).argmax(1) == loader.labels).double().mean())
        )
        model.eval()
        with torch.no_grad():
            logits = model(loader.images)
        model.train()
        top5 = (logits.topk(5).indices == loader.labels[:, None]).any(1)
        assert log["val_top5"] == pytest.approx(float(top5.double().mean()))
        assert log["val_loss"] == pytest.approx(
            float(F.cross_entropy(logits, loader.labels)), rel=1e-6
        )
    for (name, ours), theirs in zip(
        trainer.model.state_dict().items(), model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, msg=name)


def test_evaluation_restores_the_mode_draws_nothing_and_reports_clean_labels(tmp_path):
    loader = TinyLoader(noisy=True)
    model = TinyModel()
    before, generator_before = (
        {k: v.clone() for k, v in model.state_dict().items()},
        torch.get_rng_state(),
    )
    values = evaluate_tiny(model, loader)
    assert model.training
    assert torch.equal(torch.get_rng_state(), generator_before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    logits = model.eval()(loader.images).detach()
    assert values["clean_top1"] == pytest.approx(
        float((logits.argmax(1) == loader.clean_labels).double().mean())
    )
    assert values["top1"] == pytest.approx(
        float((logits.argmax(1) == loader.labels).double().mean())
    )
    assert values["clean_loss"] == pytest.approx(
        float(F.cross_entropy(logits, loader.clean_labels)), rel=1e-6
    )
    assert not any(key.startswith("clean") for key in evaluate_tiny(model, TinyLoader()))


def scripted(values):
    """A validation that returns these values, one a call; None: not measured in that epoch."""
    remaining = iter(values)
    return lambda model, epoch: {} if (value := next(remaining)) is None else {"top1": value}


def test_the_best_model_is_saved_in_its_epoch_with_every_save_period(tmp_path):
    settings = {"trainer": {"epochs": 5, "save_period": 2, "keep_checkpoints": 0}}
    build(tmp_path, settings, validate=scripted([0.1, 0.6, 0.6, 0.2, 0.3])).train()
    assert load_checkpoint(tmp_path / "model_best.pth")["epoch"] == 3
    assert load_checkpoint(tmp_path / "model_best.pth")["monitor_best"] == 0.6
    assert load_checkpoint(tmp_path / "model_last.pth")["epoch"] == 5
    assert sorted(path.name for path in tmp_path.glob("model_epoch_*")) == [
        "model_epoch_2.pth",
        "model_epoch_4.pth",
    ]


def test_epochs_without_the_monitored_value_are_neither_better_nor_worse(tmp_path):
    settings = {"trainer": {"epochs": 6, "early_stop": 2}}
    trainer = build(tmp_path, settings, validate=scripted([None, 0.4, None, None, 0.3, 0.5]))
    trainer.train()
    assert load_checkpoint(tmp_path / "model_best.pth")["epoch"] == 6
    assert trainer.state.epochs_done == 6, "epochs 3 and 4 do not count against early_stop"


def test_a_kill_between_saving_last_and_best_loses_nothing(tmp_path, monkeypatch):
    trainer = build(tmp_path, validate=scripted([0.1, 0.5]))
    publish, calls = run_checkpoints_module.publish_copy, []

    def killed_the_second_time(source, target):
        calls.append(target.name)
        if calls.count("model_best.pth") == 2:
            raise KeyboardInterrupt
        publish(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(run_checkpoints_module, "publish_copy", killed_the_second_time)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    assert load_checkpoint(tmp_path / "model_best.pth")["epoch"] == 1
    resumed = build(tmp_path, validate=scripted([0.3]))
    resumed.resume(load_checkpoint(tmp_path / "model_last.pth"), tmp_path / "model_last.pth")
    resumed.train()
    assert load_checkpoint(tmp_path / "model_best.pth")["epoch"] == resumed.state.best_epoch == 2


def rewound(folder, settings=None):
    """A run of three epochs, the first better than the second, the third best of all, and its
    resume after the second."""
    build(folder, {"trainer": {"keep_checkpoints": 0}}, validate=scripted([0.5, 0.1, 0.9])).train()
    (folder / "model_epoch_1.pth").unlink()
    path = folder / "model_epoch_2.pth"
    return build(folder, settings, validate=scripted([0.9])), load_checkpoint(path), path


def test_the_best_model_is_found_among_the_numbered_ones(tmp_path):
    build(
        tmp_path, {"trainer": {"keep_checkpoints": 0}}, validate=scripted([0.5, 0.1, 0.9])
    ).train()
    path = tmp_path / "model_epoch_2.pth"
    build(tmp_path).resume(load_checkpoint(path), path)
    assert load_checkpoint(tmp_path / "model_best.pth")["epoch"] == 1


def test_a_best_model_of_an_epoch_that_is_trained_again_is_chosen_again(tmp_path):
    trainer, checkpoint, path = rewound(tmp_path)
    assert "the best model so far, of epoch 1, has been replaced by a better one" in trainer.resume(
        checkpoint, path
    )
    trainer.train()
    assert load_checkpoint(tmp_path / "model_best.pth")["epoch"] == trainer.state.best_epoch == 3


@pytest.mark.parametrize("deleted", ["model_last.pth", "model_epoch_3.pth"])
def test_a_best_model_whose_names_share_a_damaged_file_is_chosen_again(tmp_path, deleted):
    trainer, checkpoint, path = rewound(tmp_path)
    best = tmp_path / "model_best.pth"
    assert best.samefile(tmp_path / "model_last.pth")
    assert best.samefile(tmp_path / "model_epoch_3.pth")
    os.truncate(best, 1000)
    (tmp_path / deleted).unlink()
    assert "the best model so far, of epoch 1, has been replaced by a better one" in trainer.resume(
        checkpoint, path
    )
    trainer.train()
    assert load_checkpoint(best)["epoch"] == trainer.state.best_epoch == 3


@pytest.mark.parametrize(
    "damage", [lambda best: best.unlink(), lambda best: best.write_bytes(b"PK")]
)
def test_a_lost_best_model_is_chosen_among_the_epochs_that_follow(tmp_path, damage):
    trainer, checkpoint, path = rewound(tmp_path)
    best = tmp_path / "model_best.pth"
    # Its own file, not the one that it shares with model_last.pth
    best.unlink()
    best.touch()
    damage(best)
    assert trainer.resume(checkpoint, path).endswith(
        "model_best.pth is not: it is lost, and the best model is chosen among the epochs from 3 on"
    )
    trainer.train()
    assert load_checkpoint(best)["epoch"] == trainer.state.best_epoch == 3
    assert load_checkpoint(best)["progress"]["best_since"] == 3


def test_a_best_model_that_is_not_trained_again_is_lost(tmp_path):
    trainer, checkpoint, path = rewound(tmp_path, {"trainer": {"epochs": 2}})
    with pytest.raises(
        CheckpointError, match="its best model so far is of epoch 1, but .*model_best.pth is not"
    ):
        trainer.resume(checkpoint, path)


def test_early_stop_counts_epochs_without_improvement(tmp_path):
    trainer = build(
        tmp_path,
        {"trainer": {"epochs": 9, "early_stop": 2}},
        validate=scripted([0.3, 0.5, 0.4, 0.5, 0.9]),
    )
    trainer.train()
    assert trainer.state.epochs_done == 4
    assert trainer.state.best_epoch == 4, "of equally good epochs the last, but no improvement"


def test_without_validation_and_monitor_the_last_model_is_the_best(tmp_path):
    trainer = build(tmp_path, {"trainer": {"monitor": "off"}}, validation_loader=None)
    trainer.train()
    assert trainer.state.best_epoch == 3
    assert set(lines(tmp_path)[0]) == {"epoch", "lr", "loss", "top1", "top5"}


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_non_finite_numbers_stop_before_the_update(tmp_path, what, deferred):
    trainer = build(tmp_path)
    trainer.train()
    trainer.nan_guard.deferred_on = ("cpu",) if deferred else ()
    trainer.state.epochs_done = 1
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    if what == "loss":
        trainer.loss = lambda logits, labels: logits.sum(1) * math.inf
    else:
        # The square root's slope at zero: a finite loss with an infinite gradient
        trainer.loss = lambda logits, labels: (logits - logits.detach()).square().sum(1).sqrt()
    message = (
        f"epoch 2, batch 1: the {what} is not finite, first in the gradient of linear.bias: "
        ".*model_last.pth"
    )
    with pytest.raises(NonFiniteError, match=message):
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    saved = load_checkpoint(tmp_path / "model_last.pth")["state_dict"]
    assert all(
        torch.equal(parameter, saved[name]) for name, parameter in trainer.model.named_parameters()
    )


def test_penalty_is_added_to_the_loss_but_not_to_its_log(tmp_path):
    plain, penalized = (
        build(tmp_path, penalty=p) for p in (None, lambda model: 3 * model.linear.bias.sum())
    )
    images, labels = next(iter(TinyLoader()))
    results = [trainer.train_batch(images, labels) for trainer in (plain, penalized)]
    assert torch.equal(results[0].sums["loss"], results[1].sums["loss"])
    difference = plain.model.linear.bias - penalized.model.linear.bias
    # One SGD step of lr 0.5 on a gradient of 3
    torch.testing.assert_close(difference, torch.full((7,), 0.5 * 3))


def test_mixup_trains_on_averages_of_pairs_with_one_weight(tmp_path):
    seen = []

    class Recorder(TinyModel):
        def forward(self, images):
            seen.append(images.detach().clone())
            return super().forward(images)

    trainer = build(tmp_path, {"augmentation": {"mixup_alpha": 1.0}})
    trainer.model = trainer.network = Recorder()
    images, labels = next(iter(TinyLoader()))
    result = trainer.train_batch(*trainer.mixup(images, labels))
    # Find weight and partners from what the model saw: x' = w x + (1 - w) x[p]
    candidates = []
    for i in range(4):
        for j in range(4):
            direction = (images[i] - images[j]).flatten()
            moved = (seen[0][i] - images[j]).flatten()
            weight = float(direction @ moved / direction.square().sum()) if i != j else 1.0
            if torch.allclose(moved, weight * direction, atol=1e-6):
                candidates.append((i, j, weight))
    # An image may be its own partner
    weights = {round(weight, 4) for _, _, weight in candidates} - {1.0}
    assert len(weights) == 1
    mixed = {i: (j, weight) for i, j, weight in candidates if round(weight, 4) != 1}
    weight = next(iter(mixed.values()))[1]
    assert 0 < weight < 1
    assert {i for i, _, _ in candidates} == {0, 1, 2, 3}
    logits = TinyModel()(seen[0])
    partners = [mixed.get(i, (i,))[0] for i in range(4)]
    losses = [
        F.cross_entropy(logits, labels[chosen], reduction="none")
        for chosen in ([0, 1, 2, 3], partners)
    ]
    torch.testing.assert_close(
        result.sums["loss"], (weight * losses[0] + (1 - weight) * losses[1]).sum().detach()
    )
    right = [(logits.argmax(1) == labels[chosen]).float() for chosen in ([0, 1, 2, 3], partners)]
    torch.testing.assert_close(
        result.sums["top1"], (weight * right[0] + (1 - weight) * right[1]).sum()
    )
    again = build(tmp_path, {"augmentation": {"mixup_alpha": 1.0}})
    again.model = again.network = Recorder()
    again.train_batch(*again.mixup(images, labels))
    assert torch.equal(seen[0], seen[1]), "the draw is a function of seed, epoch and batch"


def test_checkpoints_of_another_optimizer_or_schedule_are_refused(tmp_path):
    trainer = build(tmp_path)
    trainer.train()
    checkpoint = load_checkpoint(tmp_path / "model_last.pth")
    other = build(tmp_path, {"optimizer": {"type": "Adam", "args": {"lr": 0.1, "momentum": None}}})
    with pytest.raises(
        CheckpointError, match="was trained with optimizer_type SGD, this config has Adam"
    ):
        other.resume(checkpoint, tmp_path)
    other = build(tmp_path, {"lr_scheduler": {"type": "StepLR", "args": {"step_size": 1}}})
    with pytest.raises(
        CheckpointError, match="was trained with scheduler_type none, this config has StepLR"
    ):
        other.resume(checkpoint, tmp_path)


def test_base_trainer_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        BaseTrainer()


def test_a_line_per_epoch_names_the_best(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        build(tmp_path, validate=scripted([0.5, 0.25, 0.75])).train()
    assert [record.message.endswith("(best)") for record in caplog.records] == [True, False, True]
    assert "val_top1 25.00%" in caplog.records[1].message


def test_every_epoch_and_minibatch_has_a_mixup_of_its_own(tmp_path):
    trainer = build(tmp_path, {"augmentation": {"mixup_alpha": 1.0}})
    images, _ = next(iter(TinyLoader()))
    weights, partners = set(), set()
    for done in ((0, 0), (0, 1), (0, 2), (1, 0), (2, 0)):
        trainer.state.epochs_done, trainer.state.batches_done = done
        # A label of its own for each image tells which images were averaged, and with what weight
        _, targets = trainer.mixup(images, torch.arange(4))
        weights.add(round(float(targets.diagonal().min()), 6))
        partners.add(tuple(targets[:, :4].fill_diagonal_(0).argmax(dim=1).tolist()))
    assert len(weights) == 5
    assert len(partners) > 1


@pytest.mark.parametrize("training", [False, True])
def test_an_evaluation_restores_either_mode(training):
    model = TinyModel().train(training)
    evaluate_tiny(model, TinyLoader())
    assert all(module.training is training for module in model.modules())


def test_averaged_weights_are_validated_beside_the_models_own(tmp_path):
    trainer = build(tmp_path, {"trainer": {"ema_decay": 0.9}})
    trainer.train()
    log = trainer.state.history[-1]
    own = evaluate_tiny(trainer.model, TinyLoader())
    averaged = evaluate_tiny(trainer.ema.model, TinyLoader())
    assert {name: log[f"val_{name}"] for name in own} == own
    assert {name: log[f"val_ema_{name}"] for name in averaged} == averaged
    assert own["loss"] != averaged["loss"]
