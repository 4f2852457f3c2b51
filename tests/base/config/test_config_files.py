"""Config files: inheritance, comments, overrides, and one clear line for every mistake in them."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from base import registry
from base.config import Config, load_config, validate
from base.config.files import override
from base.config.json_schema import choices, readme_with_choices, reference, schema
from base.config.strict_json import MAX_DEPTH, parse_json, read_json_object
from base.config.tree import merge
from base.errors import ConfigError

DIGITS = {"data_loader": {"type": "DigitsDataLoader"}}
CONFIGS = Path(__file__).parents[3] / "configs"


def write(path, tree):
    path.write_text(json.dumps(tree) if isinstance(tree, dict) else tree)
    return path


def published_style(**trainer):
    """A config with the keys and placeholders of ConvNorm's published files."""
    return {
        "name": "robust_training",
        "n_gpu": 1,
        "seed": 8,
        "comet": {"api": "**comet key**", "offline": True},
        "arch": {
            "type": "resnet18",
            "args": {
                "num_classes": 10, "norm_layer_type": "bn", "conv_layer_type": "conv",
                "linear_layer_type": "linear", "activation_layer_type": "relu",
            },
        },
        "num_classes": 10,
        "data_loader": {
            "type": "CIFAR10DataLoader",
            "args": {
                "data_dir": "**data dir**", "batch_size": 128, "shuffle": True, "num_batches": 0,
                "validation_split": 0, "num_workers": 4, "pin_memory": True,
            },
        },
        "optimizer": {"type": "SGD", "args": {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}},
        "train_loss": "cross_entropy",
        "val_loss": "cross_entropy",
        "metrics": ["my_metric", "my_metric2"],
        "lr_scheduler": {"type": "MultiStepLR", "args": {"milestones": [10, 20], "gamma": 0.1}},
        "trainer": {
            "epochs": 30, "save_dir": "saved/", "save_period": 1, "verbosity": 2,
            "label_dir": "saved/",
            "monitor": "max val_my_metric", "early_stop": 2000, "_percent": "Percentage of noise",
            "percent": 0.0,
            "_subset_percent": "Percentage of training data to use", "subset_percent": 1.0,
            "asym": False, "sym": False,
            "OCNN": False, "lamb_ocnn": 0.001, "do_adv": True, "fgsm_step": 8, "adv_clip_eps": 8,
            "adv_repeats": 4, **trainer,
        },
        "pgd_attack": {"K": 10, "step": 2},
    }  # fmt: skip


def test_published_config_is_valid_once_its_data_dir_is_set(tmp_path):
    file = write(tmp_path / "config.json", published_style())
    with pytest.raises(
        ConfigError,
        match=r"data_dir: '\*\*data dir\*\*' is the published config's placeholder: put",
    ):
        load_config(file)
    config = load_config(file, [("data_loader.args.data_dir", "images")])
    assert config.trainer.monitor == "max val_top1"
    assert config.metrics == ["top1", "top5"]
    assert config.comet is not None
    assert config.comet.api is None


def test_resolved_config_reads_back_the_same_and_holds_no_secret():
    config = validate(
        published_style() | {"data_loader": DIGITS["data_loader"], "comet": {"api": "secret-key"}}
    )
    assert config.comet.api == "secret-key"
    assert "secret-key" not in json.dumps(config.dump())
    assert "secret-key" not in repr(config)
    read_back = validate(json.loads(json.dumps(config.dump())))
    assert read_back.dump() == config.dump()


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {"lr_schedulr": None},
            r"lr_schedulr: unknown key; did you mean 'lr_scheduler'\? .known here: name, seed",
        ),
        (
            {"trainer": {"epoch": None}},
            r"trainer.epoch: unknown key; did you mean 'epochs'\? .known here: epochs, ",
        ),
        ({"trainer": {"xyz": None}}, "trainer.xyz: unknown key .known here: epochs, "),
        (
            {"optimizer": {"args": {"momentun": None}}},
            r"optimizer.args.momentun: unknown key; did you mean 'momentum'\?",
        ),
        ({"trainr": {"epochs": None}}, r"trainr: unknown key; did you mean 'trainer'\?"),
    ],
)
def test_null_for_a_misspelt_key_is_an_error(tmp_path, tree, message):
    parent = {
        **DIGITS,
        "lr_scheduler": {"type": "ExponentialLR", "args": {"gamma": 0.9}},
        "optimizer": {"args": {"momentum": 0.9}},
    }
    write(tmp_path / "parent.json", parent)
    with pytest.raises(ConfigError, match=f"child.json: {message}"):
        load_config(write(tmp_path / "child.json", {"extends": "parent.json", **tree}))
    key, below = next(iter(tree.items()))
    dotted = ".".join(
        [key, *([] if below is None else below), *(["momentun"] if key == "optimizer" else [])]
    )
    with pytest.raises(ConfigError, match=message):
        validate(override(parent, [(dotted, "null")]), "child.json")


