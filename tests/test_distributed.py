"""Training in two processes equals training in one, also when it fails, stops or is resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from socket import socket
from unittest.mock import patch

import pytest
import torch

import base.signals
from base.base_data_loader import BaseDataLoader
from base.base_trainer import BaseTrainer
from base.checkpoint import load_checkpoint
from base.config import validate
from base.config.tree import merge
from base.distributed import is_primary, rank, world_size
from base.errors import ConfigError, Stopped
from base.run_folder.environment import PROVENANCE
from data_loader import DATA_LOADERS, data_loaders
from experiment import build
from experiment.evaluation_flags import evaluation_parser
from experiment.experiment import Experiment, resume
from experiment.loading import load_evaluation
from tests.base.distributed.two_processes import ended, start_two
from tiny_runs import Fork, few_digits

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
CPU = {"system": {"device": "cpu", "num_threads": 1}}
TINY = {
    **CPU,
    "seed": 3,
    "arch": {"type": "simpleCNN", "args": {"norm_layer_type": "gn"}},
    # Minibatches of 37, 37 and 1: uneven shards, and one with fewer images than processes
    "data_loader": {
        "type": "DigitsDataLoader",
        "args": {"batch_size": 37, "validation_split": 0.1},
    },
    "optimizer": {"type": "SGD", "args": {"lr": 0.02, "momentum": 0.9}},
    "trainer": {"epochs": 2, "verbosity": 0, "subset_percent": 0.185},
}
SYNCHRONIZED = {
    "arch": {"args": {"conv_layer_type": "prec_conv", "norm_layer_type": "no"}},
    "system": {"sync_bn": True},
}
ATTACKED = {"steps": 2, "validate_images": 21, "report_images": 21}
METHODS = {
    "standard": {"augmentation": {"cutout": 4}},
    "mixup": {"augmentation": {"mixup_alpha": 0.5}, "trainer": {"OCNN": True, "ema_decay": 0.9}},
    "pgd": merge(
        SYNCHRONIZED,
        {
            "adversarial": {"method": "pgd", "restarts": 2, **ATTACKED},
            "trainer": {"ema_decay": 0.9},
            "data_loader": {"args": {"batch_size": 36}},  # and 36 and 3
        },
    ),
    "free": {
        "adversarial": {"method": "free", "noise": "carry", **ATTACKED},
        "trainer": {"adv_repeats": 2},
    },
    "trades": {"adversarial": {"method": "trades", "clean_passes": 2, **ATTACKED}},
    "own data": {"data_loader": {"type": "OwnDigits"}, "augmentation": {"cutout": 4}},
}


class OwnDigits(BaseDataLoader):
    """A user's data set, which gives images by position."""

    def __init__(self, train: bool = True) -> None:
        digits = few_digits(train)
        self.pixels, self.labels = digits.images.pixels, torch.from_numpy(digits.labels)
        self.class_names = digits.class_names

    def images_at(self, positions):
        return self.pixels[positions]

    def test_loader(self):
        return OwnDigits(train=False)


@contextmanager
def few_digits_in_double_precision():
    """In single precision one rounding error may change a maximum or the sign of a gradient, and
    two runs of the same algorithm diverge."""
    original = build.build_completed_model

    def in_double(*words, **named):
        return original(*words, **named).double()

    with (
        patch.object(build, "build_completed_model", in_double),
        patch.object(data_loaders, "read_digits", few_digits),
        patch.dict(DATA_LOADERS, OwnDigits=OwnDigits),
    ):
        yield


def train_all(folder):
    """Every method; where there are two processes, one more run is stopped in the middle of its
    second epoch."""
    with few_digits_in_double_precision():
        for name, settings in METHODS.items():
            Experiment.from_config(validate(merge(TINY, settings))).run(str(folder / name))
        if world_size() == 2:
            stop_in_the_middle(validate(merge(TINY, METHODS["free"])), folder / "stopped")


