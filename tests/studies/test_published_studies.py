"""The shipped grids and configs agree with the published studies that they continue.

The values written out here are from the studies' own pages and code.
"""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

import run_ablations
from attacks import PGD
from base.command_line import config_overrides, config_parser
from base.config import Override, load_config
from experiment import Experiment
from experiment.build_attacks import build_attack
from models import build_model
from studies.grid import plan
from trainer.adversarial_trainer import AdversarialTrainer

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
PRESETS = (
    "baseline",
    "resnet34",
    "resnet50",
    "no_batchnorm",
    "cosine_schedule",
    "no_schedule",
    "small_batch",
    "large_batch",
)


def ablation(network, norm, batch, lr, epochs, schedule):
    return {
        "network": network,
        "norm": norm,
        "batch": batch,
        "lr": lr,
        "epochs": epochs,
        "schedule": schedule,
    }


STEPS = ("MultiStepLR", [100, 150], 0.1)
BY_PAGE = {
    "baseline": ablation("resnet18", "bn", 128, 0.1, 200, STEPS),
    "resnet34": ablation("resnet34", "bn", 128, 0.1, 200, STEPS),
    "resnet50": ablation("resnet50", "bn", 128, 0.1, 200, STEPS),
    "no_batchnorm": ablation("resnet18", "no", 128, 0.01, 200, STEPS),
    "cosine_schedule": ablation("resnet18", "bn", 128, 0.1, 200, "CosineAnnealingLR"),
    "no_schedule": ablation("resnet18", "bn", 128, 0.1, 200, "none"),
    "small_batch": ablation("resnet18", "bn", 32, 0.025, 200, STEPS),
    "large_batch": ablation("resnet18", "bn", 1024, 0.2, 200, STEPS),
}
AS_RUN = {
    "baseline": ablation("resnet18", "bn", 512, 0.1, 100, STEPS),
    "resnet34": ablation("resnet34", "bn", 512, 0.1, 100, STEPS),
    "resnet50": ablation("resnet50", "bn", 512, 0.1, 100, STEPS),
    "no_batchnorm": ablation("resnet18", "no", 512, 0.01, 100, STEPS),
    "cosine_schedule": ablation("resnet18", "bn", 512, 0.1, 100, "CosineAnnealingLR"),
    "no_schedule": ablation("resnet18", "bn", 512, 0.1, 100, "none"),
    "small_batch": ablation("resnet18", "bn", 32, 0.025, 100, STEPS),
    "large_batch": ablation("resnet18", "bn", 1024, 0.2, 100, STEPS),
}


def values_of(config):
    scheduler = config.lr_scheduler
    schedule = scheduler.type
    if schedule == "MultiStepLR":
        assert scheduler.args.keys() == {"milestones", "gamma"}
        schedule = ("MultiStepLR", scheduler.args["milestones"], scheduler.args["gamma"])
    else:
        assert scheduler.args == {}, "a cosine spans the whole run"
    optimizer = config.optimizer
    assert (optimizer.type, optimizer.args["momentum"], optimizer.args["weight_decay"]) == (
        "SGD",
        0.9,
        5e-4,
    )
    assert optimizer.args.keys() == {"lr", "momentum", "weight_decay"}
    args = config.arch.args
    return ablation(
        config.arch.type,
        args.norm_layer_type,
        config.data_loader.args.batch_size,
        optimizer.args["lr"],
        config.trainer.epochs,
        schedule,
    )


@pytest.mark.parametrize(("grid", "expected"), [("resnet", BY_PAGE), ("resnet_as_run", AS_RUN)])
def test_the_ablation_studys_values(grid, expected):
    runs = plan(CONFIGS / "ablations" / f"{grid}.json", seeds=[42])
    assert [run.variant for run in runs] == list(PRESETS)
    for run in runs:
        config = run.config
        assert values_of(config) == expected[run.variant], run.variant
        loader, augmentation = config.data_loader, config.augmentation
        assert loader.type == "CIFAR10DataLoader"
        assert (loader.args.mean, loader.args.std) == (
            [0.4914, 0.4822, 0.4465],
            [0.2470, 0.2435, 0.2616],
        )
        assert (augmentation.crop_padding, augmentation.padding_mode, augmentation.flip) == (
            4,
            "zeros",
            True,
        )
        assert (augmentation.cutout, augmentation.mixup_alpha) == (0, 0)
        assert config.arch.args.get("stem") in (None, "cifar")
        assert (config.adversarial_method, config.trainer.tensorboard) == ("none", True)


