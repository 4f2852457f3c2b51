"""run_ablations.py as a user runs it: list, dry run, a killed study, failures, submitit."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from studies.progress import Progress, State, StatusRow
from studies.work import _Display
from tiny_runs import Fork, fork_programs, python, script

ROOT = Path(__file__).parents[1]
SETTINGS = {
    "data_loader.args.num_batches": 4,
    "data_loader.args.batch_size": 16,
    "trainer.monitor": "max val_top1",
    "system.num_threads": 1,
    "trainer.epochs": 3,
}


def command(*words):
    return [sys.executable, str(ROOT / "run_ablations.py"), *map(str, words)]


def study(*words, cwd):
    return script("run_ablations.py", *words, cwd=cwd, before=fork_programs)


@pytest.fixture
def grid(tmp_path):
    tree = {
        "base": os.path.relpath(ROOT / "configs" / "quickstart.json", tmp_path),
        "axes": {
            "norm": {
                "bn": {"arch.args.norm_layer_type": "bn"},
                "gn": {"arch.args.norm_layer_type": "gn"},
            }
        },
        "variants": {},
        "seeds": [0, 1],
    }
    for settings in tree["axes"]["norm"].values():
        settings |= {**SETTINGS, "arch.args.conv_layer_type": "conv"}
    file = tmp_path / "grid.json"
    file.write_text(json.dumps(tree))
    return file


def test_the_ablation_studys_own_commands(tmp_path):
    listed = study("--list", cwd=tmp_path)
    assert [line.partition(":")[0] for line in listed.stdout.splitlines()] == [
        "baseline",
        "resnet34",
        "resnet50",
        "no_batchnorm",
        "cosine_schedule",
        "no_schedule",
        "small_batch",
        "large_batch",
    ]
    assert (
        "data_loader.args.batch_size=1024, optimizer.args.lr=0.2 (200 epochs"
        in listed.stdout.splitlines()[-1]
    )
    setting = ["--set", "data_loader.args.data_dir=my data"]
    dry = study(
        "--config", "baseline", "no_batchnorm", "--seed", 42, "--dry-run", *setting, cwd=tmp_path
    )
    lines = dry.stdout.splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("python train.py -c ")
    assert "no_batchnorm.json --run_dir saved/resnet/no_batchnorm_seed42_" in lines[1]
    assert lines[1].endswith("--set 'data_loader.args.data_dir=my data' --seed 42")
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"
    reader, writer = os.pipe()
    os.close(reader)
    cut = Fork(command("--list"), stdout=writer, stderr=subprocess.PIPE, cwd=tmp_path)
    os.close(writer)
    _, errors = cut.communicate(timeout=300)
    assert (cut.returncode, errors) == (1, b""), "as in: run_ablations.py --list | head -1"


KILLED_AT_ITS_FIRST_RUN = f"""if True:
    import os, runpy, signal, time
    import studies.launchers

    begin = studies.launchers.LocalJob.__init__

    def begin_and_die(self, run, *arguments, **named):
        begin(self, run, *arguments, **named)
        while not (run.folder / "model_last.pth").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGKILL)

    studies.launchers.LocalJob.__init__ = begin_and_die
    runpy.run_path({str(ROOT / "run_ablations.py")!r}, run_name="__main__")