def stop_in_the_middle(config, folder):
    """A signal reaches the second process only, at the fourth minibatch."""
    update, count = BaseTrainer.update, 0

    def counted(self, loss):
        nonlocal count
        update(self, loss)
        count += 1
        if count == 8 and rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with (
        patch.object(BaseTrainer, "update", counted),
        # However fast the machine is, the processes ask each other after every minibatch.
        patch.object(base.signals, "QUESTION_BATCHES", 1),
        pytest.raises(Stopped if is_primary() else SystemExit),
    ):
        Experiment.from_config(config).run(str(folder))
    assert count == 8, "both stop after the same minibatch"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of the same runs in one and in two processes."""
    folder = tmp_path_factory.mktemp("runs")
    script = (
        "import sys, pathlib; from base.distributed import distributed_session\n"
        "from tests.test_distributed import train_all\n"
        "with distributed_session(training=True): train_all(pathlib.Path(sys.argv[1]))\n"
    )
    (folder / "train_all.py").write_text(script)
    codes, errors = ended(start_two(folder / "train_all.py", folder / "two"))
    assert codes == [0, 0], errors
    train_all(folder / "one")
    return folder


def logs(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def largest_difference(first, second, key="state_dict"):
    ours, theirs = load_checkpoint(first)[key], load_checkpoint(second)[key]
    assert ours.keys() == theirs.keys()
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours)


ROUNDING = 1e-10
"""How far runs in double precision may be apart after two epochs."""


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_equal_one(runs, method):
    one, two = runs / "one" / method, runs / "two" / method
    # Mixup's class probabilities, and so the accuracies of training, are in single precision
    rounding = 1e-7 if method == "mixup" else ROUNDING
    for ours, theirs in zip(logs(one), logs(two), strict=True):
        assert theirs == pytest.approx(ours, abs=rounding)
    assert largest_difference(one / "model_last.pth", two / "model_last.pth") < ROUNDING
    if "ema_decay" in METHODS[method].get("trainer", {}):
        assert (
            largest_difference(one / "model_last.pth", two / "model_last.pth", "ema_state_dict")
            < ROUNDING
        )
    results = [json.loads((run / "result.json").read_text()) for run in (one, two)]
    for name in ("train_seconds", "images_per_second"):
        assert all(result.pop(name) > 0 for result in results)
    for name in PROVENANCE:
        assert results[1].pop(name) == results[0].pop(name)
    assert results[1] == pytest.approx(results[0], abs=ROUNDING)


@pytest.mark.parametrize("processes", ["one", "two"])
def test_own_data_trains_like_a_known_data_set(runs, processes):
    own, known = (runs / processes / name for name in ("own data", "standard"))
    assert largest_difference(own / "model_last.pth", known / "model_last.pth") == 0


def test_the_comparison_can_fail(runs):
    assert (
        largest_difference(
            runs / "one" / "standard" / "model_last.pth", runs / "two" / "trades" / "model_last.pth"
        )
        > 1e-3
    )


def test_checkpoints_do_not_depend_on_the_number_of_processes(runs):
    one, two = (load_checkpoint(runs / name / "free" / "model_last.pth") for name in ("one", "two"))
    assert torch.equal(one["method"]["perturbation"], two["method"]["perturbation"])
    assert len(one["method"]["perturbation"]) == 37
    assert one["progress"]["images_seen"] == two["progress"]["images_seen"] == 2 * 75


def test_a_run_stopped_in_two_processes_continues_in_one(runs):
    progress = load_checkpoint(runs / "two" / "stopped" / "model_last.pth")["progress"]
    assert (progress["epochs_done"], progress["batches_done"]) == (1, 1)
    with few_digits_in_double_precision():
        resume(str(runs / "two" / "stopped"))
    for ours, theirs in zip(
        logs(runs / "two" / "stopped"), logs(runs / "one" / "free"), strict=True
    ):
        assert ours == pytest.approx(theirs, abs=ROUNDING)
    assert (
        largest_difference(
            runs / "two" / "stopped" / "model_last.pth", runs / "one" / "free" / "model_last.pth"
        )
        < ROUNDING
    )


MANY = 100_000
"""Epochs that no test waits for."""


def config_file(folder, epochs=3):
    tree = merge(TINY, {"trainer": {"epochs": epochs, "verbosity": 1}})
    (folder / "config.json").write_text(json.dumps(tree))
    return folder / "config.json"


def begin(words, start=subprocess.Popen, **named):
    """Start a command with pipes for stdout and stderr."""
    words = list(map(str, words))
    return start(words, env=ENVIRONMENT, stdout=-1, stderr=-1, text=True, **named)


def wait_for_an_epoch(process, run):
    """Wait until a job has logged an epoch."""
    deadline = time.monotonic() + 500
    while not ((run / "metrics.jsonl").exists() and logs(run)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the job hangs"
        time.sleep(0.02)


def kill_rank_1():
    """Let rank 1 of a job's first attempt kill itself in its third epoch, when the first has
    certainly been saved."""
    if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) != ("1", "0"):
        return
    update = BaseTrainer.update

    def die_in_the_third_epoch(self, losses):
        if self.state.epochs_done == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        update(self, losses)

    BaseTrainer.update = die_in_the_third_epoch


def begin_torchrun(words):
    """Start torchrun as a fork, which forks its processes; see `kill_rank_1`."""

    def before():
        subprocess.Popen = partial(Fork, before=kill_rank_1)

    return begin(words, Fork, before=before)


def processes_of(launcher):
    """The process ids of torchrun's processes, by rank."""
    found = {}
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        for variable in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            if variable.startswith(b"RANK="):
                found[int(variable.removeprefix(b"RANK="))] = int(child)
    return found


