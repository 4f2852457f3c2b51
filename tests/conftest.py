"""Shared by all tests: one thread per process, signals as in a terminal, tiny data sets."""

import hashlib
import os
import pickle
import signal
import sys
import tarfile
import urllib.error

# torch reads it when it is first imported. Tests and the processes that they start share the
# machine's cores; with several threads in each process they would all be slower.
os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
import torchvision.datasets
import torchvision.datasets.utils

# It fills the tables that configs are checked against.
import experiment as experiment
from base.config import imports
from data_loader import data_loaders
from tiny_runs import few_digits

# With the first backward pass torch decides whether autograd needs threads of its own, with which
# a forked process cannot compute gradients. While torch.compile traces, it would decide that it
# does, although there is no GPU.
torch.ones(1, requires_grad=True).sum().backward()

# If the tests run in the background or with nohup, signals are ignored, and processes inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
for name in ("SIGTERM", "SIGHUP", "SIGQUIT"):
    if hasattr(signal, name):
        signal.signal(getattr(signal, name), signal.SIG_DFL)

CIFAR10_NAMES = [
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
]


LONG = (
    "tests/test_distributed.py",
    "tests/promises/test_13_comet.py",
    "tests/promises/test_01_resume.py",
    "tests/experiment/test_experiment.py",
    "tests/test_attack_scripts.py",
    "tests/evaluation/test_reliability.py",
    "tests/soak/test_soak.py",
    "tests/test_run_ablations.py",
    "tests/benchmarks/test_comparisons.py",
    "tests/examples/test_examples.py",
    "tests/promises/test_07_secrets.py",
    "tests/promises/test_14_configs.py",
    "tests/test_train.py",
    "tests/test_devices.py",
    "tests/models/test_networks.py",
    "tests/base/test_draws_ahead.py",
    "tests/promises/test_02_atomic_saves.py",
    "tests/promises/test_13_surroundings.py",
)
"""Files of 20 seconds and more. They come first, so that no process ends the suite alone."""


def pytest_configure(config):
    # pytest-xdist would begin with the files of many tests, which are not the long ones.
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    places = {file: place for place, file in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(LONG)))


@pytest.fixture(autouse=True)
def ctrl_c_ends_the_tests():
    """Restore the handler of Ctrl-C, which `run_script` replaces when a command has ended."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture(scope="module")
def only_few_digits():
    """Let the digits be few and small, for runs whose images do not matter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_loaders, "read_digits", few_digits)
        yield


@pytest.fixture
def own_code(monkeypatch):
    """Forget the user's own code that a test imports, after the test."""
    tables = {name: dict(table) for name, table in imports.tables().items()}
    modules = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(imports, "_imported", {})
    monkeypatch.setattr(imports, "_owners", {})
    yield
    for name, table in imports.tables().items():
        table.clear()
        table.update(tables[name])
    for name in set(sys.modules) - modules:
        if getattr(sys.modules[name], "OWN", False):
            del sys.modules[name]


def _cifar_entry(n: int, num_classes: int, label_key: str, seed: int) -> dict:
    data = np.random.default_rng(seed).integers(0, 256, (n, 3072), dtype=np.uint8)
    return {"data": data, label_key: [i % num_classes for i in range(n)]}


@pytest.fixture
def fake_cifar(tmp_path, monkeypatch):
    """Write archives with the layout of CIFAR-10 (100 + 10 images) and CIFAR-100 (200 + 100), and
    let torchvision accept their md5 sums."""

    def publish(source: type, files: dict[str, dict], meta: dict) -> None:
        base = tmp_path / "build" / source.base_folder
        base.mkdir(parents=True)
        md5 = {}
        for name, entry in {**files, source.meta["filename"]: meta}.items():
            (base / name).write_bytes(pickle.dumps(entry, protocol=2))
            md5[name] = hashlib.md5((base / name).read_bytes()).hexdigest()  # noqa: S324
        archive = tmp_path / "data" / source.filename
        archive.parent.mkdir(exist_ok=True)
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(base, source.base_folder)
        monkeypatch.setattr(source, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())  # noqa: S324
        monkeypatch.setattr(
            source, "train_list", [[name, md5[name]] for name, _ in source.train_list]
        )
        monkeypatch.setattr(
            source, "test_list", [[name, md5[name]] for name, _ in source.test_list]
        )
        monkeypatch.setattr(source, "meta", {**source.meta, "md5": md5[source.meta["filename"]]})

    batches = {f"data_batch_{i}": _cifar_entry(20, 10, "labels", i) for i in range(1, 6)}
    batches["test_batch"] = _cifar_entry(10, 10, "labels", 6)
    publish(torchvision.datasets.CIFAR10, batches, {"label_names": CIFAR10_NAMES})
    from data_loader.label_noise import CIFAR100_FLIPS

    parts = {
        "train": _cifar_entry(200, 100, "fine_labels", 7),
        "test": _cifar_entry(100, 100, "fine_labels", 8),
    }
    publish(torchvision.datasets.CIFAR100, parts, {"fine_label_names": sorted(CIFAR100_FLIPS)})
    return tmp_path / "data"


@pytest.fixture
def no_network(monkeypatch):
    """Let every download of torchvision fail."""

    def refuse(*_, **__):
        raise urllib.error.URLError("network is unreachable")

    monkeypatch.setattr(torchvision.datasets.utils, "_urlretrieve", refuse)
    monkeypatch.setattr(torchvision.datasets.utils, "_get_redirect_url", lambda url, max_hops: url)
