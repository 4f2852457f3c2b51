"""train.py as a user runs it, in a new process and from another folder."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from base.command_line import config_parser
from base.errors import ConfigError
from experiment.evaluation_flags import evaluation_parser
from tiny_runs import Fork, script, write_images

ROOT = Path(__file__).parents[1]
SHORT = [
    "--set",
    "trainer.epochs=2",
    "--set",
    "data_loader.args.num_batches=4",
    "--set",
    "system.num_threads=1",
]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs with spaces") / "прогон 🙂"
    strict = [sys.executable, "-W", "error::DeprecationWarning", ROOT / "train.py"]
    words = ["-c", ROOT / "configs" / "quickstart.json", "--run_dir", folder, *SHORT]
    done = subprocess.run(
        list(map(str, [*strict, *words])),
        cwd=folder.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder, done


def test_quickstart_in_small(finished_run):
    folder, done = finished_run
    result = json.loads((folder / "result.json").read_text())
    assert result["epochs"] == 2
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    assert "epoch 2" in done.stdout
    assert "test_top1" in done.stdout
    assert done.stderr == ""


def test_a_finished_run_cannot_be_overwritten(finished_run, tmp_path):
    folder, _ = finished_run
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    again = script(
        "train.py",
        "-c",
        ROOT / "configs" / "quickstart.json",
        "--run_dir",
        folder,
        *SHORT,
        cwd=tmp_path,
    )
    assert again.returncode == 2
    assert "already holds a run; continue it with -r" in again.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def image_folder(root, *, broken=None):
    """Two classes of a few 8x8 images."""
    for part in ("train", "test"):
        write_images(root / part, {"cat": 4, "dog": 4})
    if broken:
        path = root / broken / "dog" / "002.png"
        path.write_bytes(path.read_bytes()[:100])
    return root


def bad_inputs(tmp_path):
    """Config, further words, exit code, what the one line names."""
    digits = {"data_loader": {"type": "DigitsDataLoader"}}
    images = {"data_loader": {"type": "ImageFolderDataLoader", "args": {"data_dir": "images"}}}
    image_folder(tmp_path / "broken", broken="train")
    image_folder(tmp_path / "broken test", broken="test")
    broken_test = {"data_loader": {**images["data_loader"], "args": {"data_dir": "broken test"}}}
    small = {
        "arch": {"type": "vgg11"},
        "data_loader": {**images["data_loader"], "args": {"data_dir": "whole"}},
    }
    image_folder(tmp_path / "whole")
    (tmp_path / "weights.pth").write_bytes(b"not weights")
    return {
        "misspelt key": (
            {**digits, "trainer": {"epoch": 3}},
            [],
            2,
            "trainer.epoch: unknown key; did you mean 'epochs'?",
        ),
        "wrong type": (
            {**digits, "trainer": {"epochs": "3"}},
            [],
            2,
            "trainer.epochs: Input should be a valid integer, not",
        ),
        "unknown layer": (digits, ["--conv", "prec_cnov"], 2, "did you mean 'prec_conv'?"),
        "unknown optimizer argument": (
            digits,
            ["--set", "optimizer.args.momentun=1"],
            2,
            "did you mean 'momentum'?",
        ),
        "adversarial": (
            {**digits, "trainer": {"do_adv": True}},
            [],
            2,
            "trainer.do_adv: asks for adversarial training",
        ),
        "no config": (None, [], 2, "-c CONFIG or -r CHECKPOINT is required"),
        "missing data folder": (images, [], 4, "images"),
        "truncated image": (
            images,
            ["--set", f"data_loader.args.data_dir={tmp_path / 'broken'}"],
            4,
            "dog/002.png",
        ),
        "truncated test image": (broken_test, [], 4, "test/dog/002.png"),
        "image too small": (
            small,
            [],
            2,
            "arch.type: vgg11 cannot be trained on batches of 2 images of 8x8",
        ),
        "damaged checkpoint": (
            None,
            ["-r", tmp_path / "weights.pth"],
            3,
            "weights.pth: is not a readable checkpoint",
        ),
    }


@pytest.mark.parametrize(
    "name",
    [
        "misspelt key",
        "wrong type",
        "unknown layer",
        "unknown optimizer argument",
        "adversarial",
        "no config",
        "missing data folder",
        "truncated image",
        "truncated test image",
        "image too small",
        "damaged checkpoint",
    ],
)
def test_bad_input_is_one_line_an_exit_code_and_nothing_written(tmp_path, name):
    tree, words, code, message = bad_inputs(tmp_path)[name]
    if tree is not None:
        (tmp_path / "config.json").write_text(json.dumps(tree))
        words = ["-c", "config.json", "--set", "system.num_threads=1", *words]
    before = sorted(tmp_path.rglob("*"))
    done = script("train.py", *words, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_word_is_not_a_path():
    """It is what a script with an unset variable hands over."""
    training, evaluation = config_parser("x"), evaluation_parser("x")
    commands = [(training, [flag, ""]) for flag in ("-c", "-r", "--resume", "--run_dir")]
    commands += [(evaluation, ["-s", ""]), (evaluation, ["-s", "run", "-c", ""])]
    for parser, words in commands:
        with pytest.raises(
            ConfigError, match=rf"argument .*{words[-2]}.*: expected a path, not an empty word"
        ):
            parser.parse_args(words)
    assert evaluation.parse_args(["-s", "~/run"]).checkpoint == str(Path.home() / "run")


def test_checkpoint_of_another_architecture_is_refused_and_kept(finished_run, tmp_path):
    folder, _ = finished_run
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = {"arch": {"type": "resnet18"}, "data_loader": {"type": "DigitsDataLoader"}}
    (tmp_path / "other.json").write_text(json.dumps(other))
    done = script("train.py", "-c", "other.json", "-r", folder, cwd=tmp_path)
    assert done.returncode == 3
    assert (
        "model_last.pth: is of another architecture: arch.type is 'simpleCNN' there and 'resnet18'"
        in done.stderr
    )
    assert len(done.stderr.splitlines()) == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


THREE_EPOCHS = [
    "-c",
    ROOT / "configs" / "quickstart.json",
    "--set",
    "trainer.epochs=3",
    "--set",
    # Of 21: the signal comes at the seventh.
    "data_loader.args.num_batches=9",
    "--set",
    "system.num_threads=1",
]


HANG = 300
"""Seconds after which a process hangs: far more than it takes on a busy machine."""
WAITING_FOR_A_SIGNAL = """if True:
    import runpy, time
    from pathlib import Path
    from base.base_trainer import BaseTrainer

    update, second_epoch = BaseTrainer.update, 0

    def stop_and_go(self, *arguments, **named):
        global second_epoch
        update(self, *arguments, **named)
        second_epoch += self.state.epochs_done == 1
        if second_epoch == 7:
            Path({there!r}).touch()
            while self.signals.asked is None:
                time.sleep(0.01)

    BaseTrainer.update = stop_and_go
    runpy.run_path({script!r}, run_name="__main__")