@pytest.mark.parametrize(
    ("grid", "batch", "epochs"), [("resnet", 128, 200), ("resnet_as_run", 512, 100)]
)
def test_both_grids_are_listed_and_shown(grid, batch, epochs, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for words, lines in (
        (["--list"], 8),
        (["--all", "--dry-run", "--seed", "42"], 8),
        (["--all", "--dry-run"], 24),
    ):
        file = str(CONFIGS / "ablations" / f"{grid}.json")
        monkeypatch.setattr("sys.argv", ["run_ablations.py", "--grid", file, *words])
        run_ablations.main()
        printed = capsys.readouterr().out.splitlines()
        assert len(printed) == lines
        if words == ["--list"]:
            settings = (
                f"data_loader.args.batch_size={batch}",
                f"({epochs} epochs",
                "optimizer.args.lr=0.1",
            )
            assert all(setting in printed[0] for setting in settings)
            assert "lr_scheduler.args.milestones=[100, 150]" in printed[0]
        else:
            assert all(line.startswith("python train.py -c ") for line in printed)


def test_differences_have_a_table_for_each_study():
    text = (ROOT / "docs" / "differences.md").read_text()
    sections = dict(re.findall(r"^## (.+)\n((?:(?!## ).*\n)*)", text, re.MULTILINE))
    for study in ("ConvNorm", "BatchNorm against GroupNorm", "ResNet ablations"):
        assert re.search(r"^\| \w+ \| here \|$", sections[study], re.MULTILINE), study
    assert "(docs/differences.md)" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", PRESETS)
def test_preset_files_are_the_grids_variants(name):
    (run,) = plan(CONFIGS / "ablations" / "resnet.json", [name], [0])
    assert load_config(CONFIGS / "resnet_ablation" / f"{name}.json") == run.config


def initial_network(config, classes=10):
    """Return the network of a config with its initial weights."""
    arch = config.arch.model_dump(exclude_none=True)
    arch["args"]["num_classes"] = classes
    return build_model(arch)


def check_comparison(config):
    """Check what all adversarial runs of the BatchNorm and GroupNorm study have in common."""
    args, augmentation = config.data_loader.args, config.augmentation
    assert (args.batch_size, args.mean, args.std) == (
        128,
        [0.4914, 0.4822, 0.4465],
        [0.2471, 0.2435, 0.2616],
    )
    assert (augmentation.crop_padding, augmentation.padding_mode, augmentation.flip) == (
        4,
        "reflect",
        True,
    )
    assert (augmentation.cutout_inside, augmentation.cutout_fill) == (True, "black")
    assert (config.system.precision, config.trainer.epochs) == ("fp32", 200)
    assert (
        config.optimizer.type,
        config.optimizer.args["lr"],
        config.optimizer.args["momentum"],
    ) == ("SGD", 0.1, 0.9)
    scheduler = config.lr_scheduler
    assert (scheduler.type, scheduler.args) == (
        "MultiStepLR",
        {"milestones": [100, 150], "gamma": 0.1},
    )
    assert config.arch.args.get("norm_groups") in (None, 32)
    adversarial, attack = config.adversarial, config.pgd_attack
    assert (adversarial.norm, config.attack_epsilon, adversarial.steps) == ("linf", 8, 10)
    assert (adversarial.restarts, adversarial.random_start, config.attack_bn_mode or "train") == (
        1,
        True,
        "train",
    )
    assert (attack.K, attack.restarts, attack.loss) == (10, 1, "ce")


def test_the_comparisons_grid():
    runs = plan(CONFIGS / "ablations" / "batch_vs_group.json", seeds=[0])
    published = [run for run in runs if not run.variant.endswith("_recipe")]
    assert len(published) == 16
    for run in published:
        config = run.config
        check_comparison(config)
        standard = run.variant.endswith("_standard")
        attacked = run.variant.endswith("_PGD")
        assert config.optimizer.args["weight_decay"] == (1e-4 if standard else 5e-4), run.variant
        assert config.adversarial_method == ("pgd" if attacked else "none"), run.variant
        assert config.trainer.monitor == ("max val_robust_top1" if attacked else "max val_top1"), (
            run.variant
        )
        assert config.arch.args.norm_layer_type == ("gn" if "GroupNorm" in run.variant else "bn")
        wide = run.variant.startswith("WRN")
        assert (config.arch.args.init, config.arch.args.zero_init_residual) == (
            "he" if wide else "he_zero_gn",
            None,
        )
        assert config.augmentation.cutout == (8 if run.variant.endswith("_cutout") else 0)


def mapped_commands():
    """Return command of a published study -> this project's command, from README's table."""
    rows = re.findall(
        r"^\| `([^`]+)`[^|]*\| `python ([^`]+)`",
        (ROOT / "docs" / "migration.md").read_text(),
        re.MULTILINE,
    )
    return dict(rows)


def config_of_command(words):
    arguments = config_parser("").parse_args(shlex.split(words)[1:])
    return load_config(ROOT / arguments.config, config_overrides(arguments))


def test_readmes_commands_do_what_the_studies_commands_do():
    commands = mapped_commands()
    standard = config_of_command(commands["train.py --model resnet50"])
    assert (standard.arch.type, standard.arch.args.norm_layer_type) == ("resnet50", "gn")
    assert (standard.optimizer.args["weight_decay"], standard.adversarial_method) == (1e-4, "none")
    assert (standard.data_loader.args.std, standard.augmentation.padding_mode) == (
        [0.2023, 0.1994, 0.2010],
        "zeros",
    )
    robust = config_of_command(
        commands["train_adv.py --model resnet50 --model-norm groupnorm --attack pgd --epsilon 8"]
    )
    check_comparison(robust)
    assert (robust.arch.type, robust.arch.args.norm_layer_type) == ("resnet50", "gn")
    assert (robust.optimizer.args["weight_decay"], robust.adversarial_method) == (5e-4, "pgd")
    assert robust.trainer.monitor == "max val_robust_top1"
    wide = config_of_command(
        commands[
            "train_adv.py --model WideResNet34x10 --model-norm groupnorm --attack pgd --epsilon 8"
        ]
    )
    check_comparison(wide)
    assert (wide.arch.type, wide.arch.args.init) == ("wide_resnet34_10", "he")
    cosine = config_of_command(
        commands["train_cifar.py --model resnet18 --lr-schedule cosine --epochs 200 --seed 42"]
    )
    assert (values_of(cosine), cosine.seed) == (BY_PAGE["cosine_schedule"], 42)
    assert (
        values_of(config_of_command(commands["train_cifar.py --no-normalize --lr 0.01"]))
        == BY_PAGE["no_batchnorm"]
    )


@pytest.mark.parametrize(
    ("attack", "epsilon", "training_step", "validation_step"),
    [
        ("--attack pgd --epsilon 8", 8, 2, 2),
        ("--attack fgsm --epsilon 8", 8, 10, 2),
        ("--attack pgd --norm l_2 --epsilon 128 --pgd-alpha 15", 128, 15, 15),
    ],
)
def test_the_comparisons_attacks_take_the_studys_steps(
    tmp_path, attack, epsilon, training_step, validation_step
):
    """All sizes of the study are in 1/255, also under l2."""
    words = mapped_commands()[f"train_adv.py --model resnet50 --model-norm groupnorm {attack}"]
    small = "--set arch.type=simpleCNN --set data_loader.type=DigitsDataLoader"
    trainer = Experiment.from_config(config_of_command(f"{words} {small}")).build_trainer(tmp_path)
    assert isinstance(trainer, AdversarialTrainer)
    sizes = [epsilon / 255, training_step / 255]
    assert [trainer.attack.epsilon, trainer.attack.step_size] == pytest.approx(sizes, rel=1e-12)
    measured = build_attack(trainer.config, 10)
    assert isinstance(measured, PGD)
    sizes = [epsilon / 255, validation_step / 255]
    assert [measured.epsilon, measured.step_size] == pytest.approx(sizes, rel=1e-12)
    assert measured.steps == 10


@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_the_comparisons_networks_start_with_the_studys_weights(norm):
    overrides: list[Override] = [("arch.args.norm_layer_type", norm)]
    model = initial_network(load_config(CONFIGS / "norm_comparison.json", overrides), classes=12)
    ends = [block.norm3.weight for block in model.modules() if hasattr(block, "norm3")]
    assert len(ends) == 16
    assert set(torch.cat(ends).tolist()) == ({0.0} if norm == "gn" else {1.0})
    kernel = model.layer3[2].conv1.weight  # 1x1, to 256 channels
    assert kernel.shape == (256, 1024, 1, 1)
    assert kernel.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.01)


def test_other_configs_keep_their_meaning():
    config = load_config(CONFIGS / "small_wide_resnet.json")
    assert (
        config.arch.args.init,
        config.data_loader.args.std,
        config.augmentation.padding_mode,
    ) == (None, None, "zeros")
    tree = json.loads((CONFIGS / "small_wide_resnet.json").read_text())
    assert tree["extends"] == "cifar10.json", "it is not a part of the study"
