"""Run folders are found and read, or an error names the broken file in one line."""

import json
from math import isnan

import pytest

from base.errors import ConfigError
from reports.runs import check_known, find_runs, only_finished, read_run

VALUES = {"val_top1": [0.5, 0.6]}


def test_finished_and_unfinished_runs_are_found_once_at_and_below_the_paths(
    make_run, tmp_path, caplog
):
    make_run("grid/a", VALUES, {"test_top1": 0.4}, seed=1)
    make_run("grid/deep/b", VALUES, seed=2)
    (tmp_path / "grid" / "c").mkdir()
    (tmp_path / "grid" / "c" / "config.json").write_text("{}")
    runs = find_runs([tmp_path / "grid", tmp_path / "grid" / "a"])
    assert [(run.folder.name, run.seed, run.result is None) for run in runs] == [
        ("a", 1, False),
        ("b", 2, True),
    ]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'grid' / 'c'}: has a config.json, but no epoch in a metrics.jsonl: left out"
    ]
    caplog.clear()
    assert [run.folder.name for run in only_finished(runs)] == ["a"]
    assert "b: not finished after epoch 2: its results are left out" in caplog.text


def test_values_are_those_of_the_files(make_run):
    run = read_run(
        make_run(
            "a",
            {
                "val_top1": [0.5, 0.6, 0.7],
                "val_robust_top1": [None, 0.2, None],
                "val_loss": [1.0, 2.0, float("nan")],
            },
            {"test_top1": 0.4, "val_top1": None, "test_loss": None},
        )
    )
    assert run.measured("val_top1") == {1: 0.5, 2: 0.6, 3: 0.7}
    assert run.measured("val_robust_top1") == {2: 0.2}
    assert run.measured("loss") == {}
    assert (run.outcome("test_top1"), run.outcome("test_top5")) == (0.4, None)
    # Null was not finite, except for what every result.json has
    assert [*run.measured("val_loss")] == [1, 2, 3]
    assert isnan(run.measured("val_loss")[3])
    assert isnan(run.outcome("last_epoch.val_loss"))
    assert isnan(run.outcome("test_loss"))
    assert run.outcome("val_top1") is None


def test_a_line_that_is_being_written_is_not_read_yet(make_run):
    folder = make_run("a", VALUES)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "val_to')
    assert read_run(folder).measured("val_top1") == {1: 0.5, 2: 0.6}


def test_settings_replace_nulls_by_their_values(make_run):
    settings = read_run(make_run("a", VALUES, trainer={"do_adv": True, "adv_clip_eps": 4})).settings
    assert (settings["adversarial.method"], settings["adversarial.epsilon"]) == ("free", 4)
    assert (settings["adversarial.bn_mode"], settings["adversarial.validate_every"]) == ("train", 1)
    assert settings["optimizer.args.lr"] == 0.1
    assert settings["arch.args.num_classes"] is None


def broken(make_run, tmp_path):
    """Name -> what is broken about a folder, and the message."""
    for name in ("line", "list", "number", "result", "no epoch"):
        make_run(name, VALUES, {"test_top1": "high"})
    (tmp_path / "line" / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": \n{"epoch": 3}\n')
    (tmp_path / "list" / "metrics.jsonl").write_text('{"epoch": 1}\n{"val_top1": 0.5}\n')
    (tmp_path / "result" / "result.json").write_text("[]")
    (tmp_path / "no epoch" / "metrics.jsonl").write_text('{"epo')
    (tmp_path / "no logs").mkdir()
    (tmp_path / "no logs" / "config.json").write_text("{}")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "file").write_text("")
    make_run("config", VALUES)
    (tmp_path / "config" / "config.json").write_text('{"arch": {"type": "resnet19"}}')
    return {
        "absent": "absent: no such folder",
        "file": "file: a file, not a run folder",
        "nothing": "nothing: no run folder (one with config.json and metrics.jsonl) here or below",
        "no logs": "no logs: a run folder without logs:"
        " it has a config.json, but no epoch in a metrics.jsonl",
        "no epoch": "no epoch: a run folder without logs: its metrics.jsonl holds no epoch yet",
        "line": "metrics.jsonl: line 2: '{\"epoch\": ' is not a JSON object with an epoch",
        "list": "metrics.jsonl: line 2: '{\"val_top1\": 0.5}' is not a JSON object with an epoch",
        "result": "result.json: is not a JSON object",
        "config": "config.json: data_loader: required, but not given",
    }


def test_every_broken_folder_is_an_error_of_one_line(make_run, tmp_path):
    for name, message in broken(make_run, tmp_path).items():
        with pytest.raises(ConfigError) as caught:
            find_runs([tmp_path / name])
        assert message in str(caught.value), name
        assert str(tmp_path / name) in str(caught.value), name
        assert len(str(caught.value).splitlines()) == 1, name
    with pytest.raises(ConfigError, match=r"result.json: test_top1: 'high' is not a number"):
        read_run(tmp_path / "number").outcome("test_top1")
    (tmp_path / "number" / "metrics.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(ConfigError, match=r"metrics.jsonl: cannot be read: "):
        read_run(tmp_path / "number")


def test_results_without_a_finished_run_are_an_error(make_run):
    with pytest.raises(
        ConfigError, match=r"a: not finished: it has no result.json, and none of the 1 runs has one"
    ):
        only_finished([read_run(make_run("a", VALUES))])


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(
        ConfigError,
        match=r"^--metric val_top: no run logs it; there are: loss, val_top1;"
        r" did you mean 'val_top1'\?",
    ):
        check_known("--metric", ["loss", "val_top"], ["loss", "val_top1", "loss"], "no run logs it")


def test_a_real_run_is_read(tmp_path):
    from base.config import validate
    from experiment.experiment import Experiment

    config = {
        "arch": {"type": "simpleCNN", "args": {"norm_layer_type": "gn"}},
        "data_loader": {"type": "DigitsDataLoader", "args": {"batch_size": 8, "num_batches": 2}},
        "adversarial": {
            "method": "fgsm",
            "validate_every": 2,
            "validate_images": 10,
            "report_images": 10,
        },
        "pgd_attack": {"K": 2},
        "trainer": {"epochs": 2, "verbosity": 0},
    }
    result = Experiment.from_config(validate(config)).run(str(tmp_path / "run"))
    (run,) = find_runs([tmp_path])
    assert run.outcome("test_robust_top1") == result["test_robust_top1"]
    assert run.outcome("last_test_top1") == result["last_test_top1"]
    assert list(run.measured("val_top1")) == [1, 2]
    assert list(run.measured("val_robust_top1")) == [2]
    assert (
        json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])["loss"]
        == run.measured("loss")[2]
    )
    assert (run.settings["arch.args.norm_layer_type"], run.settings["adversarial.epsilon"]) == (
        "gn",
        8,
    )


def test_the_last_epoch_has_no_value_of_an_earlier_one(make_run):
    values = {"val_top1": [0.5, 0.6], "val_robust_top1": [0.2, None]}
    run = read_run(make_run("a", values, {"test_top1": 0.4}))
    assert run.outcome("last_epoch.val_top1") == 0.6
    assert run.outcome("last_epoch.val_robust_top1") is None
