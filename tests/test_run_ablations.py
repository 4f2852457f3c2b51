"""run_ablations.py as a user runs it: list, dry run, a study that is killed and started again, failures, submitit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETTINGS = {
    "data_loader.args.num_batches": 4, "data_loader.args.batch_size": 16, "trainer.monitor": "max val_top1",
    "system.num_threads": 1, "trainer.epochs": 3,
}  # fmt: skip


def command(*words):
    return [sys.executable, str(ROOT / "run_ablations.py"), *map(str, words)]


def study(*words, cwd):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command(*words), cwd=cwd, capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture
def grid(tmp_path):
    tree = {
        "base": os.path.relpath(ROOT / "configs" / "quickstart.json", tmp_path),
        "axes": {"norm": {"bn": {"arch.args.norm_layer_type": "bn"}, "gn": {"arch.args.norm_layer_type": "gn"}}},
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
        "baseline", "cosine_schedule", "multistep_schedule", "no_batchnorm", "small_batch", "resnet34", "resnet50",
    ]  # fmt: skip
    dry = study("--config", "baseline", "no_batchnorm", "--seed", 42, "--dry-run", cwd=tmp_path)
    lines = dry.stdout.splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("python train.py -c ")
    assert "no_batchnorm.json --run_dir saved/resnet/no_batchnorm_seed42_" in lines[1]
    assert lines[1].endswith("--seed 42")
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"


def test_a_killed_study_is_finished_by_the_same_command(grid, tmp_path):
    words = ["--grid", grid, "--all", "--seed", 0, "--save_dir", tmp_path / "out"]
    process = subprocess.Popen(command(*words), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not list((tmp_path / "out").glob("*/model_last.pth")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = {file: file.read_bytes() for file in (tmp_path / "out").glob("*/result.json")}
    assert len(before) < 2
    deadline = time.monotonic() + 60
    while True:
        done = study(*words, cwd=tmp_path)
        if "another process works on" not in done.stderr or time.monotonic() > deadline:
            break  # the killed study's runs were still saving
    assert done.returncode == 0, done.stderr
    assert "2 of 2 runs are finished" in done.stdout
    results = list((tmp_path / "out").glob("*/result.json"))
    assert len(results) == 2
    assert all(file.read_bytes() == content for file, content in before.items())
    assert all(len((file.parent / "metrics.jsonl").read_text().splitlines()) == 3 for file in results)
    times = {file: file.stat().st_mtime_ns for file in results}
    again = study(*words, cwd=tmp_path)
    assert again.returncode == 0
    assert {file: file.stat().st_mtime_ns for file in results} == times, "finished runs are skipped"


def test_ctrl_c_saves_and_the_exit_code_says_so(grid, tmp_path):
    tree = json.loads(grid.read_text())
    tree["axes"]["norm"]["bn"]["trainer.epochs"] = 500
    grid.write_text(json.dumps(tree))
    words = ["--grid", grid, "--config", "bn", "--seed", 0, "--save_dir", tmp_path / "out"]
    process = subprocess.Popen(command(*words), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not list((tmp_path / "out").glob("*/model_last.pth")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "stopped with 1 of 1 runs to do; the same command continues them" in errors
    (output,) = (tmp_path / "out").glob("*/output.log")
    assert "stopped by SIGTERM" in output.read_text()


def test_a_failure_is_reported_at_the_end_and_stops_nothing(grid, tmp_path):
    tree = json.loads(grid.read_text())
    tree["variants"] = {"bad": {**SETTINGS, "optimizer.args.lr": 1e30}}
    grid.write_text(json.dumps({**tree, "seeds": [0]}))
    done = study("--grid", grid, "--config", "bad", "bn", "--save_dir", tmp_path / "out", cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert done.stderr.startswith("failed: bad seed 0 (exit code 5: epoch ")
    assert "is not finite" in done.stderr
    assert "1 of 2 runs are finished" in done.stdout


def test_a_cluster_takes_the_same_path(grid, tmp_path):
    pytest.importorskip("submitit")
    words = ["--grid", grid, "--config", "bn", "--seed", 0, "--save_dir", tmp_path / "out", "--launcher", "local"]
    done = study(*words, "--parameter", "timeout_min=5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 of 1 runs are finished" in done.stdout
    assert list((tmp_path / "out" / "jobs").glob("*_log.out"))


def test_bad_input_is_one_line(grid, tmp_path):
    cases = {
        "nothing chosen": (["--grid", grid], "--config NAME ... or --all is required"),
        "no such grid": (["--grid", "none.json", "--list"], "none.json: no such config file"),
        "no such variant": (["--grid", grid, "--config", "gm"], "no variant 'gm' (it has: bn, gn)"),
        "no jobs": (["--grid", grid, "--all", "--jobs", "0"], "--jobs: expected at least 1"),
    }
    for name, (words, message) in cases.items():
        done = study(*words, cwd=tmp_path)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), f"{name}: {done.stderr}"
        assert message in done.stderr, name
