"""Promise 14: every leaf of every shipped config, deleted, misspelt, of the wrong type or out of
range, is a documented default or one line that names its dotted path.

What is expected comes from `configs/README.md`, the table that users read, not from the code.
"Loading" is everything that happens before data is read: file, types, ranges, and a step of
optimizer and schedule.
"""

import json
from inspect import signature

import pytest
from pydantic import ConfigDict
from shipped_configs import (
    LEFT_TO_CONSTRUCTORS,
    OTHERS,
    REFUSED_TEXT,
    ROWS,
    Loading,
    beyond,
    changed,
    distinct_keys,
    keys_of,
    kind_of,
    put,
    siblings_of,
    trees,
    value_at,
    words_of,
)
from torch import nn, optim

from base.config import Config, files, problems
from base.config import tree as config_tree
from base.errors import ConfigError
from base.optim import arguments, build_optimizer, optimizers

NAMED_INSTEAD = {
    "arch.type": ("arch.args.depth", "only wide_resnet takes it"),
    "data_loader": ("data_loader", "required"),
    "data_loader.type": ("data_loader.type", "required"),
    "data_loader.args": ("data_loader.args.data_dir", "required"),
    "data_loader.args.data_dir": ("data_loader.args.data_dir", "required"),
    "lr_scheduler.type": ("lr_scheduler.type", "required where lr_scheduler.args is given"),
    "lr_scheduler.args": ("lr_scheduler.args.milestones", "required by MultiStepLR"),
    "lr_scheduler.args.milestones": ("lr_scheduler.args.milestones", "required by MultiStepLR"),
    "optimizer.args.momentum": ("optimizer.args.nesterov", "Nesterov momentum requires a momentum"),
    "trainer.noise_file": ("trainer.noise_key", "no effect without noise_file"),
    "trainer.sym": ("trainer.percent", "no effect: set sym or asym"),
    "trainer.asym": ("trainer.percent", "no effect: set sym or asym"),
    "trainer.do_adv": ("trainer.monitor", "only logged with adversarial.validate_every above 0"),
    "adversarial": ("trainer.monitor", "only logged with adversarial.validate_every above 0"),
    "adversarial.method": (
        "trainer.monitor",
        "only logged with adversarial.validate_every above 0",
    ),
}
"""Keys that some configs need -> the key that the error names if they are missing, its message."""


def check_deleted(load):
    """Without a leaf or a section: the documented default, or a line that names what is missing."""
    for tree in trees().values():
        for key in keys_of(tree):
            left = changed(tree, key, lambda section, name: section.pop(name))
            try:
                config = load(left)
            except ConfigError:
                assert key in NAMED_INSTEAD, f"{key} has no default"
                load.refuses(left, *NAMED_INSTEAD[key])
                continue
            section, _, name = key.rpartition(".")
            if section in ("optimizer.args", "lr_scheduler.args"):
                check_default_of_torch(config, section, name)
            for row in ROWS:
                # Comet is null without its section, so its keys have no defaults
                if row == key or (row.startswith(f"{key}.") and key != "comet"):
                    check_default(row, value_at(config.model_dump(), row))


