"""Grid files: a base config, axes, named variants and seeds, and the runs that they stand for.

{
    "base": "../small_robust.json",
    "axes": {
        "norm": {"BatchNorm": {"arch.args.norm_layer_type": "bn"}, "GroupNorm":
        {"arch.args.norm_layer_type": "gn"}}, "training": {"standard": {"adversarial.method":
        "none"}, "PGD": {"adversarial.method": "pgd"}}
    },
    "variants": {"baseline": {}, "short": {"trainer.epochs": 5}, "other": "../another_config.json"},
    "seeds": [0, 1, 2],
    "_unused_ok": true
}

Paths are relative to the grid file. Every combination of one label from each axis is a variant,
called by its labels (`BatchNorm_standard`); named variants are settings on top of the base, or
another config file. What base and files name in `imports` is run, as if `-c` named them.
`_unused_ok`, which may be left out, is passed on to every run: see `base.config.warnings`."""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PrivateAttr, ValidationError

from base.config import Config, Override, load_config
from base.config.files import check_optimization_of, override, read_tree
from base.config.imports import FLAG
from base.config.origins import Flag
from base.config.section import Count, Section, lies_in
from base.config.strict_json import read_json_object
from base.config.tree import is_comment
from base.config.warnings import UNUSED_OK
from base.errors import ConfigError
from base.registry import did_you_mean
from base.run_folder.study_index import Place, write_places
from base.text import one_line
from studies.identity import identity, is_place

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
    _unused_ok: Any = PrivateAttr(default=None)


@dataclass(frozen=True, eq=False)
class Run:
    """One run of a study.

    Attributes:
        variant: its name in the grid.
        labels: axis -> label of the variant, if it comes from axes.
        position: place of the variant in the grid.
        seed: its seed.
        config_file: what it starts from.
        settings: what the grid puts on top of it.
        config: the resolved config.
        folder: its run folder. The name ends in a hash of the resolved config; see `identity`.
        overrides: what the command line puts on top of every variant.
        imports: the user's code that the command line names, without what configs name.
        grid: the file that it is read from.
    """

    variant: str
    labels: Mapping[str, str]
    position: int
    seed: int
    config_file: Path
    settings: Settings
    config: Config
    folder: Path
    overrides: tuple[Override, ...] = ()
    imports: tuple[str, ...] = ()
    grid: Path = Path()

    @property
    def name(self) -> str:
        """The run's name in tables and messages."""
        return f"{self.variant} seed {self.seed}"

    @property
    def script(self) -> str:
        """The script that trains it."""
        return "train_robust.py" if self.config.attacks_while_training else "train.py"

    def words(self) -> list[str]:
        """The command line that starts it, from the script on."""
        settings = [(key, format_value(value)) for key, value in self.settings.items()]
        words = [self.script, "-c", str(self.config_file), "--run_dir", str(self.folder)]
        words += _words(FLAG, self.imports)
        return [*words, *set_words([*settings, *self.overrides]), "--seed", str(self.seed)]

    def words_to_resume(self, changes: Sequence[Override] = ()) -> list[str]:
        """The command line that continues it, with other values of some keys.

        It names all of the user's code, as a run folder by itself runs none.
        """
        imports = [code.file_or_module for code in self.config.imports]
        return [self.script, "-r", str(self.folder), *_words(FLAG, imports), *set_words(changes)]

    def words_of_study(self) -> list[str]:
        """What `run_ablations.py` is told to work on this run alone."""
        words = ["--grid", str(self.grid), f"--config={self.variant}", "--seed", str(self.seed)]
        words += ["--save_dir", str(self.folder.parent), *_words(FLAG, self.imports)]
        return [*words, *set_words(self.overrides)]


