"""Warnings about a valid config: keys without effect, no normalization, two norms in a row."""

import json
from contextlib import suppress
from typing import get_args

import pytest
from pydantic import ValidationError

from base.config import Config, load_config, validate
from base.config.adversarial import AdversarialConfig
from base.config.config import LAYER_CHOICES
from base.config.nearest_key import dotted_keys
from base.config.section import Needs
from base.config.tree import section_at

DIGITS = {"data_loader": {"type": "DigitsDataLoader"}}
CONV_NORM = {"conv_layer_type": "prec_conv", "norm_layer_type": "no"}

WITHOUT_EFFECT = {
    "augmentation.padding_mode": ("reflect", {"augmentation.crop_padding": 0}, {}),
    "augmentation.cutout_inside": (True, {}, {"augmentation.cutout": 5}),
    "augmentation.cutout_fill": ("black", {}, {"augmentation.cutout": 5}),
    "system.sync_bn": (
        True,
        {"arch.args.norm_layer_type": "in"},
        {"arch.args.norm_layer_type": "bn"},
    ),
    "lr_scheduler.args": (
        {"gamma": 0.9},
        {"lr_scheduler.type": "none"},
        {"lr_scheduler.type": "ExponentialLR"},
    ),
    "lr_scheduler.interval": (
        "batch",
        {"lr_scheduler.type": "none"},
        {"lr_scheduler.type": "PolynomialLR"},
    ),
    "lr_scheduler.monitor": (
        "loss",
        {"lr_scheduler.type": "PolynomialLR"},
        {"lr_scheduler.type": "ReduceLROnPlateau"},
    ),
    "trainer.early_stop": (3, {"trainer.monitor": "off"}, {"trainer.monitor": "min loss"}),
    "trainer.sym": (True, {}, {"trainer.percent": 0.1}),
    "trainer.asym": (True, {}, {"trainer.percent": 0.1}),
    "trainer.noise_law": (
        "exclusive",
        {"trainer.asym": True, "trainer.percent": 0.1},
        {"trainer.sym": True, "trainer.percent": 0.1},
    ),
    "trainer.noisy_validation": (False, {}, {"trainer.noise_file": "noise.npy"}),
    "trainer.lamb_ocnn": (0.1, {}, {"trainer.OCNN": True}),
    "trainer.fgsm_step": (4, {"adversarial.method": "fgsm"}, {"adversarial.method": "free"}),
    "trainer.adv_clip_eps": (4, {"adversarial.epsilon": 8}, {}),
    "trainer.adv_repeats": (3, {"adversarial.method": "pgd"}, {"trainer.do_adv": True}),
    "adversarial.step_size": (2, {}, {"adversarial.method": "fgsm"}),
    "adversarial.steps": (7, {"adversarial.method": "fgsm"}, {"adversarial.method": "trades"}),
    "adversarial.restarts": (2, {"adversarial.method": "trades"}, {"adversarial.method": "pgd"}),
    "adversarial.random_start": (
        False,
        {"adversarial.method": "free"},
        {"adversarial.method": "fgsm"},
    ),
    "adversarial.warmup_epochs": (5, {"adversarial.method": "none"}, {"adversarial.method": "pgd"}),
    "adversarial.bn_mode": ("eval", {}, {"adversarial.method": "trades"}),
    "adversarial.noise": ("carry", {"adversarial.method": "pgd"}, {"adversarial.method": "free"}),
    "adversarial.beta": (3, {"adversarial.method": "pgd"}, {"adversarial.method": "trades"}),
    "adversarial.clean_passes": (
        2,
        {"adversarial.method": "free"},
        {"adversarial.method": "trades"},
    ),
    "adversarial.validate_images": (50, {}, {"adversarial.validate_every": 2}),
    "adversarial.report_images": (50, {}, {"adversarial.report": True}),
    "pgd_attack.K": (7, {"pgd_attack.type": "fgsm"}, {"pgd_attack.type": "pgd"}),
    "pgd_attack.step": (2.5, {"pgd_attack.type": "apgd"}, {"pgd_attack.type": "pgd"}),
    "pgd_attack.restarts": (3, {"pgd_attack.type": "fgsm"}, {"pgd_attack.type": "apgd"}),
    "pgd_attack.loss": ("dlr", {"pgd_attack.type": "autoattack"}, {"pgd_attack.type": "fgsm"}),
    "pgd_attack.early_stop": (0, {"pgd_attack.type": "square"}, {"pgd_attack.type": "fgsm"}),
}
"""Key -> a value, settings with which it has no effect, settings with which it has an effect."""


def tree(*parts):
    whole = json.loads(json.dumps(DIGITS))
    for key, value in (item for part in parts for item in part.items()):
        *sections, name = key.split(".")
        place = whole
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return whole


def test_the_cases_cover_every_key_that_has_a_condition():
    def needs(key):
        *section, name = key.split(".")
        return any(
            isinstance(item, Needs) for item in section_at(section).known_fields()[name].metadata
        )

    arguments = {
        f"adversarial.{key}" for choice in AdversarialConfig.choices for key in choice.known_keys()
    }
    assert {key for key in dotted_keys(Config) if needs(key)} | arguments == WITHOUT_EFFECT.keys()