def test_null_for_a_key_that_is_not_given_is_harmless(tmp_path):
    nulls = {
        "_note": None,
        "$schema": None,
        "comet": None,
        "optimizer": {"args": {"foreach": None}},
        "system": {"device": None},
    }
    write(tmp_path / "parent.json", {**DIGITS, **nulls})
    child = write(tmp_path / "child.json", {"extends": "parent.json", **nulls})
    assert load_config(child) == validate({**DIGITS, "optimizer": {"args": {}}})


KEY = "sEcReT-Comet-kEy"


def wrong_places_for_the_key():
    """Config trees, texts of config files and settings with the Comet key in a wrong place."""
    trees = [
        {"comet": KEY},
        {"comet": [KEY]},
        {"comet": {"api": [KEY]}},
        {"comet": {"api": {"key": KEY}}},
        {"comet": {"apii": KEY}},
        {"comet": {"apii": {"api": KEY}}},
        {"comet": {"api": KEY, "offline": "yes"}},
        {"comet": {"api": KEY, "offline": KEY}},
        {"comet": {"offline": KEY}},
        {"comet": {"offline": [KEY]}},
        {"comet": {"project": {"name": KEY}}},
        {"comet": {"workspace": [KEY]}},
        {"comet": {"api": KEY}, "seed": -1},
        {"comet": {"api": KEY}, "trainer": {"monitor": "x"}},
        {"Comet": {"api": KEY}},
        {"comet_api": KEY},
        {"api": KEY},
        {"arch": {"type": {"comet": {"api": KEY}}}},
        {"arch": [{"comet": {"api": KEY}}]},
        {"seed": {"comet": {"api": KEY}}},
        {"data_loader": {"type": "DigitsDataLoader", "args": {"comet": {"api": KEY}}}},
    ]
    texts = [
        f'{{"comet": {{"api": "{KEY}" "offline": true}}}}',
        f'{{"comet": {{"api": "{KEY}", "api": "{KEY}"}}}}',
        f'{{"comet": {{"api": "{KEY}\n"}}}}',
        f'{{"comet": {{"api": {KEY}}}}}',
        f'{{"comet": {{"api": "{KEY}\\ud800"}}}}',
        f'{{"comet": {{"api": "\\{KEY}"}}}}',
        f'{{"extends": {{"comet": "{KEY}"}}}}',
        f'{{"comet": "{KEY}',
    ]
    settings = [
        ("comet", KEY),
        ("comet", f'["{KEY}"]'),
        ("comet.api", f"{KEY}\udcff"),
        ("comet.api.key", KEY),
        ("comet.offline", KEY),
        ("comet.project", f"{KEY}\ud800"),
        ("comet.apii", KEY),
        ("comet..api", KEY),
        ("comet", f'{{"api": "{KEY}", "api": "{KEY}"}}'),
        ("comet", f'{{"api": "{KEY}", "offline": NaN}}'),
        ("comet", f'{{"api": ["{KEY}"]}}'),
    ]
    return trees, texts, settings


def test_no_message_prints_the_comet_key(tmp_path):
    trees, texts, settings = wrong_places_for_the_key()
    refused = []
    for tree in trees:
        with pytest.raises(ConfigError) as caught:
            load_config(write(tmp_path / "config.json", {**DIGITS, **tree}))
        refused.append(str(caught.value))
    for text in texts:
        with pytest.raises(ConfigError) as caught:
            load_config(write(tmp_path / "config.json", text))
        refused.append(str(caught.value))
    for setting in settings:
        with pytest.raises(ConfigError) as caught:
            load_config(write(tmp_path / "config.json", DIGITS), [setting])
        refused.append(str(caught.value))
    assert [message for message in refused if KEY in message or "\n" in message] == []
    assert len(refused) == 40
    assert "comet.api: Input should be a valid string (the value is not shown)" in refused[2]
    assert "comet.apii: unknown key; did you mean 'api'?" in refused[4]


def test_comet_key_of_another_type_is_not_shown_and_numbers_are_text_on_the_command_line(tmp_path):
    with pytest.raises(ConfigError, match=r"comet.api: .* \(the value is not shown\)$") as caught:
        validate({**DIGITS, "comet": {"api": 123454321}})
    assert "123454321" not in str(caught.value)
    assert validate(override(DIGITS, [("comet.api", "123454321")])).comet.api == "123454321"


