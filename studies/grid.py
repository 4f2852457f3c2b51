"""Grid files: a base config, axes, named variants and seeds, and the runs that they describe.

    {
        "base": "../small_robust.json",
        "axes": {
            "norm": {
                "BatchNorm": {"arch.args.norm_layer_type": "bn"},
                "GroupNorm": {"arch.args.norm_layer_type": "gn"}
            },
            "training": {
                "standard": {"adversarial.method": "none"},
                "PGD": {"adversarial.method": "pgd"}
            }
        },
        "variants": {
            "baseline": {},
            "short": {"trainer.epochs": 5},
            "other": "../another_config.json"
        },
        "seeds": [0, 1, 2],
        "_unused_ok": true
    }

Paths are relative to the grid file. Every combination of one label from each axis is a variant,
named after its labels (`BatchNorm_standard`). A named variant is either settings on top of the base
or another config file. The code that the base and these files name in `imports` is run, as if `-c`
named them. The optional key `_unused_ok` is passed on to every run: see `base.config.warnings`.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PrivateAttr, ValidationError

from base.config import Config, Override, load_config
from base.config.files import check_optimization_of, override, read_tree
from base.config.imports import FLAG
from base.config.origins import Flag
from base.config.same_experiment import config_hash, is_place
from base.config.section import Count, Section, lies_in
from base.config.tree import is_comment, leaves, without_comments
from base.config.warnings import UNUSED_OK
from base.errors import ConfigError
from base.output import writing
from base.registry import did_you_mean
from base.run_folder.study_index import StudyEntry, write_study_index
from base.text import counted, one_line

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


def read_grid(path: Path) -> Grid:
    """Read a grid file.

    Raises:
        ConfigError: one line that names the file and what is wrong with it.
    """
    whole = read_tree(path, Grid)
    tree = {key: value for key, value in whole.items() if not is_comment(key)}
    try:
        grid = Grid.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        raise ConfigError(f"{path}: {_describe_problem(error)}") from None
    # Every other reader takes this key for a comment, so it is not a field of Grid
    grid._unused_ok = whole.get(UNUSED_OK)
    if not grid.axes and not grid.variants:
        raise ConfigError(f"{path}: neither axes nor variants: there is nothing to run")
    all_are_files = all(isinstance(value, str) for value in grid.variants.values())
    if grid.base is None and (grid.axes or not all_are_files):
        raise ConfigError(f"{path}: base: required, as axes and variants are settings on top of it")
    return grid


def _describe_problem(error: ValidationError) -> str:
    """Describe the first problem that pydantic has found, with the dotted key where it is."""
    problem = error.errors()[0]
    # pydantic adds the name of the union's member that it has tried
    parts = [str(part) for part in problem["loc"] if part not in ("str", "dict[str,any]")]
    key = ".".join(parts)
    if problem["type"] == "extra_forbidden":
        known = list(Grid.model_fields)
        hint = did_you_mean(key, known)
        return f"{key}: unknown key{hint} (known here: {', '.join(known)})"
    return f"{key}: {problem['msg']}, not {one_line(json.dumps(problem['input']), 80)}"


@dataclass(frozen=True)
class Variant:
    """One variant of a grid.

    Attributes:
        config_file: the config that its runs start from.
        settings: the values that are put on top of it.
        origins: dotted key of a setting -> where it stands in the grid file, such as
            `axes.norm.GroupNorm`.
        labels: its label on each axis.
    """

    config_file: Path
    settings: Settings
    origins: Mapping[str, str]
    labels: Mapping[str, str]

    def overrides(self, path: Path) -> list[Override]:
        """Return its settings as overrides whose errors name the grid file."""
        overrides = []
        for key, value in self.settings.items():
            origin = str(path)
            if key in self.origins:
                origin = f"{path}: {self.origins[key]}"
            overrides.append(Flag((key, format_value(value)), origin))
        return overrides


def variants_of(grid: Grid, path: Path) -> dict[str, Variant]:
    """Return the variants by name, those of the axes first.

    Raises:
        ConfigError: two variants have the same name; a name cannot be that of a folder; a seed,
            imports or a Comet key is among the settings; or two settings of a variant set the same
            value.
    """
    base = path.parent / (grid.base or "")
    all_variants = _combinations(grid, path, base)
    for name, value in grid.variants.items():
        if isinstance(value, str):
            variant = Variant(path.parent / value, {}, {}, {})
        else:
            variant = Variant(base, value, dict.fromkeys(value, f"variants.{name}"), {})
        all_variants.append((name, variant))
    unused_ok = {}
    if grid._unused_ok is not None:
        unused_ok = {UNUSED_OK: grid._unused_ok}
    by_name: dict[str, Variant] = {}
    for name, variant in all_variants:
        if name in by_name:
            raise ConfigError(f"{path}: {name}: two variants have this name")
        _check_variant(name, variant.settings, path)
        by_name[name] = replace(variant, settings=unused_ok | variant.settings)
    return by_name


def _combinations(grid: Grid, path: Path, base: Path) -> list[tuple[str, Variant]]:
    """Return name and variant of every combination of one label from each axis."""
    # Without axes, product() would yield one combination of no labels
    if not grid.axes:
        return []
    combinations = []
    for chosen in product(*(axis.items() for axis in grid.axes.values())):
        settings: Settings = {}
        origins: dict[str, str] = {}
        labels: dict[str, str] = {}
        for axis, (label, part) in zip(grid.axes, chosen, strict=True):
            twice = settings.keys() & part.keys()
            if twice:
                raise ConfigError(f"{path}: axes: two of them set {min(twice)}")
            settings |= part
            origins |= dict.fromkeys(part, f"axes.{axis}.{label}")
            labels[axis] = label
        combinations.append(("_".join(labels.values()), Variant(base, settings, origins, labels)))
    return combinations


def _check_variant(name: str, settings: Settings, path: Path) -> None:
    # The name becomes a part of the run folder's name
    if not re.fullmatch(r"[\w .+=%-]+", name) or name.strip(". ") != name:
        raise ConfigError(
            f"{path}: {name!r}: a variant's name may hold letters, digits, spaces and _ . + = % -"
        )
    for key in settings:
        # A section given as a whole would replace the value, or be changed by it
        whole = [other for other in settings if other != key and lies_in(key, [other])]
        if whole:
            raise ConfigError(f"{path}: {name}: {key}: is also set by {whole[0]}")
    if "seed" in settings:
        raise ConfigError(f"{path}: {name}: seed: belongs in the grid's seeds")
    # Code is imported before the variants are read
    if any(lies_in(key, ["imports"]) for key in settings):
        raise ConfigError(f"{path}: {name}: imports: belongs in the base config, or after {FLAG}")
    if _holds_key(settings):
        raise ConfigError(
            f"{path}: {name}: comet.api: would be shown and stored with the run's command;"
            " set COMET_API_KEY"
        )


def _holds_key(settings: Settings) -> bool:
    """Return whether a Comet key is among the settings, which become words of command lines."""
    if "comet.api" in settings:
        return True
    comet = settings.get("comet")
    if comet is None:
        return False
    return not isinstance(comet, dict) or "api" in comet


# Compared by identity: Config cannot be hashed, and studies use runs as keys of dictionaries
@dataclass(frozen=True, eq=False, kw_only=True)
class StudyRun:
    """One run of a study.

    Attributes:
        variant: name of its variant.
        labels: axis -> label of the variant; empty if it does not come from axes.
        position: position of the variant in the grid, from 0.
        seed: its seed.
        config_file: the config that it starts from.
        settings: the values that the grid puts on top of it.
        config: the resolved config.
        folder: its run folder. The name ends in ten digits of the config's hash; see
            `config_hash`.
        overrides: the values that the command line puts on top of every variant.
        imports: the user's code that the command line names, without what configs name.
        grid: the grid file.
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
        if self.config.attacks_while_training:
            return "train_robust.py"
        return "train.py"

    def words(self) -> list[str]:
        """Return the command line that starts it, from the script on."""
        settings = [(key, format_value(value)) for key, value in self.settings.items()]
        words = [self.script, "-c", str(self.config_file), "--run_dir", str(self.folder)]
        words += _flag_words(FLAG, self.imports)
        words += set_words([*settings, *self.overrides])
        return [*words, "--seed", str(self.seed)]

    def words_to_resume(self, changes: Sequence[Override] = ()) -> list[str]:
        """Return the command line that continues it, with new values of some keys."""
        # All of the user's code is named, because a run folder alone must not run any.
        imports = [code.file_or_module for code in self.config.imports]
        words = [self.script, "-r", str(self.folder)]
        return [*words, *_flag_words(FLAG, imports), *set_words(changes)]

    def words_of_study(self) -> list[str]:
        """Return the arguments with which `run_ablations.py` works on this run alone."""
        words = ["--grid", str(self.grid), f"--config={self.variant}", "--seed", str(self.seed)]
        words += ["--save_dir", str(self.folder.parent), *_flag_words(FLAG, self.imports)]
        return [*words, *set_words(self.overrides)]


