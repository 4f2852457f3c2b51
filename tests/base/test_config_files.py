"""Config files: inheritance, comments, overrides, and one clear line for everything that can be wrong with them."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from base.config import Config
from base.config_files import load_config, merge, override, validate
from base.config_schema import reference, schema
from base.errors import ConfigError

DIGITS = {"data_loader": {"type": "DigitsDataLoader"}}
CONFIGS = Path(__file__).parents[2] / "configs"


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
            "epochs": 30, "save_dir": "saved/", "save_period": 1, "verbosity": 2, "label_dir": "saved/",
            "monitor": "max val_my_metric", "early_stop": 2000, "_percent": "Percentage of noise", "percent": 0.0,
            "_subset_percent": "Percentage of training data to use", "subset_percent": 1.0, "asym": False, "sym": False,
            "OCNN": False, "lamb_ocnn": 0.001, "do_adv": True, "fgsm_step": 8, "adv_clip_eps": 8, "adv_repeats": 4, **trainer,
        },
        "pgd_attack": {"K": 10, "step": 2},
    }  # fmt: skip


def test_published_config_is_valid_once_its_data_dir_is_set(tmp_path):
    file = write(tmp_path / "config.json", published_style())
    with pytest.raises(ConfigError, match=r"data_dir: '\*\*data dir\*\*' is the published config's placeholder: put"):
        load_config(file)
    config = load_config(file, [("data_loader.args.data_dir", "images")])
    assert config.trainer.monitor == "max val_top1"
    assert config.metrics == ["top1", "top5"]
    assert config.comet is not None
    assert config.comet.api is None


def test_resolved_config_reads_back_the_same_and_holds_no_secret():
    config = validate(published_style() | {"data_loader": DIGITS["data_loader"], "comet": {"api": "secret-key"}})
    assert config.comet.api == "secret-key"
    assert "secret-key" not in json.dumps(config.dump())
    assert "secret-key" not in repr(config)
    read_back = validate(json.loads(json.dumps(config.dump())))
    assert read_back.dump() == config.dump()


def test_child_wins_null_deletes_and_comments_vanish(tmp_path):
    write(tmp_path / "grandparent.json", {**DIGITS, "seed": 1, "trainer": {"epochs": 7, "early_stop": 3, "save_period": 2}})
    (tmp_path / "below").mkdir()
    write(tmp_path / "below" / "parent.json", {"extends": "../grandparent.json", "trainer": {"epochs": 8}})
    child = write(
        tmp_path / "child.json",
        {"extends": "below/parent.json", "_note": "x", "trainer": {"_note": {"a": 1}, "early_stop": None}, "seed": None},
    )
    config = load_config(child)
    assert config.trainer.epochs == 8
    assert config.trainer.save_period == 2
    assert config.trainer.early_stop is None
    assert config.seed == Config.model_fields["seed"].default


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (("name", "12"), "12"),  # a string field keeps the text
        (("seed", "12"), 12),
        (("trainer.sym", "True"), True),
        (("trainer.sym", "false"), False),
        (("optimizer.args.lr", "1e-3"), 1e-3),
        (("lr_scheduler.args.milestones", "[1, 2]"), [1, 2]),
        (("trainer.monitor", "min val_loss"), "min val_loss"),
        (("optimizer", '{"type": "SGD", "args": {"lr": 0.05}}'), {"type": "SGD", "args": {"lr": 0.05}}),
        (("lr_scheduler.args", '{"gamma": 0.5}'), {"gamma": 0.5}),
        (("system.num_threads", "2"), 2),
    ],
)
def test_override_is_typed_by_its_field(setting, expected):
    value = validate(override(DIGITS, [setting])).model_dump()
    for key in setting[0].split("."):
        value = value[key]
    assert value == expected
    assert type(value) is type(expected)


def test_later_override_wins_and_null_restores_the_default():
    tree = override(DIGITS, [("trainer.epochs", "3"), ("trainer.epochs", "4"), ("seed", "5"), ("seed", "null")])
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
        ("arch.args.conv_layer_type", "prec_cnov", r"'prec_cnov' is not one of: conv, prec_conv.*did you mean 'prec_conv'\?"),
        ("arch.type", "ResNet18", r"arch.type: 'ResNet18' is not one of: resnet18.*did you mean 'resnet18'\?"),
        ("trainer.monitor", "max test_top1", "trainer.monitor: 'max test_top1' is neither 'off' nor .*never the test set"),
        ("trainer.monitor", "max val_clean_top1", "'max val_clean_top1' is only logged where validation labels carry noise"),
        ("lr_scheduler.monitor", "val_lss", "lr_scheduler.monitor: 'val_lss' is not a logged value: loss, top1"),
        ("trainer.percent", 0.4, "trainer.percent: 0.4 has no effect: set sym or asym"),
        ("trainer", {"sym": True, "asym": True}, "trainer.sym and asym: only one kind of label noise"),
        ("trainer.noise_key", "worse_label", "trainer.noise_key: has no effect without noise_file"),
        ("trainer.monitor", "max val_ema_top1", "'max val_ema_top1' is only logged with trainer.ema_decay"),
        (
            "trainer.monitor",
            "max val_robust_top1",
            "'max val_robust_top1' is only logged with adversarial.validate_every above 0",
        ),
        ("trainer.monitor", "max robust_top1", "trainer.monitor: 'max robust_top1' is neither 'off' nor"),
        ("trainer.adv_clip_eps", 0.031, r"trainer.adv_clip_eps: 0.031 is in 1/255 .*write 7.91 for 0.031 of the pixel range"),
        ("trainer.fgsm_step", 0.03, "trainer.fgsm_step: 0.03 is in 1/255"),
        ("adversarial.epsilon", 256, "adversarial.epsilon: 256 is in 1/255 of the pixel range: expected at most 255"),
        ("adversarial", {"norm": "l2", "epsilon": 8}, "adversarial.epsilon: 8 is in units of .*write 0.0314 for 8/255"),
        (
            "adversarial",
            {"random_start": False, "restarts": 2},
            "adversarial.restarts: 2 without random_start are all the same",
        ),
        ("adversarial", {"norm": "l2", "step_size": 2}, "adversarial.step_size: 2 is in units of .*write 0.00784 for 2/255"),
        ("pgd_attack.step", 0.0078, "pgd_attack.step: 0.0078 is in 1/255"),
        ("adversarial", {"method": "free", "bn_mode": "eval"}, "adversarial.bn_mode: .*only train is possible"),
        ("num_classes", 5, None),
        ("data_loader.type", "CIFAR10DataLoader", "data_loader.args.data_dir: required"),
        ("data_loader.args.image_size", 8, "data_loader.args.image_size: only ImageFolderDataLoader takes it"),
        ("data_loader.args.mean", [0.5], "data_loader.args.mean: .*at least 3 items"),
        ("name", "../elsewhere", "name: .*pattern"),
        ("name", "..", "name: '..' is not a folder name"),
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


def test_none_contradicts_the_original_switch_for_free_training():
    with pytest.raises(ConfigError, match=r"adversarial.method: none contradicts trainer.do_adv: true"):
        validate({**DIGITS, "adversarial": {"method": "none"}, "trainer": {"do_adv": True}})


def test_two_places_for_num_classes_must_agree():
    with pytest.raises(ConfigError, match=r"num_classes: 5 contradicts arch.args.num_classes: 10"):
        validate({**DIGITS, "num_classes": 5, "arch": {"args": {"num_classes": 10}}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"seed": 1,\n "name" 2}', "line 2, column 9: not valid JSON"),
        ('{"seed": 1, "seed": 2}', "key 'seed' is given twice"),
        ('{"seed": NaN}', "NaN is not a finite number"),
        ('{"seed": 1e400}', "1e400 is not a finite number"),
        ("[1]", "expected a JSON object, not list"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"extends": 3}', "extends: expected the path of a config file, not 3"),
        ('{"extends": "missing.json"}', "missing.json: no such config file"),
        ('{"extends": "config.json"}', "extends itself"),
    ],
)
def test_broken_file_is_one_line(tmp_path, text, message):
    file = write(tmp_path / "config.json", text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(file)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_byte_order_mark_and_binary(tmp_path):
    file = tmp_path / "config.json"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(DIGITS).encode())
    assert load_config(file).data_loader.type == "DigitsDataLoader"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read as UTF-8"):
        load_config(file)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(sorted(Config.model_fields)), json_values)
def test_any_json_at_any_key_is_a_config_or_one_line(key, value):
    try:
        config = validate({**DIGITS, key: value})
    except ConfigError as error:
        assert "\n" not in str(error)  # noqa: PT017 - most values are refused, and then the message is what counts
    else:
        assert validate(config.dump()).dump() == config.dump()


def test_schema_and_reference_are_current():
    message = "run: python -m base.config_schema"
    assert json.loads((CONFIGS / "schema.json").read_text()) == schema(), message
    assert (CONFIGS / "README.md").read_text() == reference(), message
