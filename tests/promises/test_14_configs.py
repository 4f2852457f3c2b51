"""Promise 14: every leaf of every shipped config, deleted, misspelt, of the wrong type or out of range, is a documented default
or one line that names its dotted path, and exit code 2. JSON that is broken is one line with line and column.

What is expected comes from `configs/README.md`, the table that users read, not from the code. "Loading" is all that happens
before data is read: file, types, ranges, and a few steps of optimiser and schedule.
"""

import json
import re
import subprocess
import sys
from functools import cache
from inspect import signature
from pathlib import Path

import pytest
from pydantic import ConfigDict
from torch import nn, optim

from base import config_arguments, config_files, json_file, optimization
from base.config import Config
from base.config_training import OptimizerConfig, SchedulerConfig
from base.errors import ConfigError
from base.optimization import check_optimization
from studies import grid

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
GRIDS = sorted((CONFIGS / "ablations").glob("*.json"))
FILES = [file for file in sorted(CONFIGS.rglob("*.json")) if file not in GRIDS and file.name != "schema.json"]
ARGUMENTS = {
    "lr": "number ≥ 0", "momentum": "number ≥ 0, < 1", "dampening": "number ≥ 0, ≤ 1", "weight_decay": "number ≥ 0",
    "nesterov": "true, false", "milestones": "list of integer ≥ 1", "gamma": "number ≥ 0",
}  # fmt: skip
"""Arguments of SGD and MultiStepLR, the only ones that shipped configs give, as torch documents them."""
NO_SUCH_TEXT = {
    "name": ["", ".", "..", "a/b", "a\\b", "a\nb", "a\0b", "\x7f", "n" * 256, "é" * 128],
    "trainer.monitor": ["", "max", "max test_top1", "maximal val_top1", "val_top1", "max val_top2", "Off", "max val_top1 "],
    "trainer.save_dir": ["", "a\0b"],
    "trainer.noise_file": ["", "a\0b"],
    "data_loader.args.data_dir": ["", "a\0b", "**data dir**"],
    "system.device": ["", "gpu", "CUDA", "cuda:", "cuda:-1", "cuda:9999", "meta", "cpu:0:0"],
    "optimizer.type": ["", "sgd", "SDG", "torch.optim.SGD", "Optimizer", "LBFGS", "__import__"],
    "lr_scheduler.type": ["", "multisteplr", "MultiStep", "LRScheduler", "LambdaLR", "None"],
    "lr_scheduler.monitor": ["", "val_lss", "test_loss", "max val_loss"],
}
"""Text that these keys refuse. All other text is free."""
OTHERS = {
    "integer": ["text", "7", 2.5, 7.0, True, [1], {"a": 1}],
    "number": ["text", "0.5", False, [0.5], {"a": 0.5}],
    "text": [3, 2.5, True, ["a"], {"a": "b"}],
    "true, false": ["true", "", 0, 1, 0.5, [True], {"a": True}],
    "list": ["text", 3, 0.5, True, {"a": 1}],
    "object": ["text", 3, 0.5, True, [1]],
    "choice": [3, 0.5, True, ["a"], {"a": "b"}],
}
"""Values of other types than the documented one."""


def documented():
    """Dotted key -> (type in words, default), from the config reference."""
    rows, section = {}, ""
    for line in (CONFIGS / "README.md").read_text().splitlines():
        if line.startswith("## "):
            section = "" if line == "## Top level" else f"{line[3:]}."
        match = re.fullmatch(r"\| `(\w+)` \| (.+?) \| (required|`.+?`) \| .+ \|", line)
        if match:
            rows[section + match[1]] = (match[2].removesuffix(" or null"), match[3].strip("`"))
    return rows


ROWS = documented()


def merged(parent, child):
    for key, value in child.items():
        if value is None:
            parent.pop(key, None)
        else:
            parent[key] = merged(parent.get(key, {}), value) if isinstance(value, dict) else value
    return parent


def resolved(file):
    """The tree of a file with its parents', without comments."""
    tree = {key: value for key, value in json.loads(file.read_text()).items() if key[0] not in "_$"}
    parent = tree.pop("extends", None)
    return merged(resolved(file.parent / parent), tree) if parent else tree


