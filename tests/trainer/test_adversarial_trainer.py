"""Every adversarial method against its algorithm written out, and free training against the
original's trajectory."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from attacks import PGD
from base.base_data_loader import BaseDataLoader
from base.checkpoint import load_checkpoint
from base.config import validate
from base.config.tree import merge
from base.optim import Schedule, build_optimizer
from base.registry import TRAINERS
from experiment.build import build_trainer
from models import build_model
from models.ocnn import penalty
from tiny_runs import read_arrays

GOLDEN = Path(__file__).parents[1] / "golden"
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
BASE = {
    "data_loader": {"type": "DigitsDataLoader"},
    "optimizer": {"type": "SGD", "args": {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4}},
    "arch": {"type": "simpleCNN", "args": {"norm_layer_type": "bn"}},
}


class Batches(BaseDataLoader):
    """Only what trainers call."""

    num_classes = 10

    def __len__(self):
        return 3

    __iter__ = set_epoch = images_at = subset = split_validation = test_loader = None


def build(folder, settings, model=None):
    config = validate(merge(BASE, settings))
    torch.manual_seed(0)
    model = model or build_model(config.arch.model_dump(exclude_none=True), MEAN, STD)
    optimizer = build_optimizer(config.optimizer, model)
    return build_trainer(
        config,
        model=model.train(),
        optimizer=optimizer,
        schedule=Schedule(config.lr_scheduler, optimizer, 1, 3, False),
        train_loader=Batches(),
        validate=lambda model, epoch: {},
        precision="fp32",
        folder=folder,
        metadata={},
    )


def batch(size=6):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(size, 3, 32, 32, generator=generator)
    return images, torch.randint(10, (size,), generator=generator)


def same_weights(first, second):
    return all(
        torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(("conv", "norm"), [("conv", "bn"), ("prec_conv", "no"), ("sn_conv", "bn")])
def test_free_training_follows_the_original(tmp_path, conv, norm):
    golden = read_arrays(GOLDEN / f"trajectory_free_{conv}_{norm}.npz")
    layers = {"arch": {"args": {"conv_layer_type": conv, "norm_layer_type": norm}}}
    trainer = build(tmp_path, merge(layers, {"trainer": {"do_adv": True}}))
    start = read_arrays(GOLDEN / f"trajectory_standard_{conv}_{norm}.npz")
    source = golden if any(key.startswith("init/") for key in golden) else start
    trainer.model.load_state_dict(
        {k[5:]: torch.from_numpy(source[k]) for k in source if k.startswith("init/")}
    )
    losses = []
    update = trainer.update
    trainer.update = lambda each: (losses.append(each.mean().item()), update(each))
    images = torch.from_numpy(golden["images_uint8"]).permute(0, 3, 1, 2) / 255
    for number in range(3):
        part = slice(32 * number, 32 * number + 32)
        trainer.train_batch(images[part], torch.from_numpy(golden["labels"])[part])
    assert len(losses) == len(golden["losses"]) == 12
    assert losses[:4] == pytest.approx(golden["losses"][:4].tolist(), rel=1e-2)


def test_free_l2_moves_along_the_gradient_within_the_ball(tmp_path):
    settings = {
        "adversarial": {
            "method": "free",
            "norm": "l2",
            "epsilon": 0.4,
            "step_size": 0.3,
            "noise": "carry",
        }
    }
    trainer = build(tmp_path, settings)
    images, labels = batch()
    trainer.train_batch(images, labels)
    length = trainer.method_state()["perturbation"].flatten(1).norm(dim=1)
    assert ((length > 0.3) & (length <= 0.4 + 1e-6)).all(), (
        "four steps of 0.3 reach the bound or turn"
    )


def test_carried_noise_continues_where_it_ended_and_reset_begins_at_zero(tmp_path):
    first = {}
    for noise in ("carry", "reset"):
        trainer = build(
            tmp_path,
            {"adversarial": {"method": "free", "noise": noise}, "trainer": {"adv_repeats": 2}},
        )
        seen = []
        trainer.model.register_forward_pre_hook(
            lambda module, inputs, seen=seen: seen.append(inputs[0].detach())
        )
        images, labels = batch()
        for part in (slice(6), slice(4), slice(6)):
            trainer.train_batch(images[part], labels[part])
        first[noise] = seen
    assert torch.equal(first["reset"][2], images[:4])
    assert not torch.equal(first["carry"][2], images[:4])
    assert (first["carry"][2] - images[:4]).abs().max() <= 8 / 255 + 1e-6
    # Images that the short minibatch did not have keep the perturbation of the first one
    kept = first["carry"][4][4:] - images[4:]
    assert kept.abs().amax() > 0


def attack_by_hand(model, images, targets, start, step, epsilon, steps):
    """Madry's loop, gradient by `backward`."""
    points = start
    for _ in range(steps):
        points = points.clone().requires_grad_()
        F.cross_entropy(model(points), targets, reduction="sum").backward()
        points = (
            (points + step * points.grad.sign())
            .clamp(images - epsilon, images + epsilon)
            .clamp(0, 1)
            .detach()
        )
    model.zero_grad()
    return points