def test_child_wins_null_deletes_and_comments_vanish(tmp_path):
    write(
        tmp_path / "grandparent.json",
        {**DIGITS, "seed": 1, "trainer": {"epochs": 7, "early_stop": 3, "save_period": 2}},
    )
    (tmp_path / "below").mkdir()
    write(
        tmp_path / "below" / "parent.json",
        {"extends": "../grandparent.json", "trainer": {"epochs": 8}},
    )
    child = write(
        tmp_path / "child.json",
        {
            "extends": "below/parent.json",
            "_note": "x",
            "trainer": {"_note": {"a": 1}, "early_stop": None},
            "seed": None,
        },
    )
    config = load_config(child)
    assert config.trainer.epochs == 8
    assert config.trainer.save_period == 2
    assert config.trainer.early_stop is None
    assert config.seed == Config.model_fields["seed"].default


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        # A string field keeps the text
        (("name", "12"), "12"),
        (("seed", "12"), 12),
        (("trainer.sym", "True"), True),
        (("trainer.sym", "false"), False),
        (("optimizer.args.lr", "1e-3"), 1e-3),
        (("lr_scheduler.args.milestones", "[1, 2]"), [1, 2]),
        (("trainer.monitor", "min val_loss"), "min val_loss"),
        (
            ("optimizer", '{"type": "SGD", "args": {"lr": 0.05}}'),
            {"type": "SGD", "args": {"lr": 0.05}},
        ),
        (("lr_scheduler.args", '{"gamma": 0.5}'), {"gamma": 0.5}),
        (("system.num_threads", "2"), 2),
    ],
)
def test_override_is_typed_by_its_field(setting, expected):
    value = validate(
        override({**DIGITS, "lr_scheduler": {"type": "StepLR"}}, [setting])
    ).model_dump()
    for key in setting[0].split("."):
        value = value[key]
    assert value == expected
    assert type(value) is type(expected)


