"""Grid files: the runs that they describe, and one line for every error in them."""

import json
import sys
from pathlib import Path

import pytest

from base.config import imports, validate
from base.config.same_experiment import config_hash
from base.errors import ConfigError
from base.registry import NORM_LAYERS
from studies.grid import describe, format_value, plan

CONFIGS = Path(__file__).parents[2] / "configs"
NORMS = {"bn": {"arch.args.norm_layer_type": "bn"}, "gn": {"arch.args.norm_layer_type": "gn"}}


@pytest.fixture
def grid_file(tmp_path):
    (tmp_path / "base.json").write_text(json.dumps({"data_loader": {"type": "DigitsDataLoader"}}))

    def write(**tree):
        path = tmp_path / "study.json"
        path.write_text(json.dumps({"base": "base.json", **tree}))
        return path

    return write


@pytest.mark.parametrize(
    "grid", sorted((CONFIGS / "ablations").glob("*.json")), ids=lambda path: path.stem
)
def test_every_run_of_a_shipped_grid_has_a_hash_of_its_own(grid):
    runs = plan(grid)
    hashes = [config_hash(run.config, run.settings) for run in runs]
    assert len(set(hashes)) == len(runs)
    # A run stores its whole config, with the values at their defaults
    stored = [validate(run.config.dump()) for run in runs]
    assert [
        config_hash(config, run.settings) for config, run in zip(stored, runs, strict=True)
    ] == hashes


def test_axes_are_combined_and_named_variants_are_added(grid_file, tmp_path):
    path = grid_file(
        axes={"norm": NORMS, "size": {"8": {"trainer.epochs": 8}, "9": {"trainer.epochs": 9}}},
        seeds=[3, 4],
    )
    names = ["bn_8", "bn_9", "gn_8", "gn_9"]
    runs = plan(path)
    assert [(run.variant, run.seed) for run in runs] == [
        (name, seed) for name in names for seed in (3, 4)
    ]
    assert [run.config.seed for run in runs[:2]] == [3, 4]
    last = runs[-1]
    assert (last.config.arch.args.norm_layer_type, last.config.trainer.epochs) == ("gn", 9)
    digits = config_hash(last.config, last.settings)[:10]
    assert last.folder == Path("saved/study") / f"gn_9_seed4_{digits}"
    (tmp_path / "other.json").write_text(
        json.dumps({"extends": "base.json", "trainer": {"epochs": 7}})
    )
    path = grid_file(variants={"plain": {}, "file": "other.json", "one": {"trainer.epochs": 1}})
    assert [run.config.trainer.epochs for run in plan(path)][1:] == [7, 1]
    assert [run.variant for run in plan(path, ["one", "plain"], seeds=[5])] == ["one", "plain"]
    assert plan(path, ["one"], seeds=[5, 5])[0].words()[-4:] == [
        "--set",
        "trainer.epochs=1",
        "--seed",
        "5",
    ]
    assert len(plan(path, ["one"], seeds=[5, 5])) == 1
    assert describe(plan(path, seeds=[1]))[2] == (
        "one: base.json, trainer.epochs=1 (1 epoch, seeds 1)"
    )


def test_a_grid_silences_warnings_of_unused_keys_for_all_its_runs(grid_file):
    axes = {"training": {"plain": {}, "trades": {"adversarial.method": "trades"}}}
    variants = {"other": {"adversarial.beta": 2}}
    loud = plan(grid_file(axes=axes, variants=variants))
    quiet = plan(grid_file(axes=axes, variants=variants, _unused_ok=["adversarial.beta"]))
    assert [len(run.config.warnings) for run in loud] == [0, 0, 1]
    assert [len(run.config.warnings) for run in quiet] == [0, 0, 0]
    assert [run.folder for run in quiet] == [run.folder for run in loud]
    assert describe(quiet) == describe(loud)
    assert '_unused_ok=["adversarial.beta"]' in quiet[2].words()