@pytest.mark.parametrize("key", WITHOUT_EFFECT)
def test_a_key_without_effect_is_named_and_one_with_effect_is_not(key):
    value, without, having = WITHOUT_EFFECT[key]
    (warning,) = validate(tree(without, {key: value})).warnings
    assert warning.startswith(f"without effect in this run: {key} ")
    assert " (only with " in warning
    assert "," not in warning.replace(json.dumps(value), "")
    assert validate(tree(having, {key: value})).warnings == ()
    default = validate(tree(without)).model_dump()
    for name in key.split("."):
        default = default.get(name)
    assert validate(tree(without, {key: default})).warnings == (), "a default never warns"
    for quiet in (True, key, [key], [key.partition(".")[0]]):
        assert validate(tree(without, {key: value, "_unused_ok": quiet})).warnings == ()
    assert (
        len(validate(tree(without, {key: value, "_unused_ok": ["seed", f"{key}x", 3]})).warnings)
        == 1
    )


OF_LAYERS = [
    (choice, name, key)
    for choice in LAYER_CHOICES
    for name in choice.table
    for key in choice.arguments(name)
]


def another_value(argument):
    """A value of an argument's type that is not its default."""
    candidates = (True, False, 2, 0.5, *get_args(argument.field.annotation))
    for value in candidates:
        with suppress(ValidationError):
            checked = argument.adapter.validate_python(value)
            if checked != argument.field.default:
                return checked
    raise AssertionError(f"{argument.key}: no other value was found")


@pytest.mark.parametrize(
    ("choice", "name", "key"), OF_LAYERS, ids=[f"{name}-{key}" for _, name, key in OF_LAYERS]
)
def test_an_argument_that_no_chosen_layer_takes_is_without_effect(choice, name, key):
    argument, place = choice.arguments(name)[key], f"arch.args.{key}"
    value = another_value(argument)
    chosen = validate(tree({choice.key: name, place: value}))
    assert chosen.arch.args.get(key) == value
    assert not any("without effect" in warning for warning in chosen.warnings)
    (warning,) = validate(tree({place: value})).warnings
    owners = " or ".join(other for other in choice.table if key in choice.arguments(other))
    assert warning.startswith(
        f"without effect in this run: {place} {json.dumps(value)} (only with {choice.key} "
    )
    assert owners in warning
    if argument.field.default is not None:
        assert validate(tree({place: argument.field.default})).warnings == (), (
            "a default never warns"
        )
    assert validate(tree({place: None})).warnings == ()


def test_several_unused_keys_are_one_warning_and_the_comment_key_is_inherited(tmp_path):
    values = {
        key: WITHOUT_EFFECT[key][0]
        for key in ("adversarial.beta", "trainer.adv_repeats", "trainer.lamb_ocnn")
    }
    (tmp_path / "parent.json").write_text(json.dumps(tree(values)))
    (tmp_path / "child.json").write_text(
        '{"extends": "parent.json", "_unused_ok": ["trainer.lamb_ocnn"]}'
    )
    (tmp_path / "grandchild.json").write_text('{"extends": "child.json"}')
    (warning,) = load_config(tmp_path / "parent.json").warnings
    assert all(f" {key} " in warning for key in values)
    for name in ("child", "grandchild"):
        (warning,) = load_config(tmp_path / f"{name}.json").warnings
        assert "trainer.adv_repeats 3" in warning
        assert "lamb_ocnn" not in warning
    assert load_config(tmp_path / "parent.json", [("_unused_ok", "true")]).warnings == ()


TWICE, NEVER = "normalizes twice in a row", "without any normalization"


@pytest.mark.parametrize(
    ("files", "flags", "message"),
    [
        (CONV_NORM, {"conv_layer_type": "conv"}, NEVER),
        (CONV_NORM, {"norm_layer_type": "bn"}, TWICE),
        (CONV_NORM, {"norm_layer_type": "gn"}, TWICE),
        (CONV_NORM, {"conv_layer_type": "conv_norm"}, None),
        (CONV_NORM, {"conv_layer_type": "conv", "norm_layer_type": "bn"}, None),
        (CONV_NORM, {"conv_layer_type": "conv", "norm_layer_type": "no"}, None),
        (CONV_NORM, {"norm_layer_type": "no"}, None),
        (CONV_NORM, {"conv_layer_type": "oni_conv"}, None),
        ({}, {}, None),
        ({}, {"norm_layer_type": "no"}, NEVER),
        ({}, {"conv_layer_type": "prec_conv"}, TWICE),
        ({"norm_layer_type": "no"}, {}, NEVER),
        ({"conv_layer_type": "conv_norm"}, {}, TWICE),
        ({"conv_layer_type": "sn_conv"}, {}, None),
        ({"conv_layer_type": "conv", "norm_layer_type": "no"}, {}, None),
        ({"conv_layer_type": "conv", "norm_layer_type": "no"}, {"stem": "imagenet"}, None),
        ({"conv_layer_type": "prec_conv", "norm_layer_type": "in"}, {}, None),
    ],
)
def test_no_norm_or_two_norms_is_a_warning_unless_the_files_name_both_layers(
    tmp_path, files, flags, message
):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**DIGITS, "arch": {"args": files}}))
    warnings = load_config(
        file, [(f"arch.args.{name}", value) for name, value in flags.items()]
    ).warnings
    assert [message in warning for warning in warnings] == [True] * (message is not None)
    whole = load_config(file, [("arch.args", json.dumps(flags))] if flags else []).warnings
    assert whole == warnings


def test_a_pair_of_layers_that_parent_and_child_name_together_is_intended(tmp_path):
    (tmp_path / "parent.json").write_text(
        json.dumps({**DIGITS, "arch": {"args": {"conv_layer_type": "conv"}}})
    )
    (tmp_path / "child.json").write_text(
        '{"extends": "parent.json", "arch": {"args": {"norm_layer_type": "no"}}}'
    )
    assert load_config(tmp_path / "child.json").warnings == ()