def test_later_override_wins_and_null_restores_the_default():
    tree = override(
        DIGITS, [("trainer.epochs", "3"), ("trainer.epochs", "4"), ("seed", "5"), ("seed", "null")]
    )
    config = validate(tree)
    assert (config.trainer.epochs, config.seed) == (4, 0)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("trainer.epoch", 3, r"trainer.epoch: unknown key; did you mean 'epochs'\?"),
        ("optimiser", {}, r"optimiser: unknown key; did you mean 'optimizer'\?"),
        ("trainer.epochs", "ten", 'trainer.epochs: .*integer, not "ten"'),
        ("trainer.epochs", 1.5, "trainer.epochs: .*integer, not 1.5"),
        ("trainer.epochs", True, "trainer.epochs: .*integer, not true"),
        ("trainer.epochs", 0, "trainer.epochs: .*greater than or equal to 1, not 0"),
        ("trainer.subset_percent", 0, "trainer.subset_percent: .*greater than 0, not 0"),
        (
            "arch.args.conv_layer_type",
            "prec_cnov",
            r"'prec_cnov' is not one of: conv, prec_conv.*did you mean 'prec_conv'\?",
        ),
        (
            "arch.type",
            "ResNet18",
            r"arch.type: 'ResNet18' is not one of: resnet18.*did you mean 'resnet18'\?",
        ),
        (
            "trainer.monitor",
            "max test_top1",
            "trainer.monitor: 'max test_top1' is neither 'off' nor .*never the test set",
        ),
        (
            "trainer.monitor",
            "max val_clean_top1",
            "'max val_clean_top1' is only logged where validation labels carry noise",
        ),
        (
            "lr_scheduler.monitor",
            "val_lss",
            "lr_scheduler.monitor: 'val_lss' is not a logged value: loss, top1",
        ),
        ("trainer.percent", 0.4, "trainer.percent: 0.4 has no effect: set sym or asym"),
        (
            "trainer",
            {"sym": True, "asym": True},
            "trainer.sym and asym: only one kind of label noise",
        ),
        ("trainer.noise_key", "worse_label", "trainer.noise_key: has no effect without noise_file"),
        (
            "trainer.monitor",
            "max val_ema_top1",
            "'max val_ema_top1' is only logged with trainer.ema_decay",
        ),
        (
            "trainer.monitor",
            "max val_robust_top1",
            "'max val_robust_top1' is only logged with adversarial.validate_every above 0",
        ),
        (
            "trainer.monitor",
            "max robust_top1",
            "trainer.monitor: 'max robust_top1' is neither 'off' nor",
        ),
        (
            "trainer.adv_clip_eps",
            0.031,
            r"trainer.adv_clip_eps: 0.031 is in 1/255 .*write 7.91 for 0.031 of the pixel range",
        ),
        ("trainer.fgsm_step", 0.03, "trainer.fgsm_step: 0.03 is in 1/255"),
        ("adversarial.epsilon", 256, "adversarial.epsilon: .*less than or equal to 255, not 256"),
        (
            "adversarial",
            {"norm": "l2", "epsilon": 8},
            "adversarial.epsilon: 8 is in units of .*write 0.0314 for 8/255",
        ),
        (
            "adversarial",
            {"random_start": False, "restarts": 2},
            "adversarial.restarts: 2 without random_start are all the same",
        ),
        (
            "adversarial",
            {"norm": "l2", "step_size": 2},
            "adversarial.step_size: 2 is in units of .*write 0.00784 for 2/255",
        ),
        ("pgd_attack.step", 0.0078, "pgd_attack.step: 0.0078 is in 1/255"),
        (
            "adversarial",
            {"method": "free", "bn_mode": "eval"},
            "adversarial.bn_mode: 'eval' is not one of: train",
        ),
        ("num_classes", 5, None),
        ("data_loader.type", "CIFAR10DataLoader", "data_loader.args.data_dir: required"),
        (
            "data_loader.args.image_size",
            8,
            "data_loader.args.image_size: only ImageFolderDataLoader takes it",
        ),
        ("data_loader.args.mean", [], "data_loader.args.mean: .*at least 1 item"),
        (
            "name",
            "../elsewhere",
            "name: '../elsewhere' is not the name of a folder: expected 1 to 255 bytes without",
        ),
        (
            "lr_scheduler.args.step_size",
            3,
            "lr_scheduler.type: required where lr_scheduler.args is given",
        ),
        (
            "lr_scheduler.interval",
            "batch",
            "lr_scheduler.type: required where lr_scheduler.interval is given",
        ),
        ("name", "..", "name: '..' is not the name of a folder"),
        ("name", "", "name: '' is not the name of a folder"),
        ("name", "a\\b", "name: .* is not the name of a folder"),
        ("name", "a\nb", r"name: 'a\\nb' is not the name of a folder"),
        ("name", "a\u2028b", r"name: 'a\\u2028b' is not the name of a folder"),
        ("name", "a\0b", "name: contains a null byte: .a.*b"),
        ("name", "é" * 128, "name: 'é{80}' is not the name of a folder"),
        ("name", "a" * 300, "name: 'a{80}' is not the name of a folder"),
        ("name", "it's/", "name: .it's/. is not the name of a folder"),
        ("trainer.save_dir", "", "trainer.save_dir: String should have at least 1 character"),
        ("trainer.save_dir", "a\0b", "trainer.save_dir: contains a null byte"),
        ("data_loader.args.data_dir", "a\0b", "data_loader.args.data_dir: contains a null byte"),
        (
            "data_loader.args.data_dir",
            "",
            "data_loader.args.data_dir: String should have at least 1 character",
        ),
        (
            "trainer.noise_file",
            "~nobody-here/x",
            "trainer.noise_file: '~nobody-here/x': this machine has no such user",
        ),
        (
            "data_loader.args.data_dir",
            "~nobody-here",
            "data_loader.args.data_dir: '~nobody-here': this machine has no such user",
        ),
        ("trainer.noise_file", "a\0b", "trainer.noise_file: contains a null byte"),
        (
            "system.device",
            "gpu",
            "system.device: 'gpu' is not a device: expected auto, cpu, cuda, cuda:N or mps",
        ),
        ("system.device", "cuda:999", "system.device: 'cuda:999' is not a device"),
        (
            "system.num_threads",
            10**6,
            "system.num_threads: .*less than or equal to 1024, not 1000000",
        ),
        (
            "data_loader",
            {"type": "ImageFolderDataLoader", "args": {"data_dir": "x", "image_size": 10**6}},
            "data_loader.args.image_size: .*less than or equal to 8192, not 1000000",
        ),
        (
            "data_loader.args.batch_size",
            10**10,
            "data_loader.args.batch_size: .*less than or equal to 1000000000, not 1",
        ),
        (
            "data_loader.args.num_workers",
            10**6,
            "data_loader.args.num_workers: .*less than or equal to 1024",
        ),
        (
            "trainer.epochs",
            10**30,
            "trainer.epochs: .*less than or equal to 1000000000, not 10{30}",
        ),
        (
            "augmentation.mixup_alpha",
            1e308,
            "augmentation.mixup_alpha: .*less than or equal to 1000, not 1e.308",
        ),
        (
            "adversarial.epsilon",
            1e308,
            "adversarial.epsilon: .*less than or equal to 255, not 1e.308",
        ),
        ("trainer.fgsm_step", 1e308, "trainer.fgsm_step: .*less than or equal to 255"),
    ],
)
def test_bad_value_is_named_by_its_dotted_key(key, value, message):
    tree = DIGITS
    nested = value
    for name in reversed(key.split(".")):
        nested = {name: nested}
    if message is None:
        assert validate(merge(tree, nested)).num_classes == value
        return
    with pytest.raises(ConfigError, match=f"^here: .*{message}") as caught:
        validate(merge(tree, nested), "here")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tree", "key", "size"),
    [
        ({"adversarial": {"epsilon": "4/255"}}, "adversarial.epsilon", 4),
        ({"adversarial": {"epsilon": " 0.5 / 1 "}}, "adversarial.epsilon", 127.5),
        ({"adversarial": {"norm": "linf", "step_size": "2.5/255"}}, "adversarial.step_size", 2.5),
        ({"adversarial": {"norm": "l2", "epsilon": "128/255"}}, "adversarial.epsilon", 128 / 255),
        ({"adversarial": {"norm": "l2", "step_size": "16/255"}}, "adversarial.step_size", 16 / 255),
        ({"adversarial": {"norm": "l2"}, "pgd_attack": {"step": "8/64"}}, "pgd_attack.step", 0.125),
        ({"pgd_attack": {"step": "1/255"}}, "pgd_attack.step", 1),
        ({"trainer": {"adv_clip_eps": "6/255"}}, "trainer.adv_clip_eps", 6),
        ({"trainer": {"fgsm_step": "3/255"}}, "trainer.fgsm_step", 3),
    ],
)
def test_a_size_may_be_a_fraction_of_the_pixel_range(tree, key, size):
    config = validate(merge(DIGITS, tree))
    section, name = key.split(".")
    assert getattr(getattr(config, section), name) == size
    assert validate(config.dump()) == config
    overridden = override(merge(DIGITS, tree), [(key, tree[section][name])])
    assert validate(overridden) == config