def test_n_gpu_starts_processes_that_stop_together(tmp_path):
    words = [
        sys.executable,
        ROOT / "train.py",
        "-c",
        config_file(tmp_path, MANY),
        "--set",
        "n_gpu=2",
    ]
    process = begin([*words, "--run_dir", tmp_path / "run"])
    wait_for_an_epoch(process, tmp_path / "run")
    assert sorted(processes_of(process.pid)) == [0, 1]
    os.kill(processes_of(process.pid)[1], signal.SIGTERM)  # not to the one that writes
    output, errors = process.communicate(timeout=500)
    assert process.returncode == 143, errors
    assert errors.count("stopped by SIGTERM after") == 1
    assert output.count("epoch 1 ") == 1, "one process reports"
    assert 1 <= len(logs(tmp_path / "run")) < MANY


def test_a_dead_process_ends_all(tmp_path):
    words = [*TORCHRUN, ROOT / "train.py", "-c", config_file(tmp_path, MANY)]
    process = begin_torchrun([*words, "--run_dir", tmp_path / "run"])
    _, errors = process.communicate(timeout=500)
    assert process.returncode != 0
    assert "exitcode: -9" in errors.replace("  : ", ": ")
    assert len(logs(tmp_path / "run")) < MANY


def two_machines(folder, job, port):
    """Start a job on two machines."""
    where = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{port}"]
    several = ["--nnodes", 2, "--nproc_per_node", 1, "--max-restarts", 1, "--rdzv_id", job, *where]
    train = [ROOT / "train.py", "-c", config_file(folder), "--run_dir", folder / "run"]
    words = [*TORCHRUN[:3], *several, *train]
    return [begin_torchrun(words) for _ in range(2)]


def test_two_machines_restart_after_a_failure_and_leave_other_jobs_alone(tmp_path):
    with socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    run = tmp_path / "run"
    machines = two_machines(tmp_path, 1, port)
    output = "".join(process.communicate(timeout=500)[0] for process in machines)
    assert [process.returncode for process in machines] == [0, 0]
    assert "resumed after" in output
    assert [log["epoch"] for log in logs(run)] == [1, 2, 3]
    assert json.loads((run / "result.json").read_text())["epochs"] == 3

    before = {file: file.stat().st_mtime_ns for file in run.iterdir()}
    machines = two_machines(tmp_path, 2, port)
    errors = "".join(process.communicate(timeout=500)[1] for process in machines)
    assert all(process.returncode for process in machines), "rank 0 fails alone, and all end"
    assert errors.count("already holds a run; continue it with -r") == 2, "once for each attempt"
    assert {file: file.stat().st_mtime_ns for file in run.iterdir()} == before