@pytest.mark.parametrize("bn_mode", ["train", "eval"])
@pytest.mark.parametrize(("method", "steps", "step"), [("pgd", 3, 2.5 * 8 / 3), ("fgsm", 1, 10)])
def test_pgd_and_fgsm_training_against_the_loop_written_out(
    tmp_path, method, steps, step, bn_mode, monkeypatch
):
    settings = {"adversarial": {"method": method, "steps": 3, "bn_mode": bn_mode}}
    trainer, plain = build(tmp_path, settings), build(tmp_path, settings)
    starts = []
    draw = type(trainer.attack.threat_model).random_start
    start = draw(trainer.attack.threat_model, batch()[0], torch.Generator().manual_seed(5))
    monkeypatch.setattr(
        PGD, "start", lambda attack, images, generators: (starts.append(generators), start)[1]
    )
    images, labels = batch()
    result = trainer.train_batch(images, labels)
    model = plain.model.train(bn_mode == "train")
    adversarial = attack_by_hand(model, images, labels, start, step / 255, 8 / 255, steps)
    model.train()
    logits = model(adversarial)
    losses = F.cross_entropy(logits, labels, reduction="none")
    plain.optimizer.zero_grad()
    losses.mean().backward()
    plain.optimizer.step()
    assert same_weights(trainer.model, plain.model), "weights and running statistics"
    assert float(result.sums["loss"]) == pytest.approx(float(losses.detach().sum()))
    assert int(result.sums["top1"]) == int((logits.argmax(1) == labels).sum())
    assert isinstance(starts[0], torch.Generator)


@pytest.mark.parametrize(
    "method", [name for name in TRAINERS if TRAINERS[name].attacks_while_training]
)
def test_the_radius_grows_over_the_warm_up(tmp_path, method):
    trainer = build(tmp_path, {"adversarial": {"method": method, "steps": 4, "warmup_epochs": 4}})
    images, labels = batch()
    distances = []
    trainer.model.register_forward_pre_hook(
        lambda module, inputs: distances.append(
            float((inputs[0].detach() - images).abs().max()) * 255 / 8
        )
    )
    for epochs, batches, share in ((0, 0, 0), (1, 0, 0.25), (2, 1, 7 / 12), (4, 0, 1), (9, 2, 1)):
        distances.clear()
        trainer.state.epochs_done, trainer.state.batches_done = epochs, batches
        trainer.train_batch(images, labels)
        assert distances[-1] == pytest.approx(share, abs=1e-4), (
            "the update is on points at the edge of the ball"
        )
        assert max(distances) <= max(share, 0.2) + 1e-4, (
            "TRADES begins at a small distance even then"
        )