def read_grid(path: Path) -> Grid:
    """The grid of a file.

    Raises:
        ConfigError: one line that names the file and what is wrong with it.
    """
    whole = read_tree(path, Grid)
    tree = {key: value for key, value in whole.items() if not is_comment(key)}
    try:
        grid = Grid.model_validate_json(json.dumps(tree))
        grid._unused_ok = whole.get(UNUSED_OK)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"] if part not in ("str", "dict[str,any]"))
        if problem["type"] == "extra_forbidden":
            known = list(Grid.model_fields)
            raise ConfigError(
                f"{path}: {key}: unknown key{did_you_mean(key, known)} (known here: {', '.join(known)})"
            ) from None
        given = one_line(json.dumps(problem["input"]), 80)
        raise ConfigError(f"{path}: {key}: {problem['msg']}, not {given}") from None
    if not grid.axes and not grid.variants:
        raise ConfigError(f"{path}: neither axes nor variants: there is nothing to run")
    if grid.base is None and (
        grid.axes or not all(isinstance(value, str) for value in grid.variants.values())
    ):
        raise ConfigError(f"{path}: base: required, as axes and variants are settings on top of it")
    return grid


@dataclass(frozen=True)
class Variant:
    """One variant of a grid.

    Attributes:
        config_file: what its runs start from.
        settings: what is put on top of that.
        places: dotted key of a setting -> where it stands in the grid file, such as
            `axes.norm.GroupNorm`.
        labels: its label on each axis.
    """

    config_file: Path
    settings: Settings
    places: Mapping[str, str]
    labels: Mapping[str, str]

    def overrides(self, path: Path) -> list[Override]:
        """Its settings as overrides whose errors name the grid file."""
        return [
            Flag(
                (key, format_value(value)),
                f"{path}: {self.places[key]}" if key in self.places else f"{path}",
            )
            for key, value in self.settings.items()
        ]


def variants_of(grid: Grid, path: Path) -> dict[str, Variant]:
    """The variants by name, those of the axes first.

    Raises:
        ConfigError: two variants of one name, a name that cannot be a folder's, a seed, imports or
            a Comet key among the settings, or two axes that set the same key.
    """
    base = path.parent / (grid.base or "")
    quiet = {} if grid._unused_ok is None else {UNUSED_OK: grid._unused_ok}
    named = []
    for name, value in grid.variants.items():
        if isinstance(value, str):
            named.append((name, Variant(path.parent / value, {}, {}, {})))
        else:
            named.append((name, Variant(base, value, dict.fromkeys(value, f"variants.{name}"), {})))
    found: dict[str, Variant] = {}
    for name, variant in [*_combinations(grid, path, base), *named]:
        if name in found:
            raise ConfigError(f"{path}: {name}: two variants have this name")
        if not re.fullmatch(r"[\w .+=%-]+", name) or name.strip(". ") != name:
            raise ConfigError(
                f"{path}: {name!r}: a variant's name is made of letters, digits, spaces and _ . + = % -"
            )
        if "seed" in variant.settings:
            raise ConfigError(f"{path}: {name}: seed: belongs into the grid's seeds")
        if any(lies_in(key, ["imports"]) for key in variant.settings):
            raise ConfigError(
                f"{path}: {name}: imports: belongs into the base config, or after {FLAG}"
            )
        if _holds_key(variant.settings):
            raise ConfigError(
                f"{path}: {name}: comet.api: would be shown and stored with the run's command; set COMET_API_KEY"
            )
        found[name] = replace(variant, settings=quiet | variant.settings)
    return found


def plan(
    path: Path,
    names: Sequence[str] = (),
    seeds: Sequence[int] = (),
    save_dir: Path | None = None,
    overrides: Sequence[Override] = (),
    imports: Sequence[str] = (),
) -> list[Run]:
    """The runs that a grid file stands for, seeds of one variant side by side. All configs are
    checked; nothing is written.

    Args:
        path: the grid file.
        names: the variants to run; all by default.
        seeds: instead of the grid's.
        save_dir: folder of the study's run folders; by default `trainer.save_dir` of each config,
            and in it the grid's name.
        overrides: dotted keys and the texts of their values, put on top of every variant.
        imports: the user's own files and modules to import, as `--imports` names them, beside those
            of the configs.

    Raises:
        ConfigError: anything that is wrong with the grid, a name, an override (also one of a key
            that the grid itself varies), or a config.
    """
    grid = read_grid(path)
    _check_overrides(overrides)
    variants = variants_of(grid, path)
    _check_left_alone(overrides, variants, path)
    for name in names:
        if name not in variants:
            raise ConfigError(
                f"{path}: no variant {name!r}{did_you_mean(name, list(variants))} (it has: {', '.join(variants)})"
            )
    runs: dict[str, Run] = {}
    order = list(variants)
    for name in dict.fromkeys(names or order):
        for seed in dict.fromkeys(seeds or grid.seeds):
            run = _run(
                path, name, order.index(name), seed, variants[name], save_dir, overrides, imports
            )
            for same in (run.folder.name.rpartition("_")[2], json.dumps(run.config.dump())):
                twin = runs.setdefault(same, run)
                if twin is not run:
                    with_set = " ".join([" with", *set_words(overrides)]) if overrides else ""
                    both = f"{twin.variant} and {run.variant} are the same config{with_set}"
                    raise ConfigError(f"{path}: {both}: one name is enough")
    return list(dict.fromkeys(runs.values()))