@pytest.mark.parametrize("fails", ["all", "the first one, after the other is done"])
def test_an_error_is_printed_once_and_ends_all_processes(tmp_path, fails):
    script = (
        "from time import sleep\n"
        "from base.command_line import run_script; from base.errors import DataError\n"
        "from base.distributed import distributed_session, is_primary\n"
        "def main():\n"
        "    with distributed_session():\n"
        f"        if {fails == 'all'}:\n"
        "            raise DataError('no such images')\n"
        "        if is_primary():\n"
        "            sleep(1)\n"
        "            raise DataError('no such images')\n"
        "run_script(main)\n"
    )
    (tmp_path / "script.py").write_text(script)
    process = begin_torchrun([*TORCHRUN, tmp_path / "script.py"])
    _, errors = process.communicate(timeout=300)
    assert process.returncode != 0
    assert errors.splitlines().count("error: no such images") == 1
    # That of torchrun itself says which process it saw end
    assert "session.py" not in errors


def test_fewer_images_than_processes_are_refused(monkeypatch):
    monkeypatch.setattr(build, "world_size", lambda: 40)
    loader = BaseDataLoader.__new__(
        type("Loader", (BaseDataLoader,), dict.fromkeys(BaseDataLoader.__abstractmethods__))
    )
    loader.batch_size, loader.n_samples = 64, 64
    few = BaseDataLoader.__new__(type(loader))
    few.n_samples = 39
    attacked = validate(merge(TINY, {"adversarial": {"method": "pgd", **ATTACKED}}))
    reported = validate(
        merge(TINY, {"adversarial": {"method": "none", **ATTACKED, "validate_every": 0}})
    )
    for config, loaders, message in (
        (
            validate(TINY),
            (loader, few, loader),
            "the validation set: 39 images cannot be divided among 40 processes",
        ),
        (validate(TINY), (loader, None, few), "the test set: 39 images"),
        (attacked, (loader, loader, loader), "adversarial.validate_images: 21 images"),
        (reported, (loader, None, loader), "adversarial.report_images: 21 images"),
    ):
        with pytest.raises(ConfigError, match=message):
            build.check_image_counts(config, *loaders)
    loader.batch_size = 39
    with pytest.raises(ConfigError, match=r"data_loader.args.batch_size: 39 images"):
        build.check_image_counts(validate(TINY), loader, None, loader)


def test_a_lost_process_does_not_make_a_network_unfit():
    class Synchronized(torch.nn.Linear):
        def forward(self, images):
            raise RuntimeError(
                "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553]"
                " Connection closed by peer"
            )

    loader = BaseDataLoader.__new__(
        type("Loader", (BaseDataLoader,), dict.fromkeys(BaseDataLoader.__abstractmethods__))
    )
    loader.batch_size, loader.n_samples, loader.image_shape = 8, 8, (3, 4, 4)
    with pytest.raises(RuntimeError, match="closed by peer"):
        build.check_images_fit(Synchronized(1, 1), loader, "resnet18")


@pytest.mark.parametrize(
    ("device", "message"),
    [("cuda:1", "system.device: cuda:1 is one"), ("auto", "torchrun: asks for 4")],
)
def test_evaluation_refuses_to_share_a_device(tmp_path, monkeypatch, device, message):
    monkeypatch.setattr("base.distributed.launch.world_size", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "system": {"device": device}}))
    checkpoint = ROOT / "tests" / "golden" / "original_checkpoint_prec_conv" / "model_best.pth"
    words = ["-s", str(checkpoint), "-c", str(tmp_path / "config.json")]
    with pytest.raises(ConfigError, match=message):
        load_evaluation(evaluation_parser("").parse_args(words))