def test_starts_are_a_function_of_seed_epoch_and_minibatch(tmp_path):
    models = []
    for done in ((0, 0), (0, 0), (0, 1), (1, 0)):
        trainer = build(tmp_path, {"adversarial": {"method": "fgsm"}})
        trainer.state.epochs_done, trainer.state.batches_done = done
        trainer.train_batch(*batch())
        models.append(trainer.model)
    assert same_weights(models[0], models[1])
    for number in (2, 3):
        assert not same_weights(models[0], models[number])


def test_starts_depend_on_the_seed_and_a_config_says_everything_about_the_attack(tmp_path):
    settings = {"method": "pgd", "steps": 1, "step_size": 1, "restarts": 3}
    first, other = (build(tmp_path, {"seed": seed, "adversarial": settings}) for seed in (1, 2))
    other.model.load_state_dict(first.model.state_dict())
    for trainer in (first, other):
        trainer.train_batch(*batch())
    assert not same_weights(first.model, other.model)
    attack = first.attack
    assert (attack.steps, attack.restarts, attack.random_start, attack.early_stop) == (
        1,
        3,
        True,
        0,
    )
    assert attack.step_size == pytest.approx(1 / 255)
    still = build(tmp_path, {"adversarial": {"method": "fgsm", "random_start": False}}).attack
    assert (still.steps, still.restarts, still.random_start, still.step_size) == (
        1,
        1,
        False,
        pytest.approx(10 / 255),
    )


@pytest.mark.parametrize("method", ["free", "pgd", "trades"])
def test_every_forward_pass_is_in_the_runs_precision_and_on_pixels(tmp_path, method):
    trainer = build(
        tmp_path, {"adversarial": {"method": method, "epsilon": 200, "step_size": 100, "steps": 2}}
    )
    trainer.precision = "bf16"
    seen = []
    trainer.model.register_forward_pre_hook(
        lambda module, inputs: seen.append(
            (torch.is_autocast_enabled("cpu"), inputs[0].amin() >= 0, inputs[0].amax() <= 1)
        )
    )
    trainer.train_batch(*batch())
    if method == "trades":
        # The start of its attack, to which the paper adds unclamped noise
        seen.pop(1)
    assert all(all(values) for values in seen)


