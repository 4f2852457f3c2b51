"""`-d 0,1`: several devices for one command."""

import os
import sys

import pytest
import torch

import train
from base.command_line import VISIBLE, select_device, select_device_to_evaluate
from base.errors import ConfigError
from experiment import experiment as experiment_module


@pytest.fixture(autouse=True)
def _two_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-a,6,7")
    # Restored after the test, as the product sets it
    monkeypatch.setenv(VISIBLE, "")
    monkeypatch.delenv(VISIBLE)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


@pytest.mark.parametrize(
    ("words", "processes"),
    [(["-d", "3,1"], 2), (["-d", "3,1", "--set", "n_gpu=3"], 3), (["--set", "n_gpu=2"], 2)],
)
def test_training_starts_a_process_for_each(monkeypatch, words, processes):
    started = []

    def launch(config):
        started.append(config)
        raise SystemExit(0)

    monkeypatch.setattr(experiment_module, "launch", launch)
    monkeypatch.setattr(sys, "argv", ["train.py", "-c", "configs/quickstart.json", *words])
    with pytest.raises(SystemExit):
        train.main()
    assert [config.n_gpu for config in started] == [processes]
    seen = "7,GPU-a" if "-d" in words else "4,GPU-a,6,7"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen


def test_an_evaluation_has_a_process_for_each_only_under_torchrun(monkeypatch):
    with pytest.raises(
        ConfigError,
        match="^-d 0,1: a process that evaluates uses one device; .* torchrun --nproc_per_node 2$",
    ):
        select_device_to_evaluate("0,1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    select_device_to_evaluate("0,1")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,GPU-a"


@pytest.mark.parametrize(("visible", "chosen"), [("4,GPU-a,6,7", "7,GPU-a"), (None, "3,1")])
def test_a_process_that_a_process_starts_chooses_the_same_devices(visible, chosen, monkeypatch):
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    for _ in range(2):
        select_device("3,1")
        assert os.environ["CUDA_VISIBLE_DEVICES"] == chosen


def test_missing_devices(monkeypatch):
    message = "^-d 0,4: CUDA_VISIBLE_DEVICES is '4,GPU-a,6,7': expected indices below 4$"
    with pytest.raises(ConfigError, match=message):
        select_device_to_evaluate("0,4")
    monkeypatch.setenv(VISIBLE, "")
    with pytest.raises(ConfigError, match="^-d 0: CUDA_VISIBLE_DEVICES is '': expected indices"):
        select_device_to_evaluate("0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.delenv(VISIBLE)
    with pytest.raises(ConfigError, match=r"^-d 0,1,2: asks for 3 CUDA devices, of which 2 exist$"):
        select_device_to_evaluate("0,1,2")