"""
"""run_ablations.py, which is killed as soon as its first run has a checkpoint."""


def test_a_killed_study_is_finished_by_the_same_command(grid, tmp_path):
    words = [
        "--grid",
        grid,
        "--all",
        "--seed",
        0,
        "--save_dir",
        tmp_path / "out",
        "--set",
        "augmentation.flip=false",
    ]
    killed = python("-c", KILLED_AT_ITS_FIRST_RUN, *words, cwd=tmp_path, before=fork_programs)
    assert killed.returncode == -signal.SIGKILL
    before = {file: file.read_bytes() for file in (tmp_path / "out").glob("*/result.json")}
    assert len(before) < 2
    # Which waits for runs of the killed study that are still saving
    done = study(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 runs are finished" in done.stdout
    results = list((tmp_path / "out").glob("*/result.json"))
    assert len(results) == 2
    assert all(file.read_bytes() == content for file, content in before.items())
    assert all(
        len((file.parent / "metrics.jsonl").read_text().splitlines()) == 3 for file in results
    )
    configs = [json.loads((file.parent / "config.json").read_text()) for file in results]
    assert [config["augmentation"]["flip"] for config in configs] == [False, False], (
        "--set reaches the runs"
    )
    times = {file: file.stat().st_mtime_ns for file in results}
    again = study(*words, cwd=tmp_path)
    assert again.returncode == 0
    assert {file: file.stat().st_mtime_ns for file in results} == times, "finished runs are skipped"
    dry = study(*words, "--dry-run", cwd=tmp_path)
    assert [
        line.startswith("# finished: python train.py -r ") for line in dry.stdout.splitlines()
    ] == [True, True]


def test_ctrl_c_saves_and_the_exit_code_says_so(grid, tmp_path):
    tree = json.loads(grid.read_text())
    tree["axes"]["norm"]["bn"]["trainer.epochs"] = 500
    grid.write_text(json.dumps(tree))
    words = ["--grid", grid, "--config", "bn", "--seed", 0, "--save_dir", tmp_path / "out"]
    process = Fork(
        command(*words),
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        before=fork_programs,
    )
    while not list((tmp_path / "out").glob("*/model_last.pth")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 143
    assert "stopped with 1 of 1 runs to do; the same command continues them" in errors
    (output,) = (tmp_path / "out").glob("*/output.log")
    assert "stopped by SIGTERM" in output.read_text()


def test_two_studies_share_the_work(grid, tmp_path):
    words = command("--grid", grid, "--all", "--save_dir", tmp_path / "out")
    both = [
        Fork(words, cwd=tmp_path, stdout=-1, stderr=-1, text=True, before=fork_programs)
        for _ in range(2)
    ]
    for process in both:
        output, errors = process.communicate(timeout=300)
        assert (process.returncode, errors) == (0, "")
        assert "4 of 4 runs are finished" in output
    logs = list((tmp_path / "out").glob("*/output.log"))
    assert len(logs) == 4
    assert all(log.read_text().count("run folder ") == 1 for log in logs), "no run is started twice"
    table = ["--table", tmp_path / "t.md"]
    done = script("plot_training_logs.py", tmp_path / "out", *table, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / "t.md").read_text().splitlines()[2:4]
    assert [row.split(" | ")[:2] for row in rows] == [["| bn", "2"], ["| gn", "2"]], (
        "the variants, in the grid's order"
    )


def status_rows():
    """One running and eight failed runs."""
    trainer = SimpleNamespace(epochs=12345678, monitor="off")
    states = [State.RUNNING, *[State.FAILED] * 8]
    return [
        StatusRow(
            SimpleNamespace(name=f"run {n}", config=SimpleNamespace(trainer=trainer)),
            Progress(state, 7, None),
            None,
        )
        for n, state in enumerate(states)
    ]


def test_the_table_is_cut_to_a_narrow_and_low_terminal(monkeypatch, capsys):
    monkeypatch.setattr("studies.work.get_terminal_size", lambda: os.terminal_size((20, 6)))
    display = _Display()
    display._redraw(status_rows())
    display._redraw(status_rows())
    drawn = capsys.readouterr().out.removesuffix("\n").split("\x1b[3A\x1b[J")
    assert len(drawn) == 2
    assert drawn[1].splitlines() == [
        "run      state     ",
        "run 0  running  7/1",
        "9 runs, 0 finished,",
    ]


def test_a_file_gets_a_line_for_every_new_state(capsys):
    display = _Display()
    rows = status_rows()[:2]
    display.show(rows)
    display.show(rows)
    display.show([replace(rows[0], progress=Progress(State.FINISHED, 9, None)), rows[1]])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:3] for line in lines] == [
        ["run", "state", "epoch"],
        ["run", "0", "running"],
        ["run", "1", "failed"],
        ["run", "0", "finished"],
    ]


def test_a_failure_is_reported_at_the_end_and_stops_no_other_run(grid, tmp_path):
    tree = json.loads(grid.read_text())
    tree["variants"] = {"bad": {**SETTINGS, "optimizer.args.lr": 1e30}}
    grid.write_text(json.dumps({**tree, "seeds": [0]}))
    done = study(
        "--grid", grid, "--config", "bad", "bn", "--save_dir", tmp_path / "out", cwd=tmp_path
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert done.stderr.startswith("error: failed: bad seed 0 (exit code 5: epoch ")
    assert "is not finite" in done.stderr
    assert "1 of 2 runs are finished" in done.stdout


def test_a_cluster_takes_the_same_path(grid, tmp_path):
    pytest.importorskip("submitit")
    words = [
        "--grid",
        grid.name,
        "--config",
        "bn",
        "--seed",
        1,
        "--save_dir",
        "out",
        "--launcher",
        "local",
    ]
    settings = ["--set", "trainer.epochs=1", "--parameter", "timeout_min=5"]
    # submitit's processes are not forked
    done = script("run_ablations.py", *words, *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 of 1 runs are finished" in done.stdout
    [result] = (tmp_path / "out").glob("bn_seed1_*/result.json")
    assert json.loads((result.parent / "config.json").read_text())["trainer"]["epochs"] == 1
    [log] = (tmp_path / "out" / "jobs").glob("*_log.out")
    assert "run_ablations.py" in log.read_text()
    # A command: a job needs no room of the clone to read what it is to do
    [work] = (tmp_path / "out" / "jobs").glob("*_submitted.pkl")
    assert b"CommandFunction" in work.read_bytes()
    assert b"studies" not in work.read_bytes()


def test_bad_input_is_one_line(grid, tmp_path):
    cases = {
        "nothing chosen": (["--grid", grid], "one of --config NAME ... and --all is required"),
        "no such grid": (["--grid", "none.json", "--list"], "none.json: no such config file"),
        "no such variant": (["--grid", grid, "--config", "gm"], "no variant 'gm' (it has: bn, gn)"),
        "both": (
            ["--grid", grid, "--all", "--config", "bn"],
            "one of --config NAME ... and --all is required",
        ),
        "no cluster": (
            ["--grid", grid, "--all", "--parameter", "a=1"],
            "--parameter a=1: has no effect without --launcher",
        ),
        "no setting": (
            ["--grid", grid, "--all", "--set", "seed"],
            "--set seed: expected KEY=VALUE",
        ),
        "no value": (
            ["--grid", grid, "--all", "--parameter", "a"],
            "--parameter a: expected KEY=VALUE",
        ),
        "no jobs": (["--grid", grid, "--all", "--jobs", "0"], "--jobs: expected at least 1"),
        "no folder": (
            ["--grid", grid, "--all", "--save_dir", grid],
            "grid.json: cannot be written",
        ),
    }
    for name, (words, message) in cases.items():
        done = script("run_ablations.py", *words, cwd=tmp_path)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), f"{name}: {done.stderr}"
        assert message in done.stderr, name
