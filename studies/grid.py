"""Grid files: a base config, axes, named variants and seeds, and the runs that they stand for.

{
    "base": "../small_robust.json",
    "axes": {
        "norm": {"BatchNorm": {"arch.args.norm_layer_type": "bn"}, "GroupNorm": {"arch.args.norm_layer_type": "gn"}},
        "training": {"standard": {"adversarial.method": "none"}, "PGD": {"adversarial.method": "pgd"}}
    },
    "variants": {"baseline": {}, "short": {"trainer.epochs": 5}, "other": "../another_config.json"},
    "seeds": [0, 1, 2]
}

Paths are relative to the grid file. Every combination of one label from each axis is a variant, called by its labels
(`BatchNorm_standard`); named variants are settings on top of the base, or another config file.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from base.config import Config
from base.config_files import is_comment, load_config, read_tree
from base.config_section import Count, Section
from base.errors import ConfigError
from base.optimization import check_optimization
from base.registry import did_you_mean
from base.resuming import WHERE_AND_HOW, forget
from base.study_file import Place, write_places

Settings = dict[str, Any]
"""Dotted config key -> value."""


class Grid(Section):
    """What a grid file may hold."""

    base: str | None = None
    """Config file that settings are put on top of; not needed where every variant is a file."""
    axes: dict[str, Annotated[dict[str, Settings], Field(min_length=1)]] = Field(default={})
    """Axis -> label -> settings."""
    variants: dict[str, Settings | str] = Field(default={})
    """Name -> settings, or the path of a config file."""
    seeds: list[Count] = Field(default=[0], min_length=1)
    """Seeds that every variant is run with."""


@dataclass(frozen=True, eq=False)
class Run:
    """One run of a study.

    Attributes:
        variant: its name in the grid.
        labels: axis -> label of the variant, if it comes from axes.
        position: place of the variant in the grid.
        seed: its seed.
        config_file: what it starts from.
        settings: what is put on top of it.
        config: the resolved config.
        folder: its run folder. The name ends in a hash of the resolved config; see `identity`.
    """

    variant: str
    labels: Mapping[str, str]
    position: int
    seed: int
    config_file: Path
    settings: Settings
    config: Config
    folder: Path

    @property
    def name(self) -> str:
        """The run's name in tables and messages."""
        return f"{self.variant} seed {self.seed}"

    @property
    def script(self) -> str:
        """The script that trains it."""
        return "train.py" if self.config.adversarial_method == "none" else "train_robust.py"

    def words(self) -> list[str]:
        """The command line that starts it, from the script on."""
        settings = [word for key, value in self.settings.items() for word in ("--set", f"{key}={as_word(value)}")]
        return [self.script, "-c", str(self.config_file), "--run_dir", str(self.folder), *settings, "--seed", str(self.seed)]

    def words_to_resume(self) -> list[str]:
        """The command line that continues it."""
        return [self.script, "-r", str(self.folder)]


def read_grid(path: Path) -> Grid:
    """The grid of a file.

    Raises:
        ConfigError: one line that names the file and what is wrong with it.
    """
    tree = {key: value for key, value in read_tree(path, Grid).items() if not is_comment(key)}
    try:
        grid = Grid.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"] if part not in ("str", "dict[str,any]"))
        hint = did_you_mean(key, list(Grid.model_fields)) if problem["type"] == "extra_forbidden" else ""
        raise ConfigError(f"{path}: {key}: {problem['msg']}{hint}") from None
    if not grid.axes and not grid.variants:
        raise ConfigError(f"{path}: neither axes nor variants: there is nothing to run")
    if grid.base is None and (grid.axes or not all(isinstance(value, str) for value in grid.variants.values())):
        raise ConfigError(f"{path}: base: required, as axes and variants are settings on top of it")
    return grid


@dataclass(frozen=True)
class Variant:
    """One variant of a grid: what its runs start from, what is put on top of that, and its axes' labels."""

    config_file: Path
    settings: Settings
    labels: Mapping[str, str]


def variants_of(grid: Grid, path: Path) -> dict[str, Variant]:
    """The variants by name, those of the axes first.

    Raises:
        ConfigError: two variants of one name, a name that is no folder name, a seed or a Comet key among the settings, or two
            axes that set the same key.
    """
    base = path.parent / (grid.base or "")
    named = [
        (name, Variant(path.parent / value, {}, {}) if isinstance(value, str) else Variant(base, value, {}))
        for name, value in grid.variants.items()
    ]
    found: dict[str, Variant] = {}
    for name, variant in [*_combinations(grid, path, base), *named]:
        if name in found:
            raise ConfigError(f"{path}: {name}: two variants have this name")
        if not re.fullmatch(r"[\w .+=%-]+", name) or name.strip(". ") != name:
            raise ConfigError(f"{path}: {name!r}: a variant's name is made of letters, digits, spaces and _ . + = % -")
        if "seed" in variant.settings:
            raise ConfigError(f"{path}: {name}: seed: belongs into the grid's seeds")
        if _holds_key(variant.settings):
            raise ConfigError(f"{path}: {name}: comet.api: would be shown and stored with the run's command; set COMET_API_KEY")
        found[name] = variant
    return found