def with_every_key():
    """A config that has a value at every key of the reference."""
    tree = {}
    special = {
        "data_loader.type": "ImageFolderDataLoader", "trainer.monitor": "max val_top1", "lr_scheduler.monitor": "val_loss",
        "lr_scheduler.type": "MultiStepLR", "system.device": "cpu", "optimizer.type": "SGD", "data_loader.args.mean": [0.5] * 3,
        "data_loader.args.std": [0.2] * 3, "metrics": ["top1", "my_metric2"], "trainer.percent": 0, "num_classes": 1,
        "optimizer.args": {"lr": 0.1, "momentum": 0.9, "dampening": 0, "weight_decay": 0, "nesterov": True},
        "lr_scheduler.args": {"milestones": [1, 3], "gamma": 0.1},
    }  # fmt: skip
    by_kind = {"integer": 1, "number": 0.5, "text": "text", "true, false": False}
    for key, (words, _) in ROWS.items():
        kind = kind_of(words)
        *sections, name = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = special.get(key, words.split(", ")[0] if kind == "choice" else by_kind.get(kind))
    return tree


def trees():
    """Name -> tree of every shipped config, and of one more that has a value at every documented key."""
    return {"every key": with_every_key(), **{str(file.relative_to(CONFIGS)): resolved(file) for file in FILES}}


def kind_of(words):
    if words.startswith("list of"):
        return "list"
    first = words.split()[0]
    return words if words == "true, false" else first if first in ("integer", "number", "text", "object") else "choice"


def words_of(key):
    """The documented type of a key, or None for a section."""
    section, _, name = key.rpartition(".")
    return ARGUMENTS[name] if section in ("optimizer.args", "lr_scheduler.args") else ROWS[key][0] if key in ROWS else None


def keys_of(tree, path=""):
    """The dotted keys of all leaves and sections."""
    for key, value in tree.items():
        yield path + key
        if isinstance(value, dict):
            yield from keys_of(value, f"{path}{key}.")


def changed(tree, key, change):
    """A copy of the tree where `change(section, name)` has been done at a dotted key."""
    tree = json.loads(json.dumps(tree))
    place = tree
    *sections, name = key.split(".")
    for section in sections:
        place = place[section]
    change(place, name)
    return tree


def put(tree, key, value):
    return changed(tree, key, lambda section, name: section.__setitem__(name, value))


def value_at(tree, key):
    for name in key.split("."):
        tree = (tree or {}).get(name)
    return tree


class Loading:
    """Loads configs, counts them, and asserts that wrong ones are refused in one line that names what is wrong."""

    def __init__(self, file):
        self.file, self.count = file, 0
        self.check = cache(lambda text: check_optimization(*map(_section, json.loads(text))))

    def __call__(self, tree):
        """As `load_config` does once it has a file's text."""
        self.count += 1
        config = config_files.validate(json_file.parse_json(json.dumps(tree)), "config.json")
        self.check(json.dumps([config.optimizer.model_dump(), config.lr_scheduler.model_dump()]))
        return config

    def text(self, data):
        self.count += 1
        self.file.write_bytes(data)
        return json_file.read_json_object(self.file)

    def refuses(self, tree, key, *also):
        message = self.message(lambda: self(tree), key)
        assert re.search(rf"(^|: ){re.escape(key)}(\.\d+)?: ", message), f"does not name {key}: {message}"
        assert all(text in message for text in also), message

    def refuses_grid(self, tree, *texts):
        self.count += 1
        self.file.write_text(json.dumps(tree))
        message = self.message(lambda: grid.plan(self.file, seeds=[0]), texts[0])
        assert all(text in message for text in texts), message

    def refuses_text(self, data, line, column, reason):
        message = self.message(lambda: self.text(data), reason)
        assert message.startswith(f"{self.file}: line {line}, column {column}: {reason}"), message

    def message(self, load, what):
        with pytest.raises(ConfigError) as caught:
            load()
        assert "\n" not in str(caught.value)
        return str(caught.value)


def _section(values):
    return (SchedulerConfig if "interval" in values else OptimizerConfig)(**values)


NAMED_INSTEAD = {
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
    "adversarial.method": ("trainer.monitor", "only logged with adversarial.validate_every above 0"),
}
"""Without these keys some configs contradict themselves or cannot do: the key that is named then, and what is said."""


def check_deleted(load):
    """Without a leaf or a section: the documented defaults, or a line that names what is missed."""
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
                if row == key or (row.startswith(f"{key}.") and key != "comet"):  # without that section there is none
                    check_default(row, value_at(config.model_dump(), row))