@pytest.mark.parametrize(
    "text", ["8/0", "8/255px", "-8/255", "8/-255", "/255", "8/", "1e3/255", "eight"]
)
def test_a_malformed_fraction_is_an_error_that_shows_a_valid_one(text):
    expected = '^here: adversarial.epsilon: expected .* a fraction .* such as "8/255", not "'
    with pytest.raises(ConfigError, match=expected):
        validate(merge(DIGITS, {"adversarial": {"epsilon": text}}), "here")
    with pytest.raises(ConfigError, match="less than or equal to 255, not 256"):
        validate(merge(DIGITS, {"adversarial": {"epsilon": "256/255"}}))


@pytest.mark.parametrize(
    "name", ["a" * 255, "Опыт 1", "\U0001f469\u200d\U0001f52c", ". .", "a:b*c?", "x.y"]
)
def test_any_name_of_a_folder_is_a_name(name):
    assert validate({**DIGITS, "name": name}).name == name


def test_none_contradicts_the_original_switch_for_free_training():
    with pytest.raises(
        ConfigError, match=r"adversarial.method: none contradicts trainer.do_adv: true"
    ):
        validate({**DIGITS, "adversarial": {"method": "none"}, "trainer": {"do_adv": True}})


def test_a_method_that_attacks_nothing_contradicts_do_adv(monkeypatch):
    monkeypatch.setitem(registry.TRAINERS, "plain", registry.TRAINERS["none"])
    tree = {**DIGITS, "adversarial": {"method": "plain"}}
    assert not validate(tree).attacks_while_training
    with pytest.raises(
        ConfigError, match=r"adversarial.method: plain contradicts trainer.do_adv: true"
    ):
        validate({**tree, "trainer": {"do_adv": True}})


def test_two_places_for_num_classes_must_agree():
    with pytest.raises(ConfigError, match=r"num_classes: 5 contradicts arch.args.num_classes: 10"):
        validate({**DIGITS, "num_classes": 5, "arch": {"args": {"num_classes": 10}}})


