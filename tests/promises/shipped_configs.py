"""What ships under `configs/`, what `configs/README.md` documents about it, and a loader that
counts what it refuses."""

import json
import re
from functools import cache
from pathlib import Path

from base.config import files, strict_json
from base.config.adversarial import PGDAttackConfig
from base.config.config import ArchArgs, DataLoaderArgs
from base.config.training import OptimizerConfig, SchedulerConfig
from base.errors import ConfigError
from base.optim import check_optimization
from studies import grid

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
GRIDS = sorted((CONFIGS / "ablations").glob("*.json"))
SCHEMAS = [CONFIGS / "schema.json", CONFIGS / "grid_schema.json"]
FILES = [file for file in sorted(CONFIGS.rglob("*.json")) if file not in [*GRIDS, *SCHEMAS]]
ARGUMENTS = {
    "lr": "number ≥ 0",
    "momentum": "number ≥ 0, < 1",
    "dampening": "number ≥ 0, ≤ 1",
    "weight_decay": "number ≥ 0",
    "nesterov": "true, false",
    "milestones": "list of integer ≥ 1",
    "gamma": "number ≥ 0",
}
"""Arguments of SGD and MultiStepLR, the only ones that shipped configs give, as torch documents
them."""
REFUSED_TEXT = {
    "name": ["", ".", "..", "a/b", "a\\b", "a\nb", "a\0b", "\x7f", "n" * 256, "é" * 128],
    "trainer.monitor": [
        "",
        "max",
        "max test_top1",
        "maximal val_top1",
        "val_top1",
        "max val_top2",
        "Off",
        "max val_top1 ",
    ],
    "trainer.save_dir": ["", "a\0b"],
    "trainer.noise_file": ["", "a\0b"],
    "data_loader.args.data_dir": ["", "a\0b", "**data dir**"],
    "system.device": ["", "gpu", "CUDA", "cuda:", "cuda:-1", "cuda:999", "meta", "cpu:1", "mps:1"],
    "optimizer.type": ["", "sgd", "SDG", "torch.optim.SGD", "Optimizer", "LBFGS", "__import__"],
    "lr_scheduler.type": ["", "multisteplr", "MultiStep", "LRScheduler", "LambdaLR", "None"],
    "lr_scheduler.monitor": ["", "val_lss", "test_loss", "max val_loss"],
}
"""Texts that these keys refuse. Other keys take any text."""
OTHERS = {
    "integer": ["text", "7", 2.5, 7.0, True, [1], {"a": 1}],
    "number": ["text", "0.5", False, [0.5], {"a": 0.5}],
    "text": [3, 2.5, True, ["a"], {"a": "b"}],
    "true, false": ["true", "", 0, 1, 0.5, [True], {"a": True}],
    "list": ["text", 3, 0.5, True, {"a": 1}],
    "object": ["text", 3, 0.5, True, [1]],
    "choice": [3, 0.5, True, ["a"], {"a": "b"}],
    "choice of numbers": ["text", "3", 2.5, [1], {"a": 1}],
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


OPEN = {"arch.args": ArchArgs, "data_loader.args": DataLoaderArgs, "pgd_attack": PGDAttackConfig}
"""Sections that hold arguments only if they are given, as a constructor has their defaults."""
LEFT_TO_CONSTRUCTORS = {
    f"{section}.{key}"
    for section, cls in OPEN.items()
    for key in cls.known_fields().keys() - cls.model_fields.keys()
}


def of_others(section, chosen):
    """The arguments that only other entries of a section's table take."""
    choice = section.choices[0]
    return set(choice.known_keys()) - set(choice.arguments(chosen))


CHOSEN = {"arch.args": "resnet18", "data_loader.args": "ImageFolderDataLoader", "pgd_attack": "pgd"}
OF_OTHERS = {section: of_others(OPEN[section], name) for section, name in CHOSEN.items()}


def with_every_key():
    """Return a config with a value at every key of the reference that its parts take."""
    tree = {}
    special = {
        "data_loader.type": "ImageFolderDataLoader",
        "trainer.monitor": "max val_top1",
        "lr_scheduler.monitor": "val_loss",
        "lr_scheduler.type": "MultiStepLR",
        "system.device": "cpu",
        "optimizer.type": "SGD",
        "data_loader.args.mean": [0.5] * 3,
        "data_loader.args.std": [0.2] * 3,
        "metrics": ["top1", "my_metric2"],
        "trainer.percent": 0,
        "num_classes": 1,
        "optimizer.args": {
            "lr": 0.1,
            "momentum": 0.9,
            "dampening": 0,
            "weight_decay": 0,
            "nesterov": True,
        },
        "lr_scheduler.args": {"milestones": [1, 3], "gamma": 0.1},
        "imports": [{"module": "json"}],
        "data_loader.args.channels": 3,
        "pgd_attack.type": "pgd",
    }
    by_kind = {"integer": 1, "number": 0.5, "text": "text", "true, false": False}
    for key, (words, _) in ROWS.items():
        kind = kind_of(words)
        *sections, name = key.split(".")
        if name in OF_OTHERS.get(".".join(sections), ()):
            continue
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = special.get(
            key, words.split(", ")[0] if kind == "choice" else by_kind.get(kind)
        )
    return tree


def trees():
    """Return name -> tree of every shipped config, and of one with every documented key."""
    return {
        "every key": with_every_key(),
        **{str(file.relative_to(CONFIGS)): resolved(file) for file in FILES},
    }


def kind_of(words):
    if words.startswith("list of"):
        return "list"
    if words.replace(", ", "").isdigit():
        return "choice of numbers"
    first = words.split()[0]
    if words == "true, false":
        return words
    if first in ("integer", "number", "text", "object"):
        return first
    return "choice"


def words_of(key):
    """Return the documented type of a key; None for a section."""
    section, _, name = key.rpartition(".")
    if section in ("optimizer.args", "lr_scheduler.args"):
        return ARGUMENTS[name]
    if key in ROWS:
        return ROWS[key][0]
    return None


def keys_of(tree, path=""):
    """The dotted keys of all leaves and sections."""
    for key, value in tree.items():
        yield path + key
        if isinstance(value, dict):
            yield from keys_of(value, f"{path}{key}.")


def distinct_keys():
    """The keys of all trees, each with its tree's name and its tree; one of those that are alike.

    Keys are alike if they have the same value, stand beside the same names, and the same type of
    part and the same training method decide which arguments are known there.
    """
    seen = set()
    for tree_name, tree in trees().items():
        for key in keys_of(tree):
            section, _, rest = key.partition(".")
            kind = value_at(tree, f"{section}.type") if rest else None
            alike = json.dumps(
                [
                    key,
                    value_at(tree, key),
                    sorted(siblings_of(tree, key)),
                    kind,
                    value_at(tree, "adversarial.method"),
                ]
            )
            if alike not in seen:
                seen.add(alike)
                yield tree_name, tree, key


def siblings_of(tree, key):
    """The section that a key stands in."""
    section = key.rpartition(".")[0]
    return value_at(tree, section) if section else tree


def changed(tree, key, change):
    """Return a copy of the tree after `change(section, name)` at a dotted key."""
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


def beyond(key, words):
    """Numbers just outside and far outside the range that is given in words."""
    step = 1 if "integer" in words else 1e-9
    outside = []
    for sign, text in re.findall(r"(≥|≤|<|>) ([-+.e\d]+)", words):
        limit = json.loads(text)
        outside += {
            "≥": [limit - step, -(10**9), -(10**300)],
            ">": [limit, limit - step, -1e308],
            "≤": [limit + step, limit * 2 + 1, 10**300],
            "<": [limit, limit + step, 1e308],
        }[sign]
    if "integer" in words and "≤" not in words and key in ROWS:
        outside += [10**9 + 1, 10**30]
    return [int(value) for value in outside] if "integer" in words else outside


class Loading:
    """Loads configs, counts them, and asserts that invalid ones are refused in one line."""

    def __init__(self, file=None):
        self.file, self.count = file, 0
        self.check = cache(lambda text: check_optimization(*map(_section, json.loads(text))))

    def __call__(self, tree):
        """Load a config as `load_config` does from a file's text on."""
        self.count += 1
        files.requests_of(tree.get("imports", []), "config.json: imports", CONFIGS)
        config = files.validate(strict_json.parse_json(json.dumps(tree)), "config.json")
        self.check(json.dumps([config.optimizer.model_dump(), config.lr_scheduler.model_dump()]))
        return config

    def text(self, data):
        self.count += 1
        self.file.write_bytes(data)
        return strict_json.read_json_object(self.file)

    def refuses(self, tree, key, *also):
        message = self.message(lambda: self(tree), key)
        assert re.search(rf"(^|: ){re.escape(key)}(\.\d+)?: ", message), (
            f"does not name {key}: {message}"
        )
        assert all(text in message for text in also), message

    def refuses_deletion(self, tree, key):
        self.count += 1
        message = self.message(lambda: files.override(tree, [(key, "null")]), key)
        assert message.startswith(f"--set {key}"), message
        assert f": {key}: unknown key; did you mean " in message, message

    def refuses_grid(self, tree, *texts):
        self.count += 1
        self.file.write_text(json.dumps(tree))
        message = self.message(lambda: grid.plan(self.file, seeds=[0]), texts[0])
        assert all(text in message for text in texts), message

    def refuses_text(self, data, expected):
        message = self.message(lambda: self.text(data), expected)
        assert message.startswith(f"{self.file}: {expected}"), message

    def message(self, load, what):
        try:
            load()
        except ConfigError as error:
            message = str(error)
        else:
            raise AssertionError(f"{what}: accepted")
        assert "\n" not in message
        return message


def _section(values):
    return (SchedulerConfig if "interval" in values else OptimizerConfig)(**values)
