"""Where a value came from: errors, warnings and --print-config name the same file or flag."""

import json

import pytest

import experiment  # noqa: F401 - fills the tables
from base.command_line import config_overrides, config_parser, print_config
from base.config import load_config, validate
from base.config.files import origins_named
from base.errors import ConfigError
from base.optim import check_optimization

DIGITS = {"data_loader": {"type": "DigitsDataLoader"}}


def load(tmp_path, *words, parent=None, child=None):
    """The config of a child and its parent, with the arguments of a command line."""
    (tmp_path / "parent.json").write_text(json.dumps({**DIGITS, **(parent or {})}))
    (tmp_path / "child.json").write_text(json.dumps({"extends": "parent.json", **(child or {})}))
    return load_config(
        tmp_path / "child.json", config_overrides(config_parser("").parse_args(words))
    )


PARENT, CHILD = "{folder}/parent.json (extended by child.json)", "{folder}/child.json"


@pytest.mark.parametrize(
    ("parent", "child", "words", "message"),
    [
        ({"trainer": {"epochs": 0}}, {}, [], f"{PARENT}: trainer.epochs: Input should be"),
        (
            {"trainer": {"epochs": 5}},
            {"trainer": {"epochs": 0}},
            [],
            f"{CHILD}: trainer.epochs: Input should be",
        ),
        (
            {"trainer": {"epochs": 0}},
            {},
            ["--set", "trainer.epochs=-1"],
            "--set trainer.epochs=-1: trainer.epochs: Input",
        ),
        ({}, {}, ["--norm", "bn2"], "--norm bn2: arch.args.norm_layer_type: 'bn2' is not one of"),
        (
            {},
            {},
            ["--norm_layer=bn2"],
            "--norm_layer bn2: arch.args.norm_layer_type: 'bn2' is not one of",
        ),
        ({"trainr": {}}, {}, [], f"{PARENT}: trainr: unknown key"),
        ({}, {"trainr": None}, [], f"{CHILD}: trainr: unknown key"),
        ({}, {}, ["--set", "trainr=null"], "--set trainr=null: trainr: unknown key"),
        (
            {},
            {},
            ["--set", "data_loader=null"],
            "--set data_loader=null: data_loader: required, but null removes it",
        ),
        (
            {"data_loader": {"type": None}},
            {},
            [],
            f"{PARENT}: data_loader.type: required, but null removes it",
        ),
        ({}, {}, ["--set", "seed=[1"], "--set seed=[1: seed: Input"),
        ({}, {}, ["--set", "trainer..epochs=1"], "--set trainer..epochs=1: expected a dotted key"),
        (
            {"trainer": {"sym": True, "percent": 0.1}},
            {},
            ["--asym"],
            "--asym true: trainer.sym and asym",
        ),
        (
            {},
            {},
            ["--percent", "0.2"],
            "--percent 0.2: trainer.percent: 0.2 has no effect: set sym or asym",
        ),
        (
            {"num_classes": 5},
            {"arch": {"args": {"num_classes": 10}}},
            [],
            f"{CHILD}: num_classes: 5 contradicts arch.args.num_classes: 10",
        ),
        (
            {"trainer": {"epochs": 0}},
            {"seed": -1},
            ["--lr", "x"],
            f"{CHILD}: seed: ",
        ),
        ({}, {}, ["--set", "comet.offline=x"], "--set comet.offline: comet.offline: "),
        (
            {},
            {"optimizer": {"type": "SGD", "args": {"lr": -1}}},
            [],
            f"{CHILD}: optimizer.args.lr: SGD does not accept -1: Invalid learning rate: -1",
        ),
        ({}, {}, ["--lr", "-1"], "--lr -1: optimizer.args.lr: SGD does not accept -1: Invalid"),
    ],
)
def test_an_error_names_the_file_or_flag_that_the_value_came_from(
    tmp_path, parent, child, words, message
):
    # Some errors are found in loading, others in the check after it
    with pytest.raises(ConfigError) as caught:  # noqa: PT012
        config = load(tmp_path, *words, parent=parent, child=child)
        with origins_named(config):
            check_optimization(config.optimizer, config.lr_scheduler)
    assert str(caught.value).startswith(message.format(folder=tmp_path))


def test_each_of_several_errors_names_its_own_origin(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load(
            tmp_path,
            "--set",
            "n_gpu=x",
            parent={"seed": -1},
            child={"trainer": {"epochs": 0, "save_period": 0}},
        )
    first, second, third, fourth = str(caught.value).split("; also: ")
    assert first.startswith(f"{tmp_path}/parent.json (extended by child.json): seed: ")
    assert second.startswith("--set n_gpu=x: n_gpu: ")
    assert third.startswith(f"{tmp_path}/child.json: trainer.epochs: ")
    assert fourth.startswith("trainer.save_period: ")


def test_a_warning_names_the_flag(tmp_path):
    (warning,) = load(tmp_path, "--sym").warnings
    assert (
        warning == "without effect in this run: trainer.sym true of --sym true"
        " (only with trainer.percent above 0)"
    )


def test_the_printed_config_is_a_config_and_names_every_origin(tmp_path):
    parent = {"trainer": {"epochs": 5, "early_stop": 3}, "comet": {"api": "secret", "project": "p"}}
    child = {"trainer": {"early_stop": None}, "name": "of the child", "metrics": ["top5"]}
    config = load(
        tmp_path,
        "--set",
        "trainer.save_period=2",
        "--lr",
        "0.3",
        "--key",
        "secret",
        parent=parent,
        child=child,
    )
    text = config.describe_origins()
    assert "secret" not in text
    tree = json.loads(text)
    assert validate(tree) == config.model_copy(update={"comet": validate(tree).comet})
    assert all(
        line.count('": ') == 2 for line in text.splitlines() if not line.endswith(("{", "}", "},"))
    ), "a line per key"
    of = {
        "parent": f"{tmp_path}/parent.json (extended by child.json)",
        "child": f"{tmp_path}/child.json",
    }
    assert tree["trainer"]["_epochs"] == tree["comet"]["_project"] == of["parent"]
    assert (tree["_name"], tree["_metrics"]) == (of["child"], of["child"])
    assert tree["trainer"]["_save_period"] == "--set trainer.save_period=2"
    assert tree["optimizer"]["args"]["_lr"] == "--lr 0.3"
    assert tree["_seed"] == tree["trainer"]["_verbosity"] == "default"
    assert "early_stop" not in tree["trainer"]


def test_a_config_that_a_run_would_reject_is_not_printed(tmp_path, capsys):
    (tmp_path / "digits.json").write_text('{"data_loader": {"type": "DigitsDataLoader"}}')
    arguments = config_parser("").parse_args(["-c", str(tmp_path / "digits.json"), "--lr", "fast"])
    with pytest.raises(ConfigError, match="^--lr fast: optimizer.args.lr: expected a number"):
        print_config(arguments, config_overrides(arguments))
    assert capsys.readouterr().out == ""