DEEP = '{"a":' * 10_000


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ('{"seed": 1,\n "name" 2}', (2, 9), "not valid JSON: Expecting ':' delimiter"),
        ("", (1, 1), "empty: expected a JSON object"),
        (" \n\n", (3, 1), "empty: expected a JSON object"),
        ("\f{}", (1, 1), "not valid JSON: Expecting value"),
        ("{}\n}", (2, 1), "not valid JSON: Extra data"),
        ("}", (1, 1), "not valid JSON: Expecting value"),
        ('{"name": "a\nb"}', (1, 12), "not valid JSON: Invalid control character at"),
        ('{"a": "' + "[" * 200, (1, 7), "not valid JSON: Unterminated string starting at"),
        ('{"a": "' + "[" * 200 + "\\", (1, 7), "not valid JSON: Unterminated string starting at"),
        ('{"é": "'.encode() + b"\xff", (1, 8), "byte 0xff is not UTF-8 text"),
        (b'\xef\xbb\xbf{"a":\r\n\t\xc3', (2, 2), "byte 0xc3 is not UTF-8 text"),
        ("{}".encode("utf-16"), (1, 1), "byte 0xff is not UTF-8 text"),
    ],
)
def test_broken_json_is_one_line_with_line_and_column(tmp_path, text, place, message):
    file = tmp_path / "config.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert str(caught.value).startswith(f"{file}: line {place[0]}, column {place[1]}: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"seed": 1, "seed": 2}', "key 'seed' is given twice in one object"),
        ('{"seed": 1,\r\n\r\n "s\\u0065ed": 2}', "key 'seed' is given twice in one object"),
        (
            '{"a": "\\" {[\\\\", "b": "\\n",\n'
            ' "c": [{"a": 1}, {"a": 2, "é\U0001f600": 1, "a": 3}]}',
            "key 'a' is given twice",
        ),
        ('{"k": {"a\\nb": 1,\n"a\\nb": 2}}', r"key 'a\nb' is given twice"),
        ('{"seed": NaN}', "NaN is not a finite number"),
        ('{"seed":\n -Infinity}', "-Infinity is not a finite number"),
        ('{"seed": [0, 1e999]}', "1e999 is too large a number: expected at most 1.8e308"),
        ('{"seed": -' + "9" * 400 + "}", "-9999999999999999999... is too large a number"),
        ('{"seed": ' + "9" * 5000 + "}", "99999999999999999999... is too large a number"),
        ('{"name": "\\ud83d\\ude00 \\ud83d"}', "half a surrogate pair is not text"),
        ("\n [1]", "expected a JSON object, not a list"),
        (b"\xef\xbb\xbf[]", "expected a JSON object, not a list"),
        ('"text"', "expected a JSON object, not a string"),
        ("null", "expected a JSON object, not null"),
        ("1.5", "expected a JSON object, not a number"),
        ("true", "expected a JSON object, not true or false"),
        ('{"a":' * 101 + "1" + "}" * 101, "nested deeper than 100 levels"),
        (DEEP, "nested deeper than 100 levels"),
        (DEEP + "1" + "}" * 10_000, "nested deeper than 100 levels"),
    ],
)
def test_json_that_only_the_strict_reader_rejects_is_one_line_that_names_the_file(
    tmp_path, text, message
):
    file = tmp_path / "config.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert str(caught.value).startswith(f"{file}: {message}")
    assert "\n" not in str(caught.value)