@pytest.mark.parametrize("method", TRAINERS)
def test_ocnns_penalty_is_part_of_every_methods_loss(tmp_path, method):
    """With a learning rate of 1 and plain SGD the weights move by the gradient: the penalty's part
    is the difference."""
    plain = {
        "optimizer": {"args": {"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0}},
        "trainer": {"adv_repeats": 1},
    }
    plain["adversarial"] = {"method": method, "steps": 1}
    without = build(tmp_path, plain)
    with_penalty = build(tmp_path, merge(plain, {"trainer": {"OCNN": True, "lamb_ocnn": 0.01}}))
    loss = 0.01 * penalty(without.model)
    expected = torch.autograd.grad(loss, list(without.model.parameters()), allow_unused=True)
    assert any(gradient is not None and gradient.abs().max() > 1e-4 for gradient in expected)
    for trainer in (without, with_penalty):
        trainer.train_batch(*batch())
    for a, b, gradient in zip(
        without.model.parameters(), with_penalty.model.parameters(), expected, strict=True
    ):
        torch.testing.assert_close(
            a - b, torch.zeros_like(a) if gradient is None else gradient, rtol=1e-3, atol=1e-5
        )


def test_trades_attacks_in_evaluation_mode_unless_the_config_says_train(tmp_path):
    for settings, modes in (
        ({}, [False, False, False, True, True]),
        ({"bn_mode": "train"}, [True] * 5),
    ):
        trainer = build(tmp_path, {"adversarial": {"method": "trades", "steps": 2, **settings}})
        seen = []
        trainer.model.register_forward_pre_hook(
            lambda module, inputs, seen=seen: seen.append(module.training)
        )
        trainer.train_batch(*batch())
        assert seen == modes


@pytest.mark.parametrize(("clean_passes", "order"), [(1, "cx"), (2, "cxc")])
def test_the_passes_of_trades_and_what_running_statistics_hold(tmp_path, clean_passes, order):
    """Attacked images make 53 % of them with one clean pass, 33 % with the two of the authors'
    code."""
    trainer = build(
        tmp_path, {"adversarial": {"method": "trades", "steps": 1, "clean_passes": clean_passes}}
    )
    images, labels = batch(5)
    seen, means = [], []
    norm = next(
        module for module in trainer.model.modules() if isinstance(module, torch.nn.BatchNorm2d)
    )

    def record(module, inputs, output):
        if module.training:
            means.append(inputs[0].detach().mean(dim=(0, 2, 3)))

    norm.register_forward_hook(record)
    trainer.model.register_forward_pre_hook(
        lambda module, inputs: (
            seen.append("c" if torch.equal(inputs[0], images) else "x") if module.training else None
        )
    )
    trainer.train_batch(images, labels)
    assert "".join(seen) == order
    weights = [0.1 * 0.9 ** (len(order) - 1 - number) for number in range(len(order))]
    expected = sum(weight * mean for weight, mean in zip(weights, means, strict=True))
    torch.testing.assert_close(norm.running_mean, expected)
    attacked = sum(
        weight for weight, image in zip(weights, order, strict=True) if image == "x"
    ) / sum(weights)
    assert attacked == pytest.approx({1: 0.526, 2: 0.332}[clean_passes], abs=1e-3)


@pytest.mark.parametrize("clean_passes", [1, 2])
def test_trades_against_the_formula(tmp_path, clean_passes, monkeypatch):
    trades = {"method": "trades", "steps": 2, "beta": 3.0, "bn_mode": "eval"}
    settings = {"adversarial": {**trades, "clean_passes": clean_passes}}
    trainer, plain = build(tmp_path, settings), build(tmp_path, settings)
    images, labels = batch()
    noisy, run = [], PGD.run
    monkeypatch.setattr(PGD, "run", lambda *given: (noisy.append(given[-1]), run(*given))[1])
    result = trainer.train_batch(images, labels)
    assert float((noisy[0] - images).std()) == pytest.approx(0.001, rel=0.05)
    model, points = plain.model.eval(), noisy[0]
    clean = model(images).detach().softmax(1)
    for _ in range(2):
        points = points.clone().requires_grad_()
        divergence = F.kl_div(model(points).log_softmax(1), clean, reduction="sum")
        (gradient,) = torch.autograd.grad(divergence, points)
        points = points.detach() + 10 / 255 * gradient.sign()
        points = points.clamp(images - 8 / 255, images + 8 / 255).clamp(0, 1)
    model.train()
    logits, adversarial = model(images), model(points)
    again = model(images) if clean_passes == 2 else logits
    divergence = F.kl_div(adversarial.log_softmax(1), again.softmax(1), reduction="none").sum(1)
    losses = F.cross_entropy(logits, labels, reduction="none") + 3 * divergence
    losses.mean().backward()
    plain.optimizer.step()
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    assert float(result.sums["loss"]) == pytest.approx(float(losses.detach().sum()), rel=1e-5)
    assert int(result.sums["robust_top1"]) == int((adversarial.argmax(1) == labels).sum())


METHODS = {
    "free": {"method": "free"},
    "fgsm": {"method": "fgsm"},
    "pgd": {"method": "pgd", "steps": 2, "restarts": 2},
    "trades": {"method": "trades", "steps": 2},
    "none": {"method": "none"},
}


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_works_with_mixup_ocnn_averaging_and_either_norm(tmp_path, method, norm):
    settings = {
        "adversarial": {**METHODS[method], "norm": norm},
        "augmentation": {"mixup_alpha": 1.0},
        "trainer": {"OCNN": True, "ema_decay": 0.5},
    }
    trainer = build(tmp_path, settings)
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    result = trainer.train_batch(*trainer.mixup(*batch()))
    updates = trainer.config.trainer.adv_repeats if method == "free" else 1
    assert result.count == 6 * updates
    assert 0 <= float(result.sums["top1"]) <= result.count
    assert trainer.ema.updates == updates
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    assert trainer.model.training
    assert any(
        not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True)
    )
    assert torch.isfinite(result.sums["loss"])


def test_mixups_two_labels_go_through_the_attacks_loss(tmp_path):
    seen = []

    class Recorder(PGD):
        def perturb(self, model, images, labels, generators):
            seen.append((images, labels))
            return super().perturb(model, images, labels, generators)

    trainer = build(
        tmp_path,
        {"adversarial": {"method": "pgd", "steps": 1}, "augmentation": {"mixup_alpha": 1.0}},
    )
    trainer.attack = Recorder(8 / 255, 2 / 255, 1)
    images, labels = batch()
    trainer.train_batch(*trainer.mixup(images, labels))
    mixed, probabilities = seen[0]
    assert not torch.equal(mixed, images)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(6))
    assert ((probabilities > 0).sum(1) <= 2).all()
    assert (probabilities.gather(1, labels[:, None]) > 0).all()