def test_a_folders_name_depends_on_all_that_changes_results_and_on_what_is_compared(
    grid_file, tmp_path
):
    base = json.loads((tmp_path / "base.json").read_text())

    def folder(settings, **changes):
        (tmp_path / "base.json").write_text(json.dumps(base | changes))
        return plan(grid_file(variants={"v": settings}))[0].folder.name

    plain = folder({})
    elsewhere = {**base["data_loader"], "args": {"data_dir": "/elsewhere", "num_workers": 2}}
    assert (
        folder({}, name="x", system={"num_threads": 2, "compile": True}, data_loader=elsewhere)
        == plain
    )
    noisy = [
        folder({}, trainer={**base.get("trainer", {}), "noise_file": file})
        for file in ("a.npy", "b/c.npy")
    ]
    assert noisy[0] == noisy[1] != plain, (
        "it matters that there is a noise file, but not where it lies"
    )
    changes = {
        "trainer.epochs": 2,
        "optimizer.args.lr": 0.2,
        "adversarial.epsilon": 4,
        "system.precision": "bf16",
        "n_gpu": 2,
        "trainer.early_stop": 3,
        "adversarial.report": False,
        "adversarial.report_images": 20,
        "system.compile": True,
        "data_loader.args.data_dir": "/elsewhere",
        "system.num_threads": 2,
    }
    assert (
        len({folder({key: value}) for key, value in changes.items()} | {plain}) == len(changes) + 1
    )


def test_overrides_are_put_on_top_of_every_variant(grid_file, tmp_path):
    always = {"trainer.epochs": 4, "augmentation.flip": False}
    path = grid_file(variants={"a": {**always, "optimizer.args.lr": 0.1}, "b": always})
    overrides = [
        ("optimizer.args.weight_decay", "0.3"),
        ("augmentation.flip", "true"),
        ("trainer.epochs", "7"),
    ]
    first = plan(path, ["a"], overrides=overrides)[0]
    assert first.config.optimizer.args["weight_decay"] == 0.3
    assert (first.config.augmentation.flip, first.config.trainer.epochs) == (True, 7)
    assert first.words()[5:] == [
        "--set",
        "trainer.epochs=4",
        "--set",
        "augmentation.flip=false",
        "--set",
        "optimizer.args.lr=0.1",
        "--set",
        "optimizer.args.weight_decay=0.3",
        "--set",
        "augmentation.flip=true",
        "--set",
        "trainer.epochs=7",
        "--seed",
        "0",
    ]
    assert describe([first]) == [
        "a: base.json, trainer.epochs=7, augmentation.flip=true, optimizer.args.lr=0.1,"
        " optimizer.args.weight_decay=0.3 (7 epochs, seeds 0)"
    ]


def test_an_override_names_a_run_like_the_same_setting_in_the_base_config(grid_file, tmp_path):
    path = grid_file(variants={"v": {"augmentation.flip": False}})
    given = [
        run.folder.name
        for run in plan(
            path, overrides=[("trainer.epochs", "7"), ("data_loader.args.data_dir", "/x")]
        )
    ]
    base = json.loads((tmp_path / "base.json").read_text())
    (tmp_path / "base.json").write_text(json.dumps({**base, "trainer": {"epochs": 7}}))
    assert [run.folder.name for run in plan(path)] == given


@pytest.mark.parametrize(
    ("key", "text", "shown"),
    [
        ("trainer.epochs", "7", "trainer.epochs (4 in a, 5 in b, its default in elsewhere)"),
        ("trainer", '{"epochs": 7}', "trainer.epochs (4 in a"),
        ("optimizer.args", "null", "optimizer.args.lr (0.3 in a, its default in b)"),
        ("optimizer.args.lr", "0.1", "optimizer.args.lr (0.3 in a"),
        ("system.num_threads", "3", "system.num_threads (its default in a, 2 in b)"),
    ],
)
def test_a_key_that_the_grid_varies_cannot_be_overridden(grid_file, tmp_path, key, text, shown):
    a, b = (
        {"trainer.epochs": 4, "optimizer.args.lr": 0.3},
        {"trainer.epochs": 5, "system.num_threads": 2},
    )
    (tmp_path / "file.json").write_text(
        '{"data_loader": {"type": "DigitsDataLoader", "args": {"data_dir": "d"}}}'
    )
    path = grid_file(variants={"a": a, "b": b, "elsewhere": "file.json"})
    with pytest.raises(ConfigError) as caught:
        plan(path, ["a"], overrides=[("data_loader.args.data_dir", "/x"), (key, text)])
    assert str(caught.value).startswith(f"--set {key}={text}: {path} itself varies {shown}")


