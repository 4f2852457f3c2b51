"""Generators, devices, precision and memory."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from base.device import choose_device, choose_precision, memory_explained
from base.errors import ConfigError
from base.seeding import derived_seed, numpy_generator, torch_generator


def test_generators_are_pure_functions_of_their_arguments():
    first, again = (torch.rand(3, generator=torch_generator(1, "order", 2)) for _ in range(2))
    assert torch.equal(first, again)
    assert numpy_generator(1, "order").random() == numpy_generator(1, "order").random()
    keys = [(0, "a"), (1, "a"), (0, "b"), (0, "a", 0), (0, "a", 1), (0, "a", 0, 1), (0, "a", 1, 0)]
    assert len({derived_seed(*key) for key in keys}) == len(keys)
    # Written down once, so that a change that would silently change every published run fails here
    assert derived_seed(0, "order", 1) == 4672741961019256271


def test_devices_and_precision():
    with pytest.raises(ConfigError, match="system.device: 'meta' is not supported"):
        choose_device("meta")
    assert choose_device("auto", n_gpu=0) == torch.device("cpu")
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="system.device: 'gpu' is not a device"):
        choose_device("gpu")
    with pytest.raises(ConfigError, match="system.device: 'cuda:99' is asked for, but"):
        choose_device("cuda:99")
    assert choose_precision("fp32", torch.device("cpu")) == "fp32"
    assert choose_precision("auto", torch.device("cpu")) in ("fp32", "bf16")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
@pytest.mark.parametrize(
    ("environment", "kept"),
    [
        ({}, True),
        ({"MALLOC_TRIM_THRESHOLD_": "0"}, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=0"}, False),
    ],
)
def test_freed_memory_is_kept(environment, kept):
    """A tensor of 64 MiB takes 16,384 pages, which the system would clear again."""
    program = """
import resource, torch
from base.allocator import keep_freed_memory
keep_freed_memory()
for _ in range(20):  # the heap grows until an aligned block fits into its free part
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))
    }
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, env={**inherited, **environment}, capture_output=True, text=True, check=True
    )
    assert (int(done.stdout) < 100) == kept


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate"
            " memory: you tried"
        ),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.\nmore"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        MemoryError(),
    ],
)
def test_a_batch_that_does_not_fit_into_memory_names_its_key(error):
    message = "data_loader.args.batch_size: batches of 7 images do not fit into memory: "
    with (
        pytest.raises(ConfigError, match=message) as caught,
        memory_explained("data_loader.args.batch_size", 7),
    ):
        raise error
    assert "\n" not in str(caught.value)


def test_a_failed_allocation_is_recognized_and_other_errors_are_not():
    with (
        pytest.raises(ConfigError, match="--batch_size: batches of 3"),
        memory_explained("--batch_size", 3),
    ):
        torch.empty(2**58, dtype=torch.uint8)
    with (
        pytest.raises(RuntimeError, match="shapes cannot be multiplied"),
        memory_explained("--batch_size", 3),
    ):
        torch.ones(2, 3) @ torch.ones(2, 3)