def set_words(settings: Iterable[Override]) -> list[str]:
    """Return the words of a command line that set these keys."""
    return _flag_words("--set", [f"{key}={text}" for key, text in settings])


def _flag_words(flag: str, values: Iterable[str]) -> list[str]:
    return [word for value in values for word in (flag, value)]


def format_value(value: Any) -> str:
    """Format a value as `--set` takes it: a bare word if it means the same, otherwise JSON."""
    if isinstance(value, str):
        try:
            json.loads(value)
        except (ValueError, RecursionError):
            return value
    return json.dumps(value)


def plan(
    path: Path,
    names: Sequence[str] = (),
    seeds: Sequence[int] = (),
    save_dir: Path | None = None,
    overrides: Sequence[Override] = (),
    imports: Sequence[str] = (),
) -> list[StudyRun]:
    """Return the runs that a grid file describes, seeds of one variant side by side.

    All configs are checked; nothing is written.

    Args:
        path: the grid file.
        names: the variants to run; all by default.
        seeds: seeds to use instead of the grid's.
        save_dir: folder of the study's run folders; by default the folder with the grid's name in
            `trainer.save_dir` of each config.
        overrides: dotted keys and the texts of their values, put on top of every variant.
        imports: the user's own files and modules to import, as `--imports` names them, in addition
            to those of the configs.

    Raises:
        ConfigError: anything that is wrong with the grid, a name, an override (also one of a key
            that the grid itself varies), or a config.
    """
    grid = read_grid(path)
    _check_overrides(overrides)
    variants = variants_of(grid, path)
    _check_not_varied(overrides, variants, path)
    for name in names:
        if name not in variants:
            hint = did_you_mean(name, list(variants))
            raise ConfigError(f"{path}: no variant {name!r}{hint} (it has: {', '.join(variants)})")
    positions = {name: position for position, name in enumerate(variants)}
    runs: list[StudyRun] = []
    for name in dict.fromkeys(names or variants):
        for seed in dict.fromkeys(seeds or grid.seeds):
            run = _plan_run(
                path, name, positions[name], seed, variants[name], save_dir, overrides, imports
            )
            runs.append(run)
    _check_distinct(runs, path)
    return runs