def test_the_attack_computes_no_gradient_of_a_weight(tmp_path):
    trainer = build(tmp_path, {"adversarial": {"method": "pgd", "steps": 4}})
    requires_grad = []
    trainer.model.register_forward_pre_hook(
        lambda module, inputs: requires_grad.append(
            any(parameter.requires_grad for parameter in module.parameters())
        )
    )
    trainer.train_batch(*batch())
    assert requires_grad == [False] * 4 + [True], "four steps, one update, no other forward pass"


@pytest.mark.parametrize("resumed", [False, True])
def test_a_collapse_is_noticed_after_a_resume(tmp_path, caplog, resumed):
    """Epochs of little, much and no robustness; only the third is a fall."""
    accuracies = iter([(0.7, 0.2), (0.9, 0.6), (0.9, 0.05)])

    def scripted(model, epoch):
        fgsm, pgd = next(accuracies)
        return {"top1": 0.9, "fgsm_top1": fgsm, "robust_top1": pgd}

    settings = {"adversarial": {"method": "fgsm"}, "trainer": {"epochs": 3}}
    trainer = build(tmp_path, settings)
    trainer.validate_model = scripted
    for number in range(3):
        if resumed and number == 2:
            last = tmp_path / "model_last.pth"
            # A thread writes it
            trainer.checkpoints.join()
            trainer = build(tmp_path, settings)
            trainer.validate_model = scripted
            trainer.resume(load_checkpoint(last), last)
        assert "catastrophic" not in caplog.text
        trainer._finish_epoch({"epoch": number + 1, "loss": 1.0, **trainer.validate()})
    warning = (
        "catastrophic overfitting: 90.0 % of the validation images resist FGSM, 5.0 % resist PGD,"
        " as 60.0 %"
    )
    assert warning in caplog.text


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"method": "pgd"}, "linf 8/255, 10 steps of 2/255"),
        (
            {"method": "pgd", "norm": "l2", "epsilon": 0.5, "steps": 5, "restarts": 2},
            "l2 0.5, 5 steps of 0.25 from each of 2 starts",
        ),
        (
            {"method": "fgsm", "warmup_epochs": 2},
            "linf 8/255 (growing for 2 epochs), 1 step of 10/255",
        ),
        ({"method": "trades"}, "linf 8/255, 10 steps of 2/255"),
        (
            {"method": "free"},
            "linf 8/255, a step of 4/255 in each of 8 updates per minibatch",
        ),
    ],
)
def test_the_log_names_the_attack_in_training(tmp_path, settings, expected):
    free = {"fgsm_step": 4, "adv_repeats": 8} if settings["method"] == "free" else {}
    trainer = build(tmp_path, {"adversarial": {"epsilon": 8, **settings}, "trainer": free})
    assert trainer.describe_training_attack() == expected
