"""`python -m benchmarks` as a user calls it."""

import json
import os
from pathlib import Path

import pytest
import torch

from tiny_runs import python

ROOT = Path(__file__).parents[2]


def benchmarks(*words):
    return python("-m", "benchmarks", *words, cwd=ROOT)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke")
    names = ["conv_norm_step", "training_step", "loading", "adversarial_step", "startup"]
    files = ["--json", folder / "new" / "numbers.json", "--table", folder / "table.md"]
    done = benchmarks("--smoke", "--device", "cpu", "--only", *names, *files, "--threads", 1)
    assert done.returncode == 0, done.stderr
    return (
        names,
        done,
        json.loads((folder / "new" / "numbers.json").read_text()),
        (folder / "table.md").read_text(),
    )


def test_a_run_prints_a_table_and_writes_its_numbers(smoke):
    names, done, numbers, table = smoke
    assert done.stderr == ""
    assert list(numbers["results"]) == names
    for name in names:
        assert f"== {name}\n" in done.stdout
        assert f"| {name} | " in table
        for row in numbers["results"][name]:
            assert row["result"]["low"] <= row["result"]["median"] <= row["result"]["high"]
            assert row["result"]["n"] == 1
            assert row["goal"] is None, "tiny networks have no goals"


def test_both_sides_of_the_original_algorithm_are_there(smoke):
    rows = smoke[2]["results"]["conv_norm_step"]
    assert {(row["ours"], row["other"], row["measure"]) for row in rows} == {
        ("ConvNorm", "BatchNorm", "x the cost"),
        ("ConvNorm", "ConvNorm as published", "x as fast"),
    }


def test_the_quickstart_imports_nothing_that_it_does_not_use(smoke):
    seconds, imported = smoke[2]["results"]["startup"]
    assert seconds["result"]["median"] > 0
    assert imported["result"]["median"] == 0


def test_hardware_is_described_without_names_of_machines_and_folders(smoke):
    _, done, numbers, table = smoke
    hardware = numbers["hardware"]
    assert hardware["threads"] == 1
    assert ("no rows in bf16" in done.stdout) == (not hardware["native_bf16"])
    assert {
        "cpu",
        "cores",
        "memory_gib",
        "gpu",
        "python",
        "torch",
        "torchvision",
        "torchattacks",
        "foolbox",
        "commit",
    } <= set(hardware)
    for text in (done.stdout, json.dumps(numbers), table):
        assert os.uname().nodename not in text
        assert str(ROOT) not in text


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--only", "memry"], 2, "--only: 'memry' is not one of: conv_norm_step, memory,"),
        (["--threads", "0"], 2, "--threads: expected at least 1, not 0"),
        (["--images", "0"], 2, "--images: expected at least 1, not 0"),
        (["--device", "tpu"], 2, "argument --device: invalid choice: 'tpu'"),
        pytest.param(
            ["--device", "cuda"],
            2,
            "--device cuda: no CUDA device is visible",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
        (["--json", "README.md/x.json"], 2, "--json README.md/x.json: cannot be written: "),
        (["--table", "."], 2, "--table .: cannot be written: "),
        (["--checkpoint", "nowhere"], 3, "nowhere: "),
    ],
)
def test_errors_are_one_line(words, code, message):
    done = benchmarks(*words)
    assert done.returncode == code
    assert done.stderr.startswith(f"error: {message}"), done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
