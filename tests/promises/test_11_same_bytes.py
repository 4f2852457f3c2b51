"""Promise 11: one seed gives the same bytes in `metrics.jsonl` in two separate processes, and
`deterministic: true` is enforced.
"""

import hashlib

import pytest
import torch
import torch.nn.functional as F

from base.errors import ConfigError
from base.machine import set_determinism
from experiment.experiment import Experiment
from models.simple_cnn import SimpleCNN
from tiny_runs import exit_code, forked, run

KINDS = {
    "standard": {
        "arch": {"args": {"conv_layer_type": "prec_conv", "norm_layer_type": "no"}},
        "trainer": {"sym": True, "percent": 0.3},
        "augmentation": {"mixup_alpha": 0.4, "cutout": 4},
    },
    "pgd": {
        "adversarial": {"method": "pgd", "steps": 2, "validate_every": 1},
        "pgd_attack": {"K": 2},
    },
}


def digest(folder):
    return hashlib.sha256((folder / "metrics.jsonl").read_bytes()).hexdigest()


def check_two_processes(folder, config):
    digests = set()
    for number in range(2):
        process = forked(
            lambda number=number: [torch.rand(number * 7), run(folder / str(number), config)]
        )
        assert exit_code(process) == 0
        digests.add(digest(folder / str(number)))
    assert len(digests) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_write_the_same_bytes(tmp_path, small, kind):
    check_two_processes(tmp_path, small(**KINDS[kind]))


def test_the_check_can_fail(tmp_path, small, monkeypatch):
    """Data order and augmentation use an unseeded generator."""

    def unseeded(*args):
        generator = torch.Generator()
        generator.seed()
        return generator

    monkeypatch.setattr("data_loader.image_data_loader.torch_generator", unseeded)
    with pytest.raises(AssertionError):
        check_two_processes(tmp_path, small(**KINDS["standard"]))


@pytest.fixture
def restored():
    yield
    set_determinism(False, None)


def check_deterministic(folder, small, monkeypatch, deterministic):
    """Train a network with an operation that has no deterministic algorithm."""
    forward = SimpleCNN.forward_normalized

    def with_unpooling(self, inputs):
        pooled, places = F.max_pool2d(inputs, 2, return_indices=True)
        return forward(self, F.max_unpool2d(pooled, places, 2))

    monkeypatch.setattr(SimpleCNN, "forward_normalized", with_unpooling)
    with pytest.raises(
        ConfigError, match="system.deterministic: .*max_unpool.*has no deterministic algorithm"
    ) as stopped:
        Experiment.from_config(small(system={"deterministic": deterministic})).run(str(folder))
    assert "\n" not in str(stopped.value)


def test_deterministic_stops_at_an_operation_that_is_not(tmp_path, small, monkeypatch, restored):
    check_deterministic(tmp_path, small, monkeypatch, True)


def test_the_check_of_determinism_can_fail(tmp_path, small, monkeypatch, restored):
    with pytest.raises(pytest.fail.Exception):
        check_deterministic(tmp_path, small, monkeypatch, False)


def test_a_deterministic_run_is_the_same_run_on_the_cpu(tmp_path, small, restored):
    for deterministic in (True, False):
        run(tmp_path / str(deterministic), small(system={"deterministic": deterministic}))
    assert digest(tmp_path / "True") == digest(tmp_path / "False")
