"""Only seeds of one experiment are in one group."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest

from base.config.tree import merge
from base.errors import ConfigError
from base.run_folder.study_index import StudyEntry, write_study_index
from reports.groups import MAY_DIFFER, group_runs
from reports.runs import find_runs

VALUES = {"val_top1": [0.5]}
OTHER_VALUES = {
    "seed": 7,
    "name": "other",
    "exper_name": "other",
    "comet": {"project": "other"},
    "trainer.save_dir": "else/",
    "trainer.label_dir": "else",
    "trainer.verbosity": 0,
    "trainer.save_period": 5,
    "trainer.keep_checkpoints": 0,
    "trainer.tensorboard": True,
    "data_loader.args.num_workers": 2,
    "data_loader.args.pin_memory": True,
    "system.num_threads": 1,
    "system.device": "cpu",
    "system.compile": True,
    "system.channels_last": True,
    "system.deterministic": True,
    "data_loader.args.data_dir": "else",
    "arch.args.num_classes": 10,
    "arch.args.in_channels": 3,
}
"""A value other than the default of each key that does not matter."""
MATTERS = {
    "trainer.epochs": (10, "200"),
    "optimizer.args.lr": (0.5, "0.1"),
    "optimizer.args.nesterov": (True, "null"),
    "arch.args.norm_layer_type": ("gn", "bn"),
    "system.precision": ("bf16", "fp32"),
    "trainer.subset_percent": (0.5, "1"),
    "data_loader.args.num_batches": (3, "0"),
    "adversarial.method": ("pgd", "none"),
    "pgd_attack.K": (20, "10"),
    "data_loader.args.mean": ([0.5, 0.5, 0.25], "null"),
}
"""Another value of some keys that do, and the default as it is shown."""


def sections(key, value):
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize("key", [key for key in MAY_DIFFER if key != "trainer.noise_file"])
def test_runs_that_differ_in_irrelevant_keys_are_seeds_of_one_experiment(make_run, tmp_path, key):
    make_run("a", VALUES, seed=3)
    make_run("b", VALUES, **merge({"seed": 1}, sections(key, OTHER_VALUES[key])))
    (group,) = group_runs(find_runs([tmp_path]), [])
    assert [run.seed for run in group.runs] == [
        1 if key != "seed" else 3,
        3 if key != "seed" else 7,
    ]


@pytest.mark.parametrize("key", MATTERS)
def test_runs_that_differ_in_relevant_keys_are_not_averaged(make_run, tmp_path, key):
    value, default = MATTERS[key]
    make_run("a", VALUES, seed=0)
    make_run("b", VALUES, seed=1, **sections(key, value))
    with pytest.raises(ConfigError) as caught:
        group_runs(find_runs([tmp_path]), [])
    shown = str(value) if not isinstance(value, bool) else "true"
    assert str(caught.value).startswith(
        f"{key}: {default} in {tmp_path / 'a'}, but {shown} in {tmp_path / 'b'}"
    )
    assert str(caught.value).endswith(f"add {key} to --group-by, or leave one out")
    assert len(group_runs(find_runs([tmp_path]), [key])) == 2


def test_names_are_the_values_of_the_keys(make_run, tmp_path):
    make_run("a", VALUES, arch={"args": {"norm_layer_type": "gn"}})
    make_run("b", VALUES, lr_scheduler={"type": "MultiStepLR", "args": {"milestones": [1, 2]}})
    runs = find_runs([tmp_path])
    names = {
        ("arch.args.norm_layer_type",): "gn",
        ("arch.type", "arch.args.norm_layer_type"): "type=simpleCNN, norm_layer_type=gn",
        (
            "arch.type",
            "optimizer.type",
            "trainer.percent",
        ): "arch.type=simpleCNN, optimizer.type=SGD, percent=0",
        ("trainer.OCNN", "trainer.early_stop"): "OCNN=false, early_stop=null",
        ("seed", "seed"): "0",
    }
    for keys, name in names.items():
        assert group_runs(runs[:1], keys)[0].name == name
    assert group_runs(runs[:1], [])[0].name == "made"
    assert group_runs(runs, ["lr_scheduler.args.milestones"])[1].name == "[1, 2]"


def test_numbers_ascend_and_words_keep_their_order(make_run, tmp_path):
    for index, rate in enumerate((0.6, 0.0, 0.2)):
        make_run(f"{index}", VALUES, trainer={"percent": rate, "sym": True})
    assert [group.name for group in group_runs(find_runs([tmp_path]), ["trainer.percent"])] == [
        "0",
        "0.2",
        "0.6",
    ]
    make_run("x", VALUES, arch={"type": "vgg11"}, trainer={"percent": 0.1, "sym": True})
    make_run("y", VALUES, arch={"type": "vgg11"}, trainer={"percent": 0.0, "sym": True})
    groups = group_runs(find_runs([tmp_path / "x", tmp_path]), ["arch.type", "trainer.percent"])
    assert [group.values for group in groups] == [
        ("vgg11", 0.0), ("vgg11", 0.1), ("simpleCNN", 0.0), ("simpleCNN", 0.2), ("simpleCNN", 0.6)
    ]  # fmt: skip
    assert [group.line for group in groups[1:3]] == ["vgg11", "simpleCNN"]


def test_errors(make_run, tmp_path):
    make_run("a", VALUES)
    make_run("b", VALUES)
    runs = find_runs([tmp_path])
    messages = {
        (): r"^seed: 0 in both .*a and .*b of made; leave one out$",
        (
            "norm_layer_type",
        ): r"no such key in the runs' configs; did you mean 'arch.args.norm_layer_type'\?$",
        ("arch.args.type",): (
            "did you mean 'arch.type' or 'data_loader.type' or 'optimizer.type'"
            " or 'lr_scheduler.type' or 'pgd_attack.type'"
        ),
        ("trainer.procent",): r"^--group-by trainer.procent: .*did you mean 'trainer.percent'\?$",
    }
    for keys, message in messages.items():
        with pytest.raises(ConfigError, match=message):
            group_runs(runs, keys)
    make_run("c", VALUES, seed=1, trainer={"epochs": 3, "OCNN": True})
    with pytest.raises(
        ConfigError,
        match=r"^trainer.epochs: 200 in .*a, but 3 in .*c \(and 1 more\): runs that are averaged",
    ):
        group_runs([runs[0], *find_runs([tmp_path / "c"])], [])


def test_runs_of_a_study_are_grouped_by_its_labels_in_its_order(make_run, tmp_path):
    for name, norm in (("a", "gn"), ("b", "bn")):
        make_run(name, {"loss": [1.0]}, arch={"args": {"norm_layer_type": norm}})
    places = {
        "a": StudyEntry("second", 1, {"norm": "GroupNorm"}),
        "b": StudyEntry("first", 0, {"norm": "BatchNorm"}),
    }
    write_study_index(tmp_path, {"a": places["a"]})
    write_study_index(tmp_path, {"b": places["b"]})
    runs = find_runs([tmp_path / "a", tmp_path])
    assert [group.name for group in group_runs(runs, ["variant"])] == ["first", "second"]
    assert [group.name for group in group_runs(runs, ["norm", "seed"])] == [
        "BatchNorm, seed=0",
        "GroupNorm, seed=0",
    ]
    with pytest.raises(
        ConfigError,
        match=r"^arch.args.norm_layer_type: bn in .*b, but gn in .*a: runs that are averaged",
    ):
        group_runs(runs, ["trainer.epochs"])
    (tmp_path / "study.json").write_text("{")
    assert [run.labels for run in find_runs([tmp_path])] == [{}, {}], "pictures do not need it"


def labels(folder, clean, given=None):
    """Write labels.npz: training images from 0 on, the last two of them for validation."""
    given = clean if given is None else given
    arrays = {
        "index": np.arange(len(clean)),
        "label": np.array(given),
        "clean_label": np.array(clean),
    }
    parts = {"train": slice(0, -2), "val": slice(-2, None)}
    split = {
        f"{part}_{name}": arrays[name][where] for part, where in parts.items() for name in arrays
    }
    np.savez(folder / "labels.npz", **split)


def moved(make_run, tmp_path, other, **trainer):
    """Two seeds of one study, the second with its data elsewhere and with the labels `other`."""
    counts = {"n_train": 3, "n_val": 2, "n_test": 4}
    for seed, (place, clean, given) in enumerate(
        [("a", [0, 1, 2, 0, 1], [0, 1, 1, 0, 1]), ("b", *other)]
    ):
        settings = {key: f"{place}/{value}" for key, value in trainer.items()}
        loader = {"args": {"data_dir": place}}
        folder = make_run(
            place, VALUES, {**counts, "n_test": 4}, seed=seed, data_loader=loader, trainer=settings
        )
        labels(folder, clean, given)
    return find_runs([tmp_path])


def test_a_study_with_moved_data_is_averaged_with_one_warning(make_run, tmp_path, caplog):
    runs = moved(make_run, tmp_path, ([0, 1, 2, 0, 1], [0, 0, 2, 0, 1]))
    (group,) = group_runs(runs, [])
    assert [run.seed for run in group.runs] == [0, 1], "symmetric noise of two seeds differs"
    assert caplog.text.count("data_loader.args.data_dir: a in ") == 1
    assert "b in " in caplog.text
    assert "taken for one data set that was moved" in caplog.text


@pytest.mark.parametrize(
    ("key", "other", "trainer"),
    [
        ("data_loader.args.data_dir", ([0, 1, 2, 0, 2], [0, 1, 1, 0, 2]), {}),
        ("trainer.noise_file", ([0, 1, 2, 0, 1], [0, 1, 2, 0, 1]), {"noise_file": "noise.npy"}),
    ],
)
def test_other_labels_in_another_place_are_not_averaged(make_run, tmp_path, key, other, trainer):
    runs = moved(make_run, tmp_path, other, **trainer)
    if trainer:
        runs = [
            replace(run, settings={**run.settings, "data_loader.args.data_dir": "a"})
            for run in runs
        ]
    with pytest.raises(
        ConfigError,
        match=rf"^{key}: a.* in .*a, but b.* in .*b: the labels in these two places differ",
    ):
        group_runs(runs, [])


def test_runs_with_and_without_a_noise_file_are_not_averaged(make_run, tmp_path):
    make_run("a", VALUES, seed=0)
    make_run("b", VALUES, seed=1, trainer={"noise_file": "b.npy"})
    with pytest.raises(ConfigError, match="^trainer.noise_file: null in .*a, but b.npy in .*b"):
        group_runs(find_runs([tmp_path]), [])


def test_other_test_images_in_another_place_are_not_averaged(make_run, tmp_path):
    runs = moved(make_run, tmp_path, ([0, 1, 2, 0, 1], None))
    runs[1] = replace(runs[1], result={**runs[1].result, "n_test": 5})
    with pytest.raises(ConfigError, match="the labels in these two places differ"):
        group_runs(runs, [])


def test_a_copy_of_a_run_is_counted_once(make_run, tmp_path, caplog):
    make_run("a", VALUES, {"test_top1": 0.5, "train_seconds": 3.25})
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    (group,) = group_runs(find_runs([tmp_path]), [])
    assert [run.folder.name for run in group.runs] == ["a"]
    assert "copy: has the same numbers as the run in " in caplog.text
    for result, fails in (
        ({"test_top1": 0.5, "train_seconds": 9.0}, False),
        ({"test_top1": 0.6}, True),
    ):
        (tmp_path / "copy" / "result.json").write_text(json.dumps(result))
        with pytest.raises(ConfigError, match="^seed: 0 in both ") if fails else nullcontext():
            group_runs(find_runs([tmp_path]), [])