def plan(path: Path, names: Sequence[str] = (), seeds: Sequence[int] = (), save_dir: Path | None = None) -> list[Run]:
    """The runs that a grid file stands for, seeds of one variant side by side. All configs are checked; nothing is written.

    Args:
        path: the grid file.
        names: the variants to run; all by default.
        seeds: instead of the grid's.
        save_dir: folder of the study's run folders; by default `trainer.save_dir` of each config, and in it the grid's name.

    Raises:
        ConfigError: anything that is wrong with the grid, a name, or a config.
    """
    grid = read_grid(path)
    variants = variants_of(grid, path)
    for name in names:
        if name not in variants:
            raise ConfigError(
                f"{path}: no variant {name!r}{did_you_mean(name, list(variants))} (it has: {', '.join(variants)})"
            )
    runs: dict[str, Run] = {}
    order = list(variants)
    for name in dict.fromkeys(names or order):
        for seed in dict.fromkeys(seeds or grid.seeds):
            run = _run(path, name, order.index(name), seed, variants[name], save_dir)
            twin = runs.setdefault(identity(run.config, run.settings), run)
            if twin is not run:
                raise ConfigError(f"{path}: {twin.variant} and {run.variant} are the same config: one name is enough")
    return list(runs.values())


def record(runs: Sequence[Run]) -> None:
    """Write beside the run folders which variant each of them is, for the reports."""
    for parent in dict.fromkeys(run.folder.parent for run in runs):
        own = [run for run in runs if run.folder.parent == parent]
        write_places(parent, {run.folder.name: Place(run.variant, run.position, run.labels) for run in own})


def describe(runs: Sequence[Run]) -> list[str]:
    """One line per variant: name, what it starts from, settings, seeds."""
    lines = []
    for variant in dict.fromkeys(run.variant for run in runs):
        own = [run for run in runs if run.variant == variant]
        settings = "".join(f", {key}={as_word(value)}" for key, value in own[0].settings.items())
        lines.append(f"{variant}: {own[0].config_file.name}{settings} (seeds {', '.join(str(run.seed) for run in own)})")
    return lines


def identity(config: Config, settings: Settings) -> str:
    """A hash of everything in a config that can change a result, and of whatever else the grid itself sets.

    `WHERE_AND_HOW` is left out, so that a study can go on elsewhere, unless that is what the grid
    compares; of a noise file remains that there is one.
    """
    tree = config.dump()
    for key in WHERE_AND_HOW:
        if not any(setting == key or setting.startswith(f"{key}.") for setting in settings):
            forget(tree, key)
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:10]


def as_word(value: Any) -> str:
    """A value as `--set` takes it: a bare word where that means the same, JSON otherwise."""
    if isinstance(value, str):
        try:
            json.loads(value)
        except (ValueError, RecursionError):
            return value
    return json.dumps(value)


def _holds_key(settings: Settings) -> bool:
    """Whether a Comet key is among the settings, which become words of command lines."""
    comet = settings.get("comet")
    return "comet.api" in settings or (comet is not None and (not isinstance(comet, dict) or "api" in comet))


def _combinations(grid: Grid, path: Path, base: Path) -> list[tuple[str, Variant]]:
    if not grid.axes:
        return []
    found = []
    for labels in product(*(axis.items() for axis in grid.axes.values())):
        settings: Settings = {}
        for _, part in labels:
            twice = settings.keys() & part.keys()
            if twice:
                raise ConfigError(f"{path}: axes: two of them set {min(twice)}")
            settings |= part
        names = [label for label, _ in labels]
        found.append(("_".join(names), Variant(base, settings, dict(zip(grid.axes, names, strict=True)))))
    return found


def _run(path: Path, name: str, position: int, seed: int, variant: Variant, save_dir: Path | None) -> Run:
    file, settings = variant.config_file, variant.settings
    overrides = [*((key, as_word(value)) for key, value in settings.items()), ("seed", str(seed))]
    try:
        config = load_config(file, overrides)
        check_optimization(config.optimizer, config.lr_scheduler)
    except ConfigError as error:
        raise ConfigError(f"{path}: {name}: {error}") from None
    if config.comet is not None:  # submitit writes runs into files; a run's own process reads the key from the config file
        config = config.model_copy(update={"comet": config.comet.model_copy(update={"api": None})})
    parent = save_dir or Path(config.trainer.save_dir) / path.stem
    return Run(
        name,
        variant.labels,
        position,
        seed,
        Path(os.path.relpath(file)),
        settings,
        config,
        parent / f"{name.replace(' ', '-')}_seed{seed}_{identity(config, settings)}",
    )