def check_default(row, value):
    documented = json.loads(ROWS[row][1])
    if row == "optimizer.args" and value:  # without the whole section
        assert value == {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
    else:
        assert value == documented, f"{row}: {value!r}, documented {documented!r}"


def check_default_of_torch(config, section, name):
    assert name not in value_at(config.model_dump(), section)
    if section == "optimizer.args":
        built = optimization.build_optimizer(config.optimizer, nn.Linear(1, 1))
        assert built.param_groups[0][name] == signature(optim.SGD).parameters[name].default


def check_misspelt(load):
    """A letter lost, doubled, swapped, in another case: the line names the wrong key and, where it is near, the right one."""
    for tree_name, tree in trees().items():
        for key in keys_of(tree):
            section, _, name = key.rpartition(".")
            dot = "." if section else ""
            siblings = value_at(tree, section) if section else tree
            near, far = {name[:-1], name + name[-1], name.swapcase()}, {f"x{name[::-1]}"}
            if tree_name == "every key":
                near |= {name[0] + name, name.replace("_", "") + "_"}
                far |= {name[1::-1] + name[2:], "ключ", "a b", "\n", f"{name}."}
            known = {row.removeprefix(f"{section}{dot}").partition(".")[0] for row in ROWS if row.startswith(section)}
            for wrong in sorted((near | far) - known - set(siblings) - {""}):
                if wrong.startswith("_"):  # a comment
                    continue
                moved = changed(tree, key, lambda place, old, new=wrong: place.__setitem__(new, place.pop(old)))
                shown = wrong.replace("\n", "\\n")
                hint = f"did you mean {name!r}?" if wrong in near and len(wrong) > 1 else "known here: " if dot == "" else ""
                load.refuses(moved, f"{section}{dot}{shown}", hint)


def check_wrong_type(load):
    """Values of every other type, at every leaf, at every element of a list, and in place of every section."""
    for tree in trees().values():
        for key in keys_of(tree):
            words = words_of(key)
            for value in OTHERS["object" if words is None else kind_of(words)]:
                load.refuses(put(tree, key, value), key)
            if words and kind_of(words) == "list":
                items = value_at(tree, key)
                for index in range(len(items)):
                    for value in OTHERS[kind_of(words.removeprefix("list of "))]:
                        load.refuses(put(tree, key, [*items[:index], value, *items[index + 1 :]]), key)


def beyond(key, words):
    """Numbers just outside and far outside the range that is given in words."""
    step = 1 if "integer" in words else 1e-9
    outside = []
    for sign, text in re.findall(r"(≥|≤|<|>) ([-+.e\d]+)", words):
        limit = json.loads(text)
        outside += {
            "≥": [limit - step, -(10**9), -(10**300)], ">": [limit, limit - step, -1e308],
            "≤": [limit + step, limit * 2 + 1, 10**300], "<": [limit, limit + step, 1e308],
        }[sign]  # fmt: skip
    if "integer" in words and "≤" not in words and key in ROWS:
        outside += [10**9 + 1, 10**30]
    return [int(value) for value in outside] if "integer" in words else outside


def check_out_of_range(load):
    """Below, above and far beyond every documented range; unknown names; lists too short and too long; broken text."""
    for tree in trees().values():
        for key in keys_of(tree):
            words = words_of(key)
            if words is None or words == "object":
                continue
            kind, value = kind_of(words), value_at(tree, key)
            if kind == "list":
                items = beyond(key, words)
                wrong = [[*value[:index], item, *value[index + 1 :]] for item in items for index in range(len(value))]
                wrong += {"milestones": [[3, 2], [2, 2]], "metrics": [["top3"], ["top1", ""]]}.get(key.split(".")[-1], [])
                wrong += [[], value[:2], [*value, value[0]]] if key.endswith((".mean", ".std")) else []
            elif kind == "choice":
                wrong = ["", value + value[-1], value.upper(), f" {value}", "other", "a\nb"]
                wrong = [text for text in wrong if text not in words.split(", ")]
            elif kind == "text":
                wrong = NO_SUCH_TEXT.get(key, [])
            else:
                wrong = [number for number in beyond(key, words) if not (key == "seed" and number > 0)]
            for item in wrong:
                load.refuses(put(tree, key, item), key)


def check_grids(load):
    """Every setting of every grid, misspelt and of wrong types, and the grid's own keys: the line names them."""
    for path in GRIDS:
        tree = {key: value for key, value in json.loads(path.read_text()).items() if key[0] not in "_$"}
        if "base" in tree:
            tree["base"] = str((path.parent / tree["base"]).resolve())
        for name, value in tree.get("variants", {}).items():
            tree["variants"][name] = str((path.parent / value).resolve()) if isinstance(value, str) else value
        for key in tree:
            load.refuses_grid({**tree, key + key[-1]: tree[key]}, f"{key}{key[-1]}: ", f"did you mean {key!r}?")
            load.refuses_grid({**tree, key: 3}, f"{key}: ")
            load.refuses_grid({**tree, key: [["a"]]}, f"{key}")
        for labels in [*tree.get("axes", {}).values(), tree.get("variants", {})]:
            for label, settings in list(labels.items()):
                for key in settings if isinstance(settings, dict) else ():
                    for wrong in ({f"{key}{key[-1]}": settings[key]}, {key: {"a": 1}}, {key: [["a"]]}, {"comet.api": "key"}):
                        labels[label] = {**{other: settings[other] for other in settings if other != key}, **wrong}
                        load.refuses_grid(tree, f"{next(iter(wrong))}: ")
                labels[label] = settings


INSERTED = {
    '"zz": 1, "zz": 2, ': (9, "key 'zz' is given twice in one object"),
    '"zz": NaN, ': (6, "NaN is not a finite number"),
    '"zz": -1e999, ': (6, "-1e999 is too large a number"),
    '"zz" 1, ': (5, "not valid JSON: Expecting ':' delimiter"),
    '"z\\ud800": 1, ': (0, "half a surrogate pair is no text"),
    '"z\udcff": 1, ': (2, "byte 0xff is not UTF-8 text"),
    f'"zz": {"[" * 10_000}': (6, "nested deeper than 100 levels"),
}
"""What is put after the opening brace of an object -> where in it the mistake is (of levels: the first), and which."""


def check_json(load):
    """Mistakes in every object of every shipped file, with line ends of Unix and of Windows: a line with line and column."""
    for file in [*FILES, *GRIDS]:
        text = file.read_text()
        assert load.text(b"\xef\xbb\xbf" + text.encode()) == json.loads(text)
        load.refuses_text(text.encode("utf-16"), 1, 1, "UTF-16")
        for brace in re.finditer(r"{(?!\s*})", text):
            before = text[: brace.end()]
            depth = before.count("{") + before.count("[") - before.count("}") - before.count("]")
            for inserted, (offset, reason) in INSERTED.items():
                line = before.count("\n") + 1
                column = len(before) - before.rfind("\n") + offset + (100 - depth if "deeper" in reason else 0)
                broken = (before + inserted + text[brace.end() :]).encode(errors="surrogateescape")
                load.refuses_text(broken, line, column, reason)
                load.refuses_text(broken.replace(b"\n", b"\r\n"), line, column, reason)


CHECKS = {check_deleted: 1, check_misspelt: 1, check_wrong_type: 1, check_out_of_range: 1, check_grids: 1, check_json: 1}
"""How many configs each of them loads: more where a config is added, never fewer."""


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_leaf_of_every_config_has_a_default_or_is_named(check, tmp_path):
    load = Loading(tmp_path / "config.json")
    check(load)
    assert load.count >= CHECKS[check]


def forgets_the_documented_default(monkeypatch):
    class Changed(Config):
        seed: int = 1

    monkeypatch.setattr(config_files, "Config", Changed)


def takes_unknown_keys(monkeypatch):
    class Lenient(Config):
        model_config = ConfigDict(**{**Config.model_config, "extra": "ignore"})

    monkeypatch.setattr(config_files, "Config", Lenient)


def takes_values_of_other_types(monkeypatch):
    class Lax(Config):
        model_config = ConfigDict(**{**Config.model_config, "strict": False})

    monkeypatch.setattr(config_files, "Config", Lax)


def names_no_key(monkeypatch):
    told = config_files._told
    monkeypatch.setattr(config_files, "_told", lambda problem: told(problem).partition(": ")[2])


def hints_at_nothing(monkeypatch):
    monkeypatch.setattr(config_files, "did_you_mean", lambda name, known: "")


def leaves_arguments_to_torch(monkeypatch):
    monkeypatch.setattr(optimization, "check_arguments", lambda *args, **kwargs: None)


def knows_no_ranges(monkeypatch):
    monkeypatch.setattr(config_arguments, "RANGES", {})


def has_no_bound(monkeypatch):
    class Unbounded(Config):
        n_gpu: int = 1

    monkeypatch.setattr(config_files, "Config", Unbounded)


def shows_keys_in_grids(monkeypatch):
    monkeypatch.setattr(grid, "_holds_key", lambda settings: False)


def lets_pass_what_python_does(monkeypatch):
    monkeypatch.setattr(json_file, "_refuse_values", lambda text: None)


def counts_columns_from_0(monkeypatch):
    class From0(json_file.JSONError):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.column -= 1

    monkeypatch.setattr(json_file, "JSONError", From0)


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
        (check_grids, takes_unknown_keys),
        (check_grids, shows_keys_in_grids),
        (check_json, lets_pass_what_python_does),
        (check_json, counts_columns_from_0),
    ],
)
def test_the_check_can_fail_where_a_safeguard_is_gone(check, break_it, monkeypatch, tmp_path):
    break_it(monkeypatch)
    with pytest.raises(AssertionError):
        check(Loading(tmp_path / "config.json"))
