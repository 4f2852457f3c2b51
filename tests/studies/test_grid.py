"""Grid files: the runs they stand for, and one line for everything that can be wrong with them."""

import json
from pathlib import Path

import pytest

from base.errors import ConfigError
from studies.grid import as_word, describe, identity, plan

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


def test_axes_are_multiplied_and_named_variants_stand_beside_them(grid_file, tmp_path):
    path = grid_file(axes={"norm": NORMS, "size": {"8": {"trainer.epochs": 8}, "9": {"trainer.epochs": 9}}}, seeds=[3, 4])
    names = ["bn_8", "bn_9", "gn_8", "gn_9"]
    runs = plan(path)
    assert [(run.variant, run.seed) for run in runs] == [(name, seed) for name in names for seed in (3, 4)]
    assert [run.config.seed for run in runs[:2]] == [3, 4]
    last = runs[-1]
    assert (last.config.arch.args.norm_layer_type, last.config.trainer.epochs) == ("gn", 9)
    assert last.folder == Path("saved/study") / f"gn_9_seed4_{identity(last.config, last.settings)}"
    (tmp_path / "other.json").write_text(json.dumps({"extends": "base.json", "trainer": {"epochs": 7}}))
    path = grid_file(variants={"plain": {}, "file": "other.json", "one": {"trainer.epochs": 1}})
    assert [run.config.trainer.epochs for run in plan(path)][1:] == [7, 1]
    assert [run.variant for run in plan(path, ["one", "plain"], seeds=[5])] == ["one", "plain"]
    assert plan(path, ["one"], seeds=[5, 5])[0].words()[-4:] == ["--set", "trainer.epochs=1", "--seed", "5"]
    assert len(plan(path, ["one"], seeds=[5, 5])) == 1
    assert describe(plan(path, seeds=[1]))[2] == "one: base.json, trainer.epochs=1 (seeds 1)"


def test_a_run_is_known_by_all_that_can_change_its_result_and_by_what_the_grid_compares(grid_file, tmp_path):
    base = json.loads((tmp_path / "base.json").read_text())

    def folder(settings, **changes):
        (tmp_path / "base.json").write_text(json.dumps(base | changes))
        return plan(grid_file(variants={"v": settings}))[0].folder.name

    plain = folder({})
    elsewhere = {**base["data_loader"], "args": {"data_dir": "/elsewhere", "num_workers": 2}}
    assert folder({}, name="x", system={"num_threads": 2, "compile": True}, data_loader=elsewhere) == plain
    noisy = [folder({}, trainer={**base.get("trainer", {}), "noise_file": file}) for file in ("a.npy", "b/c.npy")]
    assert noisy[0] == noisy[1] != plain, "where a noise file lies does not matter, but that there is one"
    changes = {
        "trainer.epochs": 2, "optimizer.args.lr": 0.2, "adversarial.epsilon": 4, "system.precision": "bf16", "n_gpu": 2,
        "trainer.early_stop": 3, "adversarial.report": False, "adversarial.report_images": 20,
        "system.compile": True, "data_loader.args.data_dir": "/elsewhere", "system.num_threads": 2,
    }  # fmt: skip
    assert len({folder({key: value}) for key, value in changes.items()} | {plain}) == len(changes) + 1


def test_adversarial_runs_get_their_script(grid_file):
    path = grid_file(variants={"a": {}, "b": {"adversarial.method": "none"}, "c": {"trainer.do_adv": True}})
    assert [run.script for run in plan(path)] == ["train.py", "train.py", "train_robust.py"]


@pytest.mark.parametrize("value", ["bn", "12", "true", "max val_top1", 0.1, True, None, [1, 2], {"a": 1}])
def test_words_mean_the_value(value):
    try:
        assert json.loads(as_word(value)) == value
    except ValueError:
        assert as_word(value) == value


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
            "study.json: x: .*arch.args.norm: unknown key .known here: num_classes, norm_layer_type",
        ),
        ({"axes": {"a": NORMS, "b": {"x": NORMS["bn"]}}}, "axes: two of them set arch.args.norm_layer_type"),
        ({"axes": {"norm": NORMS}, "variants": {"bn": {}}}, "study.json: bn: two variants have this name"),
        ({"variants": {"a": {}, "b": {"seed": 0}}}, "study.json: b: seed: belongs into the grid's seeds"),
        ({"variants": {"a": {}, "b": {"trainer.percent": 0}}}, "a and b are the same config"),
        (
            {"variants": {"a": {"optimizer.type": "Adam", "optimizer.args.momentum": 0.9}}},
            "json: a: optimizer.args.momentum: Adam takes no such",
        ),
        ({"variants": {"../a": {}}}, r"'../a': a variant's name is made of"),
        ({"variants": {"a": "none.json"}}, "study.json: a: .*none.json: no such config file"),
        ({"variants": {"a": {"trainer.epochs": "many"}}}, 'a: .*trainer.epochs: .*integer, not "many"'),
    ],
)
def test_a_bad_grid_is_one_line(grid_file, tree, message):
    with pytest.raises(ConfigError, match=message) as caught:
        plan(grid_file(**tree))
    assert "\n" not in str(caught.value)


def test_an_unknown_variant_is_named_with_the_known_ones(grid_file):
    with pytest.raises(ConfigError, match=r"no variant 'group'; did you mean 'groups'\? \(it has: groups, batch\)"):
        plan(grid_file(variants={"groups": NORMS["gn"], "batch": NORMS["bn"]}), ["group"])


@pytest.mark.parametrize("file", sorted((CONFIGS / "ablations").glob("*.json")), ids=lambda file: file.stem)
def test_every_shipped_grid_has_runs_of_distinct_configs(file):
    runs = plan(file)
    assert len({run.folder for run in runs}) == len(runs) >= 6


def test_the_ablation_study_varies_what_its_names_say():
    configs = {run.variant: run.config for run in plan(CONFIGS / "ablations" / "resnet.json", seeds=[42])}
    base = configs["baseline"]
    assert (base.trainer.epochs, base.optimizer.args, base.data_loader.args.batch_size) == (
        200,
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4},
        128,
    )
    assert base.data_loader.args.std == [0.2470, 0.2435, 0.2616]
    assert base.lr_scheduler.type == "none"
    assert configs["cosine_schedule"].lr_scheduler.type == "CosineAnnealingLR"
    assert configs["multistep_schedule"].lr_scheduler.args["milestones"] == [100, 150]
    assert configs["no_batchnorm"].arch.args.norm_layer_type == "no"
    assert configs["no_batchnorm"].optimizer.args["lr"] == 0.01
    assert configs["small_batch"].data_loader.args.batch_size == 32
    assert [configs[name].arch.type for name in ("baseline", "resnet34", "resnet50")] == ["resnet18", "resnet34", "resnet50"]