def _plan_run(
    path: Path,
    name: str,
    position: int,
    seed: int,
    variant: Variant,
    save_dir: Path | None,
    overrides: Sequence[Override],
    imports: Sequence[str],
) -> StudyRun:
    file = variant.config_file
    settings = variant.settings
    own = variant.overrides(path)
    try:
        config = _resolve(file, [*own, *overrides], seed, imports)
    except ConfigError as error:
        raise _of_variant(error, path, name) from None
    named_by = config
    kept = [(key, text) for key, text in overrides if not (is_place(key) and key in settings)]
    if len(kept) < len(overrides):
        # The grid compares places, such as two devices. An override of them moves a run, but the
        # run keeps the folder name that it has with the grid's own value.
        named_by = _resolve(file, [*own, *kept], seed, imports)
    parent = save_dir or Path(config.trainer.save_dir) / path.stem
    digits = config_hash(named_by, keep=settings)[:10]
    return StudyRun(
        variant=name,
        labels=variant.labels,
        position=position,
        seed=seed,
        config_file=Path(os.path.relpath(file)),
        settings=settings,
        config=config,
        folder=parent / f"{name.replace(' ', '-')}_seed{seed}_{digits}",
        overrides=tuple(overrides),
        imports=tuple(imports),
        grid=path,
    )


def _resolve(
    file: Path, overrides: Sequence[Override], seed: int, imports: Sequence[str]
) -> Config:
    """Return the checked config of a run, without Comet's key."""
    config = load_config(file, [*overrides, Flag(("seed", str(seed)), f"--seed {seed}")], imports)
    check_optimization_of(config)
    # The run's own process reads the key again; without it here, nothing that shows or stores a
    # run can reveal it.
    if config.comet is not None:
        comet = config.comet.model_copy(update={"api": None})
        config = config.model_copy(update={"comet": comet})
    return config


def _check_overrides(overrides: Sequence[Override]) -> None:
    """Check that a study's command line sets neither a seed nor a Comet key."""
    for key, text in overrides:
        if key == "seed":
            raise ConfigError(f"--set seed={text}: the seeds of a study are given by --seed")
        if _holds_key(override({}, [(key, text)])):
            reason = "would be shown and stored with the runs' commands; set COMET_API_KEY"
            raise ConfigError(f"--set {key}: {reason}")


def _check_not_varied(
    overrides: Sequence[Override], variants: Mapping[str, Variant], path: Path
) -> None:
    """Check that no override sets what the grid compares.

    Otherwise a variant's name would not say what its runs are.

    Raises:
        ConfigError: naming the flag and the values that the variants have.
    """
    if not overrides:
        return
    varied = _varied_keys(variants, path)
    for key, text in overrides:
        for leaf, values in varied.items():
            if lies_in(leaf, [key]) or lies_in(key, [leaf]):
                raise ConfigError(f"--set {key}={text}: {path} itself varies {leaf} ({values})")