def test_comments_may_share_a_key_at_any_level(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(
        '{"_": 1, "_": 2, "data_loader": {"_c": {"a": 1}, "type": "DigitsDataLoader", "_c": 0},'
        ' "_": {"_": 1, "_": 2},'
        ' "optimizer": {"type": "SGD", "args": {"_why": "", "lr": 0.3, "_why": ""}}}'
    )
    assert load_config(file).optimizer.args == {"lr": 0.3}
    file.write_text('{"_c": {"a": 1, "a": 2}}')
    with pytest.raises(ConfigError, match="key 'a' is given twice"):
        load_config(file)


def test_the_base_key_of_mmengine_is_an_error_in_a_child_and_in_a_parent(tmp_path):
    write(tmp_path / "parent.json", {"_base_": ["a.py"], **DIGITS})
    write(tmp_path / "child.json", {"extends": "parent.json"})
    for name in ("parent", "child"):
        with pytest.raises(
            ConfigError, match=r"parent.json: _base_: name the parent in extends instead$"
        ):
            load_config(tmp_path / f"{name}.json")


PORTED = {
    "n_gpu": 1.5,
    "loss": "nll_loss",
    "data_loader": {
        "type": "DigitsDataLoader",
        "args": {"batch_size": 0, "collate": 1, "sampler": None},
    },
    "optimizer": {"type": "Adam", "args": {"lr": "0.1", "momentum": 0.9, "nesterov": True}},
    "lr_scheduler": {"type": "StepLR", "args": {"gamma": "0.1"}},
    "trainer": {"epochs": 3, "len_epoch": 5, "monitor": "min val_nll", "grad_clip": 1.0},
}


def test_all_problems_are_reported_at_once_in_one_line():
    with pytest.raises(ConfigError) as caught:
        validate(PORTED, "ported.json")
    message = str(caught.value)
    source, *problems = message.replace("ported.json: ", "ported.json: also: ", 1).split("also: ")
    assert source == "ported.json: "
    assert "\n" not in message
    keys = [problem.partition(":")[0] for problem in problems]
    assert sorted(keys) == sorted([
        "loss", "data_loader.args.collate", "data_loader.args.sampler", "trainer.len_epoch",
        "trainer.grad_clip",
        "n_gpu", "data_loader.args.batch_size", "trainer.monitor", "optimizer.args.momentum",
        "optimizer.args.nesterov",
        "optimizer.args.lr", "lr_scheduler.args.step_size", "lr_scheduler.args.gamma",
    ])  # fmt: skip
    unknown = {
        "loss",
        "data_loader.args.collate",
        "data_loader.args.sampler",
        "trainer.len_epoch",
        "trainer.grad_clip",
    }
    assert set(keys[:5]) == unknown, "unknown keys come first"
    assert "loss: unknown key; did you mean 'train_loss'?" in message
    assert "trainer.len_epoch: unknown key; did you mean 'data_loader.args.num_batches'?" in message
    assert "trainer.grad_clip: unknown key; also: " in message, (
        "this project does not clip gradients"
    )
    assert message.count("known here: name, ") == message.count("known here: epochs, ") == 1
    assert (
        "Adam takes no such argument; to leave it out: --set optimizer.args.momentum=null"
        in message
    )


def test_unchecked_names_leave_optimizer_and_schedule_unchecked():
    tree = {
        **DIGITS,
        "seed": -1,
        "optimizer": {"type": "lion.Lion"},
        "lr_scheduler": {"type": "ReduceLROnPlateau", "monitor": "val_nll"},
    }
    with pytest.raises(ConfigError, match=r"^config: seed: [^;]*$"):
        validate(tree, check_names=False)


def test_arguments_of_unchecked_entries_may_have_any_type():
    config = validate({**DIGITS, "adversarial": {"step_size": "own"}}, check_names=False)
    assert config.adversarial.step_size == "own"


def test_a_single_problem_is_reported_alone():
    for broken in ({"trainer": {"epochs": 0}}, {"trainer": {"epocs": 1}}, {"seed": "a"}):
        with pytest.raises(ConfigError) as caught:
            validate(DIGITS | broken)
        assert "also: " not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        validate(
            DIGITS
            | {
                "num_classes": 3,
                "arch": {"args": {"num_classes": 4}},
                "optimizer": {"args": {"lr": -1}},
            }
        )
    assert str(caught.value) == (
        "config: num_classes: 3 contradicts arch.args.num_classes: 4; also:"
        " optimizer.args.lr: SGD does not accept -1: Invalid learning rate: -1"
    )


def test_unusual_but_valid_json_is_read(tmp_path):
    value = {"a": [1e308, -0.0, 10**300, "\U0001f600", '[{:}]\\"'], "": {"a": {}}, "NaN": "NaN"}
    file = tmp_path / "config.json"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(value, indent=1).replace("\n", "\r\n").encode())
    assert read_json_object(file) == value
    deepest = '{"a":' * MAX_DEPTH + "1" + "}" * MAX_DEPTH
    assert parse_json(deepest) == json.loads(deepest)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"extends": 3}, "config.json: extends: expected the path of a config file, not 3"),
        ({"extends": "missing.json"}, "config.json: extends: .*missing.json: no such config file"),
        ({"extends": ""}, "config.json: extends: .*: cannot be read: Is a directory"),
        ({"extends": "a\0b"}, r"a\\x00b: cannot be read: embedded null byte"),
        ({"extends": "a" * 300}, "config.json: extends: .*: cannot be read: File name too long"),
        ({"extends": "config.json"}, "config.json: extends: .*config.json extends itself"),
        ({"extends": "loop.json"}, "loop.json: cannot be read: "),
        (
            {"extends": "broken.json"},
            "config.json: extends: .*broken.json: line 1, column 1: not valid JSON",
        ),
    ],
)
def test_a_parent_that_cannot_be_read_is_one_line(tmp_path, text, message):
    (tmp_path / "loop.json").symlink_to("loop.json")
    (tmp_path / "broken.json").write_text("broken")
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(write(tmp_path / "config.json", text))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_extends_in_a_circle_and_in_a_long_chain(tmp_path):
    for index in range(1100):
        write(
            tmp_path / f"{index}.json",
            {"extends": f"{index + 1}.json", "trainer": {"epochs": index + 1}},
        )
    write(tmp_path / "1100.json", {**DIGITS, "seed": 7})
    config = load_config(tmp_path / "0.json")
    assert (config.trainer.epochs, config.seed) == (1, 7)
    write(tmp_path / "1100.json", {"extends": "1099.json"})
    with pytest.raises(ConfigError, match="1100.json: extends: .*1099.json extends itself"):
        load_config(tmp_path / "1000.json")