def record(runs: Sequence[Run]) -> None:
    """Write beside the run folders which variant each of them is, for the reports."""
    for parent in dict.fromkeys(run.folder.parent for run in runs):
        own = [run for run in runs if run.folder.parent == parent]
        write_places(
            parent, {run.folder.name: Place(run.variant, run.position, run.labels) for run in own}
        )


def describe(runs: Sequence[Run]) -> list[str]:
    """One line per variant: its name, what it starts from, its settings and seeds.

    The settings are those of the variant (where it has none, those of its config file itself),
    those of the command line, and the value of every other key in which the variants differ."""
    firsts: dict[str, Run] = {}
    for run in runs:
        firsts.setdefault(run.variant, run)
    values = {variant: dict(_leaves(run.config.dump())) for variant, run in firsts.items()}
    varied = {
        key
        for leaves in values.values()
        for key, value in leaves.items()
        if not is_place(key) and any(other.get(key) != value for other in values.values())
    }
    lines = []
    for variant, run in firsts.items():
        settings = {key: value for key, value in run.settings.items() if not is_comment(key)}
        given = dict(settings or _own_keys(run.config_file, values[variant]))
        given |= {key: value for key, value in values[variant].items() if key in varied}
        words = {key: format_value(value) for key, value in given.items()} | dict(run.overrides)
        settings = "".join(f", {key}={text}" for key, text in words.items())
        seeds = ", ".join(str(other.seed) for other in runs if other.variant == variant)
        lines.append(f"{variant}: {run.config_file.name}{settings} (seeds {seeds})")
    return lines


def set_words(settings: Iterable[Override]) -> list[str]:
    """The words of a command line that set these keys."""
    return _words("--set", [f"{key}={text}" for key, text in settings])


def _words(flag: str, values: Iterable[str]) -> list[str]:
    return [word for value in values for word in (flag, value)]


def format_value(value: Any) -> str:
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
    return "comet.api" in settings or (
        comet is not None and (not isinstance(comet, dict) or "api" in comet)
    )


def _combinations(grid: Grid, path: Path, base: Path) -> list[tuple[str, Variant]]:
    if not grid.axes:
        return []
    found = []
    for labels in product(*(axis.items() for axis in grid.axes.values())):
        settings: Settings = {}
        places: dict[str, str] = {}
        for axis, (label, part) in zip(grid.axes, labels, strict=True):
            twice = settings.keys() & part.keys()
            if twice:
                raise ConfigError(f"{path}: axes: two of them set {min(twice)}")
            settings |= part
            places |= dict.fromkeys(part, f"axes.{axis}.{label}")
        names = [label for label, _ in labels]
        labels_of_axes = dict(zip(grid.axes, names, strict=True))
        found.append(("_".join(names), Variant(base, settings, places, labels_of_axes)))
    return found


def _check_overrides(overrides: Sequence[Override]) -> None:
    """Refuse what a study's command line may not set, naming the flag."""
    for key, text in overrides:
        if key == "seed":
            raise ConfigError(f"--set seed={text}: the seeds of a study are given by --seed")
        tree = override({}, [(key, text)])
        if _holds_key(tree):
            reason = "would be shown and stored with the runs' commands; set COMET_API_KEY"
            raise ConfigError(f"--set {key}: {reason}")