def check_default(row, value):
    documented = json.loads(ROWS[row][1])
    if row == "optimizer.args" and value:  # without the whole section
        assert value == {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
    elif row in LEFT_TO_CONSTRUCTORS:
        assert value is None, row
    else:
        assert value == documented, f"{row}: {value!r}, documented {documented!r}"


def check_default_of_torch(config, section, name):
    assert name not in value_at(config.model_dump(), section)
    if section == "optimizer.args":
        built = build_optimizer(config.optimizer, nn.Linear(1, 1))
        assert built.param_groups[0][name] == signature(optim.SGD).parameters[name].default


def check_misspelt(load):
    """A letter lost, doubled, swapped, in another case: the line names the wrong key and, where it
    is near, the right one."""
    for tree_name, tree, key in distinct_keys():
        section, _, name = key.rpartition(".")
        dot = "." if section else ""
        siblings = siblings_of(tree, key)
        near, far = {name[:-1], name + name[-1], name.swapcase()}, {f"x{name[::-1]}"}
        if tree_name == "every key":
            near |= {name[0] + name, name.replace("_", "") + "_"}
            far |= {name[1::-1] + name[2:], "ключ", "a b", "\n", f"{name}."}
        known = {
            row.removeprefix(f"{section}{dot}").partition(".")[0]
            for row in ROWS
            if row.startswith(section)
        }
        for wrong in sorted((near | far) - known - set(siblings) - {""}):
            if wrong.startswith("_"):  # a comment
                continue
            moved = changed(
                tree, key, lambda place, old, new=wrong: place.__setitem__(new, place.pop(old))
            )
            shown = wrong.replace("\n", "\\n")
            hint = (
                f"did you mean {name!r}?"
                if wrong in near and len(wrong) > 1
                else "known here: "
                if dot == ""
                else ""
            )
            load.refuses(moved, f"{section}{dot}{shown}", hint)
            if wrong in near:
                load.refuses_deletion(tree, f"{section}{dot}{wrong}")


def check_wrong_type(load):
    """Values of every other type, at every leaf, at every element of a list, and in place of every
    section."""
    for _, tree, key in distinct_keys():
        words = words_of(key)
        for value in OTHERS["object" if words is None else kind_of(words)]:
            load.refuses(put(tree, key, value), key)
        if words and kind_of(words) == "list":
            items = value_at(tree, key)
            for index in range(len(items)):
                for value in OTHERS[kind_of(words.removeprefix("list of "))]:
                    load.refuses(put(tree, key, [*items[:index], value, *items[index + 1 :]]), key)


def check_out_of_range(load):
    """Below, above and far beyond every documented range; unknown names; lists too short and too
    long; broken text."""
    for _, tree, key in distinct_keys():
        words = words_of(key)
        if words is None or words == "object":
            continue
        kind, value = kind_of(words), value_at(tree, key)
        if kind == "list":
            items = beyond(key, words)
            wrong = [
                [*value[:index], item, *value[index + 1 :]]
                for item in items
                for index in range(len(value))
            ]
            wrong += {"milestones": [[3, 2], [2, 2]], "metrics": [["top3"], ["top1", ""]]}.get(
                key.split(".")[-1], []
            )
            wrong += [[]] if key.endswith((".mean", ".std")) else []
        elif kind == "choice of numbers":
            wrong = [
                number for number in (-1, 0, 2, 10**30) if str(number) not in words.split(", ")
            ]
        elif kind == "choice":
            wrong = ["", value + value[-1], value.upper(), f" {value}", "other", "a\nb"]
            wrong = [text for text in wrong if text not in words.split(", ")]
        elif kind == "text":
            wrong = REFUSED_TEXT.get(key, [])
        else:
            wrong = [number for number in beyond(key, words) if not (key == "seed" and number > 0)]
        for item in wrong:
            load.refuses(put(tree, key, item), key)


CHECKS = {
    check_deleted: 1062,
    check_misspelt: 4646,
    check_wrong_type: 2935,
    check_out_of_range: 1822,
}
"""How many loads each of them tries: more where a config is added, never fewer."""


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_leaf_of_every_config_has_a_default_or_is_named(check):
    load = Loading()
    check(load)
    assert load.count >= CHECKS[check]


def forgets_the_documented_default(monkeypatch):
    class Changed(Config):
        seed: int = 1

    monkeypatch.setattr(files, "Config", Changed)


def takes_unknown_keys(monkeypatch):
    class Lenient(Config):
        model_config = ConfigDict(**{**Config.model_config, "extra": "ignore"})

    monkeypatch.setattr(files, "Config", Lenient)


def takes_values_of_other_types(monkeypatch):
    class Lax(Config):
        model_config = ConfigDict(**{**Config.model_config, "strict": False})

    monkeypatch.setattr(files, "Config", Lax)


def names_no_key(monkeypatch):
    message = problems._message
    monkeypatch.setattr(problems, "_message", lambda problem: message(problem).partition(": ")[2])


def hints_at_nothing(monkeypatch):
    monkeypatch.setattr(config_tree, "format_hint", lambda nearest: "")


def leaves_arguments_to_torch(monkeypatch):
    monkeypatch.setattr(optimizers, "check_arguments", lambda *args, **kwargs: None)


def knows_no_ranges(monkeypatch):
    monkeypatch.setattr(arguments, "RANGES", {})


def has_no_bound(monkeypatch):
    class Unbounded(Config):
        n_gpu: int = 1

    monkeypatch.setattr(files, "Config", Unbounded)


@pytest.mark.parametrize(
    ("check", "break_it"),
    [
        (check_deleted, forgets_the_documented_default),
        (check_deleted, names_no_key),
        (check_misspelt, takes_unknown_keys),
        (check_misspelt, hints_at_nothing),
        (check_misspelt, leaves_arguments_to_torch),
        (check_wrong_type, takes_values_of_other_types),
        (check_wrong_type, leaves_arguments_to_torch),
        (check_wrong_type, names_no_key),
        (check_out_of_range, knows_no_ranges),
        (check_out_of_range, has_no_bound),
    ],
)
def test_the_check_can_fail_where_a_safeguard_is_gone(check, break_it, monkeypatch):
    break_it(monkeypatch)
    with pytest.raises(AssertionError):
        check(Loading())