def test_overrides_of_places_and_to_defaults_do_not_change_a_folders_name(grid_file):
    path = grid_file(variants={"v": {"system.num_threads": 1}})

    def folder(*overrides):
        return plan(path, overrides=overrides)[0].folder.name

    plain = folder()
    places = {
        "data_loader.args.data_dir": "/x",
        "system.num_threads": "3",
        "name": "y",
        "trainer.tensorboard": "true",
    }
    for place in places.items():
        assert folder(place) == plain, place
    for default in (
        ("augmentation.padding_mode", "zeros"),
        ("trainer.epochs", "200"),
        ("arch.args.init", "null"),
    ):
        assert folder(default) == plain, default
    changes = [
        ("trainer.epochs", "3"),
        ("augmentation.padding_mode", "reflect"),
        ("augmentation.cutout_inside", "true"),
    ]
    assert len({folder(change) for change in changes} | {plain}) == 4


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        (
            "trainer.epoch",
            "3",
            r"^--set trainer.epoch=3: trainer.epoch: unknown key.*'epochs'.* \(.*study.json: v\)$",
        ),
        (
            "trainer.epochs",
            "few",
            '^--set trainer.epochs=few: trainer.epochs: .*integer, not "few"',
        ),
        (
            "optimizer.args.betas",
            "0.9",
            "^--set optimizer.args.betas=0.9: optimizer.args.betas: SGD takes no such",
        ),
        (
            "augmentaton",
            "null",
            "^--set augmentaton=null: augmentaton: unknown key; did you mean 'augmentation'",
        ),
        ("", "3", "^--set =3: expected a dotted key"),
        ("seed", "3", "^--set seed=3: the seeds of a study are given by --seed$"),
    ],
)
def test_a_bad_override_is_one_line(grid_file, key, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        plan(grid_file(variants={"v": {}}), overrides=[(key, text)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "text"), [("comet.api", "s3cr3t"), ("comet", '{"api": "s3cr3t"}'), ("comet", "s3cr3t")]
)
def test_no_comet_key_is_taken_from_the_command_line(grid_file, key, text):
    with pytest.raises(ConfigError, match=f"^--set {key}: would be shown and stored") as caught:
        plan(grid_file(variants={"v": {}}), overrides=[(key, text)])
    assert "s3cr3t" not in str(caught.value)


def test_the_list_shows_what_differs_from_the_first_variant(grid_file, tmp_path):
    (tmp_path / "first.json").write_text(
        json.dumps({"_about": "x", "extends": "base.json", "trainer": {"epochs": 7}})
    )
    (tmp_path / "second.json").write_text(
        json.dumps({"extends": "first.json", "augmentation": {"flip": False}})
    )
    path = grid_file(base=None, variants={"one": "first.json", "two": "second.json"})
    assert describe(plan(path)) == [
        "one: first.json, augmentation.flip=true (7 epochs, seeds 0)",
        "two: second.json, augmentation.flip=false (7 epochs, seeds 0)",
    ]


@pytest.fixture
def own_code(tmp_path, request):
    """A file with a unique name that registers a norm layer, which is removed afterwards."""
    file = tmp_path / f"norm_of_a_grid_{request.node.callspec.id}.py"
    file.write_text(
        "from models.layers.norms import batch_norm\n"
        "from base.registry import NORM_LAYERS\n"
        "NORM_LAYERS['of_a_grid'] = "
        "lambda channels, affine=True, norm_groups=32: batch_norm(channels)\n"
    )
    yield file
    NORM_LAYERS.pop("of_a_grid", None)
    sys.modules.pop(file.stem, None)
    sys.path.remove(str(tmp_path))
    imports._imported.pop(file.stem, None)


@pytest.mark.parametrize("by_flag", [True, False], ids=["flag", "base"])
def test_own_code_of_the_base_and_of_the_command_line_reaches_the_runs(
    grid_file, own_code, tmp_path, by_flag
):
    base = json.loads((tmp_path / "base.json").read_text())
    if not by_flag:
        (tmp_path / "base.json").write_text(json.dumps({**base, "imports": [own_code.name]}))
    flags = [str(own_code)] if by_flag else []
    path = grid_file(variants={"v": {"trainer.epochs": 3}, "w": {}})
    run, _ = plan(path, imports=flags)
    assert "of_a_grid" in NORM_LAYERS
    given = ["--imports", str(own_code)]
    assert (given == run.words()[5:7]) == by_flag
    assert run.words_to_resume() == ["train.py", "-r", str(run.folder), *given], (
        "a run folder alone runs no code"
    )


def test_adversarial_runs_get_their_script(grid_file):
    path = grid_file(
        variants={"a": {}, "b": {"adversarial.method": "none"}, "c": {"trainer.do_adv": True}}
    )
    assert [run.script for run in plan(path)] == ["train.py", "train.py", "train_robust.py"]


@pytest.mark.parametrize(
    "value", ["bn", "12", "true", "max val_top1", 0.1, True, None, [1, 2], {"a": 1}]
)
def test_a_formatted_value_means_the_same(value):
    try:
        assert json.loads(format_value(value)) == value
    except ValueError:
        assert format_value(value) == value


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"axis": {}}, r"study.json: axis: .*did you mean 'axes'\?"),
        ({}, "neither axes nor variants: there is nothing to run"),
        ({"base": None, "axes": {"norm": NORMS}}, "base: required"),
        ({"variants": {"v": {}}, "seeds": []}, "seeds: .*at least 1 item"),
        ({"variants": {"v": {}}, "seeds": ["a"]}, r"seeds\.0: .*integer"),
        ({"axes": {"norm": {}}}, r"axes\.norm: .*at least 1 item"),
        (
            {"axes": {"norm": {"x": {"arch.args.norm": "bn"}}}},
            r"study.json: axes\.norm\.x: arch\.args\.norm: unknown key",
        ),
        (
            {"axes": {"a": NORMS, "b": {"x": NORMS["bn"]}}},
            "axes: two of them set arch.args.norm_layer_type",
        ),
        (
            {"axes": {"a": NORMS, "b": {"x": {"arch.args": {}}}}},
            "study.json: bn_x: arch.args.norm_layer_type: is also set by arch.args",
        ),
        (
            {"variants": {"a": {"optimizer.args.lr": 0.1, "optimizer": {"args": {"lr": 0.2}}}}},
            "study.json: a: optimizer.args.lr: is also set by optimizer",
        ),
        (
            {"axes": {"norm": NORMS}, "variants": {"bn": {}}},
            "study.json: bn: two variants have this name",
        ),
        (
            {"variants": {"a": {}, "b": {"seed": 0}}},
            "study.json: b: seed: belongs in the grid's seeds",
        ),
        ({"variants": {"a": {}, "b": {"trainer.percent": 0}}}, "a and b are the same config"),
        (
            {"variants": {"a": {"optimizer.type": "Adam", "optimizer.args.momentum": 0.9}}},
            r"json: variants\.a: optimizer.args.momentum: Adam takes no such",
        ),
        ({"variants": {"../a": {}}}, r"'../a': a variant's name may hold"),
        ({"variants": {"a": "none.json"}}, "study.json: a: .*none.json: no such config file"),
        (
            {"variants": {"a": {"trainer.epochs": "many"}}},
            r'json: variants\.a: trainer.epochs: .*integer, not "many"',
        ),
        (
            {"variants": {"a": {"imports": ["x.py"]}}},
            "json: a: imports: belongs in the base config, or after --imports",
        ),
        ({"variants": {"a": 5}}, r"json: variants\.a: .*object, not 5"),
    ],
)
def test_a_bad_grid_is_one_line(grid_file, tree, message):
    with pytest.raises(ConfigError, match=message) as caught:
        plan(grid_file(**tree))
    assert "\n" not in str(caught.value)


def test_an_unknown_variant_is_named_with_the_known_ones(grid_file):
    with pytest.raises(
        ConfigError, match=r"no variant 'group'; did you mean 'groups'\? \(it has: groups, batch\)"
    ):
        plan(grid_file(variants={"groups": NORMS["gn"], "batch": NORMS["bn"]}), ["group"])


@pytest.mark.parametrize(
    "file", sorted((CONFIGS / "ablations").glob("*.json")), ids=lambda file: file.stem
)
def test_every_shipped_grid_has_runs_of_distinct_configs(file):
    runs = plan(file)
    assert len({run.folder for run in runs}) == len(runs) >= 6
