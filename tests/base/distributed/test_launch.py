"""How many processes a machine can run, and the device of each."""

import os

import pytest
import torch

from base.config import validate
from base.config.tree import merge
from base.device import choose_device
from base.distributed import launch
from base.distributed.launch import available_cpus, check_device_count
from base.errors import ConfigError

MINIMAL = {"arch": {"type": "simpleCNN"}, "data_loader": {"type": "DigitsDataLoader"}}


@pytest.mark.parametrize(("device", "visible"), [("auto", 0), ("auto", 2), ("cuda", 2)])
def test_more_processes_than_devices_are_refused(monkeypatch, device, visible):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: visible > 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    config = validate(merge(MINIMAL, {"n_gpu": 3, "system": {"device": device}}))
    with pytest.raises(
        ConfigError, match=f"n_gpu: asks for 3 processes, but {visible} CUDA devices are visible"
    ):
        check_device_count(config, 3, "n_gpu")
    on_cpu = validate(merge(MINIMAL, {"n_gpu": 3, "system": {"device": "cpu"}}))
    check_device_count(on_cpu, 3, "n_gpu")
    check_device_count(config, visible, "torchrun")


def test_one_device_is_not_enough_for_two(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = validate(merge(MINIMAL, {"n_gpu": 2, "system": {"device": "cuda:1"}}))
    with pytest.raises(
        ConfigError,
        match="system.device: cuda:1 is one device, but n_gpu asks for 2 processes .system.device",
    ):
        check_device_count(config, 2, "n_gpu")
    # torchrun may start one process on each of several machines
    check_device_count(config, 1, "torchrun")


def test_every_process_takes_its_own_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda", 1)


def test_cpus_that_this_process_may_not_use_do_not_count(monkeypatch, tmp_path):
    monkeypatch.setattr(launch, "CPU_QUOTA", tmp_path / "no quota")
    if hasattr(os, "sched_getaffinity"):
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(before)})
        try:
            assert available_cpus() == 1
        finally:
            os.sched_setaffinity(0, before)
        monkeypatch.delattr(os, "sched_getaffinity")
    # A system that cannot say which CPUs a process may use
    assert available_cpus() == os.cpu_count()


@pytest.mark.parametrize(
    ("quota", "cpus"),
    [("150000 100000", 2), ("50000 100000", 1), ("6400000 100000", 8), ("max 100000", 8), ("", 8)],
)
def test_a_containers_quota_of_cpus_counts(monkeypatch, tmp_path, quota, cpus):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(launch, "CPU_QUOTA", tmp_path / "cpu.max")
    (tmp_path / "cpu.max").write_text(quota + "\n")
    assert available_cpus() == cpus
