"""The progress of a run, read from its folder, and the table that shows it."""

import json
from dataclasses import replace

import pytest

from base.config import validate
from base.errors import ConfigError
from studies.launchers import command
from studies.progress import (
    Progress,
    State,
    StatusRow,
    changed_places,
    format_duration,
    format_table,
    read_progress,
)


def test_the_state_of_a_run_folder(run):
    assert read_progress(run) == Progress(State.NEW, 0, None)
    (run.folder / "config.json").write_text(json.dumps(run.config.dump()))
    assert read_progress(run).state is State.NEW, "killed before its first checkpoint"
    (run.folder / "model_last.pth").touch()
    lines = [
        json.dumps({"epoch": epoch, "val_top1": value})
        for epoch, value in ((1, 0.5), (2, 0.7), (3, 0.6))
    ]
    (run.folder / "metrics.jsonl").write_text("\n".join(lines)[:-3])
    assert read_progress(run) == Progress(State.INTERRUPTED, 2, 0.7), (
        "the line that is being written does not count"
    )
    (run.folder / "result.json").write_text("{}")
    assert read_progress(run).state is State.FINISHED
    (run.folder / "model_last.pth").unlink()
    assert read_progress(run).state is State.FINISHED, "its checkpoints may be deleted"


def test_a_folder_of_another_run_is_refused(run):
    (run.folder / "model_last.pth").touch()
    with pytest.raises(ConfigError, match="holds a checkpoint, but no config.json"):
        read_progress(run)
    (run.folder / "config.json").write_text(json.dumps({**run.config.dump(), "seed": 5}))
    with pytest.raises(
        ConfigError,
        match="holds another run than plain seed 1: seed: the run was started with 5; 0 would",
    ):
        read_progress(run)


def test_a_continued_run_gets_the_places_that_have_changed(run):
    saved = run.config.dump()
    saved["data_loader"]["args"]["data_dir"] = "/old place"
    saved["system"] |= {"num_threads": 2, "device": "cpu"}
    saved["comet"] = {"offline": True, "project": "p"}
    # --imports names the user's own code; --set would be refused
    saved["imports"] = [{"file": "/old place/own.py", "sha256": "0" * 64}]
    (run.folder / "config.json").write_text(json.dumps(saved))
    (run.folder / "model_last.pth").touch()
    assert read_progress(run).state is State.INTERRUPTED, "other places do not make it another run"
    assert dict(changed_places(run)) == {
        "data_loader.args.data_dir": "null",
        "system.num_threads": "null",
        "system.device": "auto",
        "comet": "null",
    }
    words = command(run)[2:]
    assert words[:2] == ["-r", str(run.folder)]
    assert words[words.index("system.device=auto") - 1] == "--set"
    (run.folder / "config.json").write_text(json.dumps(run.config.dump()))
    assert command(run)[2:] == ["-r", str(run.folder)]


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "result.json"])
def test_a_damaged_file_is_named(run, name):
    (run.folder / "config.json").write_text(json.dumps(run.config.dump()))
    (run.folder / "result.json").write_text("{}")
    for damage in (b"{oh\n", b"\xff\xfe{\n", b"\x00\n"):
        (run.folder / name).write_bytes(damage)
        with pytest.raises(
            ConfigError,
            match=f"{name}: .*; move {run.folder} away to begin again$",
        ):
            read_progress(run)


def test_the_table_has_a_line_per_run(run):
    rows = [
        StatusRow(run, Progress(State.RUNNING, 2, 0.701), 185.0),
        StatusRow(run, Progress(State.NEW, 0, None), None),
    ]
    assert [line.split() for line in format_table(rows)] == [
        ["run", "state", "epoch", "best", "left"],
        ["plain", "seed", "1", "running", "2/4", "val_top1", "70.10%", "3", "min"],
        ["plain", "seed", "1", "new", "0/4"],
    ]
    assert [format_duration(seconds) for seconds in (40, 100, 3900)] == [
        "40 s",
        "2 min",
        "1 h 05 min",
    ]


@pytest.mark.parametrize(("monitor", "best"), [("max val_top1", 0.7), ("min val_loss", 0.2)])
def test_the_best_value_is_the_monitored_one_at_its_best(run, monitor, best):
    config = validate(
        {"data_loader": {"type": "DigitsDataLoader"}, "trainer": {"monitor": monitor}}
    )
    (run.folder / "config.json").write_text(json.dumps(config.dump()))
    logs = [(0.5, 0.4), (0.7, 0.2), (0.6, 0.3), (None, None)]
    lines = [
        json.dumps({"epoch": number, "val_top1": top1, "val_loss": loss})
        for number, (top1, loss) in enumerate(logs, start=1)
    ]
    (run.folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert read_progress(replace(run, config=config)).best == best