def test_missing_file_and_line_breaks_in_its_name(tmp_path):
    with pytest.raises(ConfigError, match=r"a\\nb.json: no such config file"):
        load_config(tmp_path / "a\nb.json")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            ("trainer", '{"epochs": 1, "epochs": 2}'),
            "trainer: key 'epochs' is given twice in one object",
        ),
        (("optimizer.args.lr", "NaN"), "optimizer.args.lr: NaN is not a finite number"),
        (("optimizer.args.lr", "1e999"), "optimizer.args.lr: 1e999 is too large a number"),
        (("optimizer", "[" * 10_000), "optimizer: nested deeper than 100 levels"),
        ((".".join("a" * 21), "1"), "expected a dotted key such as trainer.epochs"),
        (("trainer..epochs", "1"), "^--set trainer..epochs=1: expected a dotted key"),
        (("name", "a\udcffb"), r"name: not UTF-8 text: .*udcff"),
        (("data_loader.args.data_dir", "[1, \udcff"), "data_loader.args.data_dir: not UTF-8 text"),
        (("a\udcff", "1"), r"a\\udcff: not UTF-8 text"),
    ],
)
def test_override_that_cannot_be_read_names_its_key(setting, message):
    with pytest.raises(ConfigError, match=message) as caught:
        validate(override(DIGITS, [setting]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["NaN", "1e999", "[" * 200, '{"a": 1, "a": 2}'])
def test_text_stays_text_where_the_field_is_text(text):
    assert validate(override(DIGITS, [("trainer.noise_file", text)])).trainer.noise_file == text


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@given(json_values, st.sampled_from([None, 0, 3]), st.booleans())
def test_the_strict_reader_gives_the_same_values_as_json(value, indent, ascii_only):
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    assert repr(parse_json(text)) == repr(json.loads(text))


PIECES = [
    *'{}[]:,1- "\\\n', '"a"', '"b"', "1e999", "NaN", "Infinity", "null", "\\u", "d83d"
]  # fmt: skip


@given(
    st.text(st.characters())
    | st.lists(st.sampled_from(PIECES), max_size=25).map("".join)
    | st.binary(),
    st.booleans(),
)
def test_any_bytes_are_an_object_or_one_line(tmp_path_factory, content, in_object):
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    file = tmp_path_factory.getbasetemp() / "any.json"
    file.write_bytes(b'{"a":' + data + b"}" if in_object else data)
    try:
        value = read_json_object(file)
    except ConfigError as error:
        message = str(error)
        match = re.fullmatch(r".*any\.json: (?:line (\d+), column (\d+): )?.+", message)
        assert match is not None
        assert match[1] is not None or "not valid JSON" not in message
        if match[1] is not None:
            lines = file.read_bytes().decode("utf-8", "replace").split("\n")
            assert 1 <= int(match[2]) <= len(lines[int(match[1]) - 1]) + 1
    else:
        assert isinstance(value, dict)
        assert value == json.loads(file.read_bytes().decode("utf-8-sig"))


@given(st.sampled_from(sorted(Config.model_fields)), json_values)
def test_any_json_at_any_key_is_a_config_or_one_line(key, value):
    try:
        config = validate({**DIGITS, key: value})
    except ConfigError as error:
        message = str(error)
        assert "\n" not in message
    else:
        assert validate(config.dump()).dump() == config.dump()


def test_schema_and_reference_are_current():
    message = "run: python -m base.config.json_schema"
    assert json.loads((CONFIGS / "schema.json").read_text()) == schema(), message
    assert (CONFIGS / "README.md").read_text() == reference(), message
    readme = (CONFIGS.parent / "README.md").read_text()
    assert readme_with_choices(readme) == readme, message


def test_every_table_has_a_key_that_names_its_entries():
    tables = [
        table
        for name, table in vars(registry).items()
        if name.isupper() and isinstance(table, dict)
    ]
    assert len(tables) == 10
    named = [id(table) for _, table in choices()]
    assert [[*table] for table in tables if table and id(table) not in named] == []
