"""Hints at the right key for misspelt keys, names of other projects and keys in a wrong section."""

import pytest

from base.config import Config, validate
from base.config.nearest_key import OTHER_PROJECTS, dotted_keys, nearest_key
from base.config.tree import section_at
from base.errors import ConfigError
from base.registry import _edit_distance, nearest_name

KEYS = sorted(dotted_keys(Config))
DIGITS = {"data_loader": {"type": "DigitsDataLoader"}}


def key_for(key):
    *section, _ = path = key.split(".")
    return nearest_key(path, list(section_at(section).known_fields()))


def misspellings(name):
    """One letter lost, doubled, wrong, or swapped with its neighbor; another case; without
    underscores."""
    for place in range(len(name)):
        yield name[:place] + name[place + 1 :]
        yield name[:place] + name[place] + name[place:]
        yield name[:place] + "q" + name[place + 1 :]
        yield name[:place] + name[place : place + 2][::-1] + name[place + 2 :]
    yield name.upper()
    yield name.replace("_", "").title()


def test_every_misspelling_of_every_key_finds_it():
    count = 0
    for key in KEYS:
        section, _, name = key.rpartition(".")
        known = list(section_at(section.split(".") if section else []).known_fields())
        for wrong in set(misspellings(name)) - set(known):
            # One letter of two is not enough evidence; and a misspelling that is another project's
            # name has a meaning of its own
            if len(name) > 2 and wrong not in OTHER_PROJECTS:
                found = key_for(f"{section}.{wrong}" if section else wrong)
                # ipn_memory is one letter from in_memory and from pin_memory
                assert found == name or (
                    found in known and _edit_distance(wrong.casefold(), found) <= 1
                ), f"{section}: {wrong}"
                count += 1
    assert count > 2000


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("loss", "train_loss"), ("trainer.loss", "train_loss"),
        ("trainer.len_epoch", "data_loader.args.num_batches"),
        ("trainer.grad_clip", None), ("grad_clip", None), ("optimizer.grad_clip", None),
        ("trainer.gradient_clipping", None), ("trainer.warmup_epochs", "lr_scheduler"),
        ("trainer.label_smoothing", None),
        ("trainer.num_epochs", "epochs"), ("trainer.n_epochs", "epochs"),
        ("epochs", "trainer.epochs"),
        ("num_epochs", None), ("batch_size", "data_loader.args.batch_size"),
        ("trainer.batchsize", None),
        ("data_loader.batch_size", "data_loader.args.batch_size"),
        ("arch.num_classes", "arch.args.num_classes"),
        ("model", "arch"), ("optimizer.lr", "optimizer.args.lr"),
        ("trainer.lr", "optimizer.args.lr"),
        ("monitor", "trainer.monitor"), ("trainer.ema", "ema_decay"),
        ("arch.args.norm_layer", "norm_layer_type"),
        ("arch.args.norm", None), ("arch.args.conv", "conv_layer_type"), ("pgd_attack.steps", "K"),
        ("pgd_attack.norm", "adversarial.norm"), ("adversarial.eps", "epsilon"),
        ("adversarial.K", "pgd_attack.K"),
        ("pgd_attack.depth", None), ("adversarial.repeats", None),
        ("adversarial.adv_repeats", "trainer.adv_repeats"),
        ("trainer.steps", None), ("data_loader.args.beta", None), ("trainer.x", None),
        ("system.amp", "precision"),
        ("augmentation.mixup", "mixup_alpha"), ("augmentation.cutmix_alpha", None),
        ("model_name", "arch.type"), ("arch.name", None), ("adversarial.name", None),
        ("pgd_attack.warmup_epochs", "adversarial.warmup_epochs"),
        ("adversarial.loss", "pgd_attack.loss"), ("lr_scheduler.warmup_epochs", None),
        ("arch.model", None), ("train", "trainer"),
    ],
)  # fmt: skip
def test_names_of_other_projects_and_places(wrong, meant):
    assert key_for(wrong) == meant


def test_every_name_of_another_project_leads_to_an_existing_key():
    for name, meant in OTHER_PROJECTS.items():
        *section, last = meant.split(".")
        found = section_at(section)
        assert found is None or last in found.known_fields(), f"{name}: {meant}"
        if found is None:
            assert section in (["optimizer", "args"], ["lr_scheduler", "args"])


def test_arguments_outside_of_args_get_a_hint():
    for tree, meant in (
        ({"optimizer": {"type": "Adam", "betas": [0.9, 0.99]}}, "optimizer.args.betas"),
        (
            {"lr_scheduler": {"type": "ReduceLROnPlateau", "patience": 3}},
            "lr_scheduler.args.patience",
        ),
        ({"lr_scheduler": {"type": "StepLR", "step_size": 3}}, "lr_scheduler.args.step_size"),
    ):
        with pytest.raises(ConfigError, match=f"did you mean '{meant}'"):
            validate(DIGITS | tree)


@pytest.mark.parametrize(
    ("name", "known", "nearest"),
    [
        ("SDG", ["SGD", "Adam", "ASGD"], "SGD"),
        ("resnet81", ["resnet18", "vgg11"], "resnet18"),
        ("bnn", ["bn", "gn", "in", "no"], "bn"),
        ("bm", ["bn", "gn", "in", "no"], None),
        ("x", ["K", "step"], None),
        ("", ["K", "step"], None),
        ("_", ["K", "step"], None),
        ("len_epoch", ["epochs", "save_period"], None),
        ("val", ["val_loss", "val_top1"], None),
        ("a" * 10_000, ["a" * 3, "b"], None),
    ],
)
def test_nearest_name(name, known, nearest):
    assert nearest_name(name, known) == nearest