def _check_left_alone(
    overrides: Sequence[Override], variants: Mapping[str, Variant], path: Path
) -> None:
    """Refuse to set what the grid compares: a variant's name would say what its runs are not.

    Raises:
        ConfigError: naming the flag and the values that the variants have.
    """
    varied = _varied(variants, path) if overrides else {}
    for key, text in overrides:
        for leaf, values in varied.items():
            if lies_in(leaf, [key]) or lies_in(key, [leaf]):
                raise ConfigError(f"--set {key}={text}: {path} itself varies {leaf} ({values})")


def _varied(variants: Mapping[str, Variant], path: Path) -> dict[str, str]:
    """The dotted keys in which the variants of a grid differ -> the first values, in words.

    Where files lie in different places they do not compare those.
    """
    trees = {name: _tree_of(path, name, variant) for name, variant in variants.items()}
    set_by_grid = {key for variant in variants.values() for key in variant.settings}
    found = {}
    for leaf in dict.fromkeys(leaf for tree in trees.values() for leaf in tree):
        if is_place(leaf) and not any(lies_in(leaf, [key]) for key in set_by_grid):
            continue
        first_with: dict[str, str] = {}
        for name, tree in trees.items():
            value = format_value(tree[leaf]) if leaf in tree else "its default"
            first_with.setdefault(value, name)
        if len(first_with) > 1:
            found[leaf] = ", ".join(
                f"{value} in {name}" for value, name in list(first_with.items())[:3]
            )
    return found


def _tree_of(path: Path, name: str, variant: Variant) -> Settings:
    """Dotted key and value of everything that the files and the grid say of a variant."""
    settings = [setting for setting in variant.overrides(path) if not is_comment(setting[0])]
    try:
        return dict(_leaves(override(read_tree(variant.config_file), settings)))
    except ConfigError as error:
        raise _of_variant(error, path, name) from None


def _run(
    path: Path,
    name: str,
    position: int,
    seed: int,
    variant: Variant,
    save_dir: Path | None,
    overrides: Sequence[Override],
    imports: Sequence[str],
) -> Run:
    file, settings, own = variant.config_file, variant.settings, variant.overrides(path)
    try:
        config = _config(file, [*own, *overrides], seed, imports)
    except ConfigError as error:
        raise _of_variant(error, path, name) from None
    named_by = config
    kept = [(key, text) for key, text in overrides if not (is_place(key) and key in settings)]
    if len(kept) < len(overrides):
        # the grid compares places: its runs keep the names that they have with the grid's values
        named_by = _config(file, [*own, *kept], seed, imports)
    parent = save_dir or Path(config.trainer.save_dir) / path.stem
    return Run(
        name,
        variant.labels,
        position,
        seed,
        Path(os.path.relpath(file)),
        settings,
        config,
        parent / f"{name.replace(' ', '-')}_seed{seed}_{identity(named_by, settings)}",
        tuple(overrides),
        tuple(imports),
        path,
    )


def _of_variant(error: ConfigError, path: Path, variant: str) -> ConfigError:
    """The error of a variant. What is wrong with the grid itself, or with a flag, says so
    already."""
    text = str(error)
    if text.startswith(f"{path}: "):
        return error
    if text.startswith("--"):
        return ConfigError(f"{text} ({path}: {variant})")
    return ConfigError(f"{path}: {variant}: {text}")


def _config(file: Path, overrides: Sequence[Override], seed: int, imports: Sequence[str]) -> Config:
    """The checked config of a run, without Comet's key.

    So nothing that shows or stores a run can give it away; the run's process reads it itself.
    """
    config = load_config(file, [*overrides, Flag(("seed", str(seed)), f"--seed {seed}")], imports)
    check_optimization_of(config)
    if config.comet is not None:
        comet = config.comet.model_copy(update={"api": None})
        config = config.model_copy(update={"comet": comet})
    return config


def _own_keys(file: Path, resolved: Mapping[str, Any]) -> Settings:
    """What a config file says itself, without its parents.

    Secrets are left out: `resolved`, the leaves of the resolved config, does not hold them.
    """
    own = dict(_leaves(read_json_object(file)))
    return {key: value for key, value in own.items() if key in resolved or value is None}


def _leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything in a tree, objects and comments aside."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}{key}.")
        elif not is_comment(key):
            yield path + key, value
