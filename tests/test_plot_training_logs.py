"""plot_training_logs.py as a user runs it, from another folder."""

import csv
import json
from pathlib import Path

import pytest

from base.config import validate
from tiny_runs import script

ROOT = Path(__file__).parents[1]


def write_run(folder, seed, norm, shift, rate=0.0, finished=True):
    folder.mkdir(parents=True)
    config = {
        "seed": seed,
        "arch": {"type": "simpleCNN", "args": {"norm_layer_type": norm}},
        "data_loader": {"type": "DigitsDataLoader"},
        "trainer": {"sym": True, "percent": rate},
    }
    (folder / "config.json").write_text(json.dumps(validate(config).dump()))
    lines = [
        {"epoch": epoch, "val_top1": shift + epoch / 100, "val_robust_top1": shift / 2}
        for epoch in (1, 2, 3)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        (folder / "result.json").write_text(
            json.dumps({"test_top1": shift, "last_test_top1": shift - 0.01, "seed": seed})
        )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    for norm, shifts in {"bn": (0.50, 0.52, 0.54), "gn": (0.55, 0.54, 0.60)}.items():
        for seed, shift in enumerate(shifts):
            write_run(folder / "norms" / f"{norm}_{seed}", seed, norm, shift)
    for rate in (0.0, 0.4):
        write_run(folder / "noise" / f"{rate}", 0, "bn", 0.6 - rate, rate)
    write_run(folder / "noise" / "unfinished", 1, "bn", 0.5, 0.4, finished=False)
    return folder


def test_curves_and_table(saved, tmp_path):
    by_norm = ["--group-by", "arch.args.norm_layer_type"]
    done = script(
        "plot_training_logs.py",
        saved / "norms",
        *by_norm,
        "--metric",
        "val_robust_top1",
        "val_top1",
        "--out",
        "a.png",
        "--table",
        "a.csv",
        "--baseline",
        "bn",
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "wrote a.png: 6 runs in 2 groups\nwrote a.csv: 6 runs in 2 groups\n"
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["runs"], row["n"], row["test_top1_mean"][:6]) for row in rows] == [
        ("bn", "3", "0.52"),
        ("gn", "3", "0.5633"),
    ]
    # scipy's Welch test of (0.50, 0.52, 0.54) and (0.55, 0.54, 0.60)
    assert rows[1]["test_top1_p_holm"].startswith("0.13216")
    one = [saved / "norms" / "bn_0", "--table", tmp_path / "new" / "a.tex"]
    only = script("plot_training_logs.py", *one, cwd=tmp_path)
    assert (only.returncode, only.stderr) == (0, "")
    assert r"Experiment & 1 & 50.00 & 49.00 \\" in (tmp_path / "new" / "a.tex").read_text()


def test_final_values_against_noise(saved, tmp_path):
    words = ["--against", "trainer.percent", "--out", "noise.svg", "--table", "noise.md"]
    done = script("plot_training_logs.py", saved / "noise", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    unfinished = saved / "noise" / "unfinished"
    warning = f"warning: {unfinished}: not finished after epoch 3: its results are left out\n"
    assert done.stderr == warning
    assert (
        done.stdout == "wrote noise.svg: 2 runs in 2 groups\nwrote noise.md: 2 runs in 2 groups\n"
    )
    assert "rate of label noise" in (tmp_path / "noise.svg").read_text()
    lines = (tmp_path / "noise.md").read_text().splitlines()
    assert lines[2:4] == ["| 0 | 1 | 60.00 | 59.00 |", "| 0.4 | 1 | 20.00 | 19.00 |"]


def test_bad_input_is_one_line_and_leaves_nothing(saved, tmp_path):
    norms, by_norm = saved / "norms", ["--group-by", "arch.args.norm_layer_type"]
    bad = {
        "nothing to write": (
            [norms, *by_norm],
            "nothing to write: name a picture with --out FILE or a table with --table FILE",
        ),
        "no paths": (["--out", "a.png"], "the following arguments are required: RUN_OR_FOLDER"),
        "metric without out": (
            [norms, "--table", "a.md", "--metric", "x"],
            "--metric: no effect without --out FILE",
        ),
        "baseline without table": (
            [norms, "--out", "a.png", "--baseline", "x"],
            "--baseline: no effect without --table FILE",
        ),
        "pairs without baseline": (
            [norms, "--table", "a.md", "--paired"],
            "--paired: no effect without --baseline ROW",
        ),
        "last epoch": (
            [norms, *by_norm, "--table", "a.md", "--last-epoch", "val_topp1"],
            "--last-epoch val_topp1: no run logs it in its last epoch;"
            " there are: epoch, val_top1, val_robust_top1; did you",
        ),
        "report": (
            [norms, *by_norm, "--table", "a.md", "--eval", "pgd"],
            "--eval pgd: no run has such a report in eval/; there are: none",
        ),
        "averaging": (
            [norms, "--out", "a.png"],
            f"arch.args.norm_layer_type: bn in {norms / 'bn_0'}, but gn in {norms / 'gn_0'}",
        ),
        "metric": (
            [norms, *by_norm, "--out", "a.png", "--metric", "top"],
            "no run logs it; there are: val_top1, val_robust_top1",
        ),
        "result": (
            [norms, *by_norm, "--table", "a.md", "--result", "top"],
            "there are: test_top1, last_test_top1, seed",
        ),
        "row": (
            [norms, *by_norm, "--table", "a.md", "--baseline", "in"],
            "--baseline in: no such row; there are: bn, gn",
        ),
        "picture": ([norms, *by_norm, "--out", "a.md"], "a.md: '.md' is not a format of pictures"),
        "table": (
            [norms, *by_norm, "--out", "a.png", "--table", "a.png"],
            "a.png: '.png' is not a format of tables",
        ),
        "no run": ([saved / "none", "--out", "a.png"], "none: no such folder"),
        "axis": (
            [norms, "--against", "arch.type", *by_norm, "--out", "a.png"],
            "--against arch.type: simpleCNN in ",
        ),
    }
    for name, (words, message) in bad.items():
        done = script("plot_training_logs.py", *words, cwd=tmp_path)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), f"{name}: {done.stderr}"
        assert message in done.stderr, f"{name}: {done.stderr}"
        assert done.stdout == "", name
        assert list(tmp_path.iterdir()) == [], name
