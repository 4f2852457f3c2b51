"""A run folder of an older version can be resumed, evaluated and put into a table.

`tests/golden/old_run` was stopped by SIGTERM after one minibatch of its third epoch, and
`tests/golden/old_run_finished` is how the same version finished it.
"""

import json
import shutil
from pathlib import Path

import pytest

from tiny_runs import script

GOLDEN = Path(__file__).parent / "golden"
FINISHED = GOLDEN / "old_run_finished"
ROUNDING = 0.11
"""Another processor rounds otherwise, and training under attack amplifies it; one of 20 images is
0.05."""


@pytest.fixture
def old_run(tmp_path):
    return Path(shutil.copytree(GOLDEN / "old_run", tmp_path / "cwd" / "old_run"))


def log_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_an_old_run_is_resumed(old_run):
    before = log_of(old_run)
    done = script("train_robust.py", "-r", "old_run", cwd=old_run.parent)
    assert done.returncode == 0, done.stderr
    expected = log_of(FINISHED)
    resumed = log_of(old_run)
    assert resumed[:2] == before == expected[:2]
    assert len(resumed) == 3
    assert resumed[2] == pytest.approx(expected[2], abs=ROUNDING)
    expected = json.loads((FINISHED / "result.json").read_text())
    result = json.loads((old_run / "result.json").read_text())
    for name in ("best_epoch", "epochs", "n_train", "n_val", "n_test", "parameters", "seed"):
        assert result[name] == expected[name]
    accuracies = {name: value for name, value in expected.items() if "test_" in name}
    assert {name: result[name] for name in accuracies} == pytest.approx(accuracies, abs=ROUNDING)


def test_an_old_run_is_validated(old_run):
    words = ["-s", "old_run", "--limit", 40, "--steps", 5, "--json", "report.json"]
    done = script("validate_pgd.py", *words, cwd=old_run.parent)
    assert done.returncode == 0, done.stderr
    report = json.loads((old_run.parent / "report.json").read_text())
    # What the older version measured with the same command
    assert (report["n"], report["steps"]) == (40, 5)
    assert report["clean_top1"] == pytest.approx(0.225, abs=ROUNDING)
    assert report["robust_top1"] == pytest.approx(0.1, abs=ROUNDING)


def test_an_old_run_appears_in_a_table(tmp_path):
    shutil.copytree(FINISHED, tmp_path / "cwd" / "finished")
    words = ["finished", "--table", "table.csv", "--result", "test_top1", "test_robust_top1"]
    done = script("plot_training_logs.py", *words, cwd=tmp_path / "cwd")
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "cwd" / "table.csv").read_text()
    assert "0.25626" in table
    assert "0.175" in table