"""
"""train.py, which stops in the middle of the second epoch until a signal comes."""


def wait_for(condition, process):
    """Until a process has come so far; an error if it ends before."""
    deadline = time.monotonic() + HANG
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "the process hangs"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = script("train.py", *THREE_EPOCHS, "--run_dir", folder, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_killed_and_resumed_ends_with_the_same_weights(whole_run, tmp_path, number, code):
    """SIGKILL repeats the broken epoch; SIGINT saves in its middle."""
    there = tmp_path / "in the second epoch"
    program = WAITING_FOR_A_SIGNAL.format(script=str(ROOT / "train.py"), there=str(there))
    process = Fork(
        [
            sys.executable,
            "-c",
            program,
            *map(str, THREE_EPOCHS),
            "--run_dir",
            str(tmp_path / "killed"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(there.exists, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=HANG)
    assert process.returncode == code, errors
    metrics = tmp_path / "killed" / "metrics.jsonl"
    assert len(metrics.read_text().splitlines()) == 1, "the run was killed in its second epoch"
    resumed = script("train.py", "-r", tmp_path / "killed", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert metrics.read_bytes() == (whole_run / "metrics.jsonl").read_bytes()
    runs = (tmp_path / "killed", whole_run)
    weights = [torch.load(run / "model_last.pth", weights_only=True)["state_dict"] for run in runs]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[1])
    assert (
        torch.load(tmp_path / "killed" / "model_last.pth", weights_only=True)["progress"][
            "batches_done"
        ]
        == 0
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_to_the_whole_process_group_saves_although_workers_get_it_too(
    tmp_path, number, code
):
    image_folder(tmp_path / "images")
    streamed = {"in_memory": False, "num_workers": 2}
    args = {
        "data_dir": str(tmp_path / "images"),
        "batch_size": 2,
        "validation_split": 0.2,
        **streamed,
    }
    tree = {
        "arch": {"type": "simpleCNN"},
        "data_loader": {"type": "ImageFolderDataLoader", "args": args},
        "trainer": {"epochs": 10_000},
        "system": {"num_threads": 1},
    }
    (tmp_path / "config.json").write_text(json.dumps(tree))
    words = [ROOT / "train.py", "-c", tmp_path / "config.json", "--run_dir", tmp_path / "run"]
    process = Fork(
        [sys.executable, *map(str, words)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text(), process)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=HANG)
    assert process.returncode == code, errors
    assert f"stopped by {number.name}" in errors
    progress = torch.load(tmp_path / "run" / "model_last.pth", weights_only=True)["progress"]
    assert progress["epochs_done"] >= 1