def _varied_keys(variants: Mapping[str, Variant], path: Path) -> dict[str, str]:
    """Return the dotted keys in which variants differ, with a text that lists three values."""
    trees = {name: _tree_of(path, name, variant) for name, variant in variants.items()}
    set_by_grid = {key for variant in variants.values() for key in variant.settings}
    varied = {}
    for leaf in dict.fromkeys(leaf for tree in trees.values() for leaf in tree):
        # Config files of variants may name different places, which the grid does not compare
        if is_place(leaf) and not any(lies_in(leaf, [key]) for key in set_by_grid):
            continue
        first_with: dict[str, str] = {}
        for name, tree in trees.items():
            value = format_value(tree[leaf]) if leaf in tree else "its default"
            first_with.setdefault(value, name)
        if len(first_with) > 1:
            examples = list(first_with.items())[:3]
            varied[leaf] = ", ".join(f"{value} in {name}" for value, name in examples)
    return varied


def _tree_of(path: Path, name: str, variant: Variant) -> Settings:
    """Return dotted key -> value of everything that the files and the grid set for a variant."""
    settings = [setting for setting in variant.overrides(path) if not is_comment(setting[0])]
    try:
        return leaves(without_comments(override(read_tree(variant.config_file), settings)))
    except ConfigError as error:
        raise _of_variant(error, path, name) from None


def _check_distinct(runs: Sequence[StudyRun], path: Path) -> None:
    """Check that no two runs have the same hash or the same config."""
    seen: dict[str, StudyRun] = {}
    for run in runs:
        # The hash leaves out places and is a part of the folder's name; the whole config catches
        # what is the same although its hash differs, as a grid may compare places.
        for key in (run.folder.name.rpartition("_")[2], json.dumps(run.config.dump())):
            twin = seen.setdefault(key, run)
            if twin is run:
                continue
            with_set = ""
            if run.overrides:
                with_set = " ".join([" with", *set_words(run.overrides)])
            raise ConfigError(
                f"{path}: {twin.variant} and {run.variant} are the same config{with_set};"
                " remove one"
            )


def _of_variant(error: ConfigError, path: Path, variant: str) -> ConfigError:
    """Return a variant's error with the names of the grid file and of the variant."""
    text = str(error)
    # An error of the grid file or of a flag names its origin already
    if text.startswith(f"{path}: "):
        return error
    if text.startswith("--"):
        return ConfigError(f"{text} ({path}: {variant})")
    return ConfigError(f"{path}: {variant}: {text}")


def record(runs: Sequence[StudyRun]) -> None:
    """Write the variant of each run into the study index beside its folder, for the reports.

    Raises:
        ConfigError: the folder of the study cannot be written, or its index is damaged.
    """
    by_parent: dict[Path, dict[str, StudyEntry]] = {}
    for run in runs:
        entry = StudyEntry(run.variant, run.position, run.labels)
        by_parent.setdefault(run.folder.parent, {})[run.folder.name] = entry
    for parent, entries in by_parent.items():
        with writing(parent):
            write_study_index(parent, entries)


def describe(runs: Sequence[StudyRun]) -> list[str]:
    """Return one line per variant: its name, its config file, its settings, epochs and seeds.

    The settings are those that the grid gives it, those of the command line, and what differs from
    the first variant. The first shows its value of every key in which the variants differ.
    """
    first_runs: dict[str, StudyRun] = {}
    for run in runs:
        first_runs.setdefault(run.variant, run)
    values = {
        variant: leaves(without_comments(run.config.dump())) for variant, run in first_runs.items()
    }
    varied = {
        key
        for own in values.values()
        for key, value in own.items()
        if not is_place(key) and any(other.get(key) != value for other in values.values())
    }
    lines = []
    shown_before: dict[str, Any] = {}
    for variant, run in first_runs.items():
        own = {key: value for key, value in values[variant].items() if key in varied}
        given = {key: value for key, value in run.settings.items() if not is_comment(key)}
        for key, value in own.items():
            if key not in shown_before or shown_before[key] != value:
                given[key] = value
        shown_before = shown_before or own
        texts = {key: format_value(value) for key, value in given.items()} | dict(run.overrides)
        settings = "".join(f", {key}={text}" for key, text in texts.items())
        seeds = ", ".join(str(other.seed) for other in runs if other.variant == variant)
        length = f"{counted(run.config.trainer.epochs, 'epoch')}, seeds {seeds}"
        lines.append(f"{variant}: {run.config_file.name}{settings} ({length})")
    return lines
