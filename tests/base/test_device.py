"""Generators, devices, precision and memory."""

import logging
import os
import platform
import re
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch._dynamo
from fake_device import fake_device

from base import device
from base.device import (
    autocast,
    choose_device,
    choose_precision,
    explain_device,
    full_precision,
    kernels_explained,
    memory_explained,
    nvidia_driver,
    precision_warning,
    set_determinism,
    set_full_precision,
    tf32,
)
from base.errors import ConfigError
from base.run_folder.environment import environment
from base.seeding import derived_seed, numpy_generator, torch_generator
from experiment.description import log_device
from models.simple_cnn import SimpleCNN
from tiny_runs import config_of, run

pytestmark = pytest.mark.usefixtures("only_few_digits")


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
    """64 MiB take 16,384 pages, which the system would clear again."""
    program = """
import resource
from base.allocator import keep_freed_memory
keep_freed_memory()
# As torch does for a tensor, Python asks the C library for so large a block
one = b"1"
for _ in range(3):  # the heap grows until a block fits into its free part
    one * 2**26
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
one * 2**26
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


CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


def test_tf32_is_on_inside_its_context_only():
    operations = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    set_full_precision()
    for _ in range(2):
        assert [operation.fp32_precision for operation in operations] == ["ieee", "ieee"]
        with autocast(CUDA, "tf32"):
            assert [operation.fp32_precision for operation in operations] == ["tf32", "tf32"]
            # torch raises an error where the older flags disagree
            assert torch.backends.cudnn.allow_tf32
        assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(
    "context",
    [full_precision, partial(autocast, CPU, "fp32"), partial(autocast, CPU, "tf32")],
    ids=["full precision", "fp32", "tf32"],
)
def test_autocast_of_a_caller_ends_where_a_precision_is_chosen(context):
    numbers = torch.rand(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        with context():
            assert (numbers @ numbers).dtype == torch.float32
            with autocast(CPU, "bf16"):
                assert (numbers @ numbers).dtype == torch.bfloat16
        assert (numbers @ numbers).dtype == torch.bfloat16


@pytest.mark.parametrize("asked", ["high", "medium"])
def test_float32_is_float32_whatever_was_asked_before(asked):
    torch.set_float32_matmul_precision(asked)
    set_full_precision()
    for operation in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        assert operation.fp32_precision == "ieee"
    # torch raises an error if older and newer settings disagree
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("context", [tf32, full_precision])
@pytest.mark.parametrize("asked", ["highest", "high", "medium"])
def test_a_context_gives_float32_its_precision_back(context, asked):
    operations = (
        torch.backends.cuda.matmul,
        torch.backends.cudnn.conv,
        torch.backends.cudnn.rnn,
        torch.backends.mkldnn.matmul,
    )
    set_full_precision()
    torch.set_float32_matmul_precision(asked)
    torch.backends.cudnn.rnn.fp32_precision = "tf32"
    before = [operation.fp32_precision for operation in operations]
    with context():
        inside = {operation.fp32_precision for operation in operations[:3]}
    assert inside == {"tf32" if context is tf32 else "ieee"}
    assert [operation.fp32_precision for operation in operations] == before
    assert torch.get_float32_matmul_precision() == asked
    set_full_precision()


def test_training_in_tf32_includes_the_backward_pass(monkeypatch, tmp_path):
    seen = []

    def backward(self, *arguments, **options):
        # Arguments of the optimizer are tried on the CPU before
        if self.is_cuda:
            seen.append(torch.backends.cuda.matmul.fp32_precision)
        return plain(self, *arguments, **options)

    plain = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    with fake_device(monkeypatch):
        config = config_of(
            system={"device": "cuda", "precision": "tf32"},
            trainer={"epochs": 1},
            adversarial={"method": "fgsm", "report_images": 8},
        )
        run(tmp_path / "run", config)
    assert set(seen) == {"tf32"}
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"


@pytest.mark.parametrize(
    ("capability", "precision", "chosen", "warning"),
    [
        ((9, 0), "tf32", "tf32", None),
        ((9, 0), "bf16", "bf16", None),
        ((9, 0), "auto", "bf16", None),
        ((7, 5), "tf32", "fp32", "^system.precision: cuda:0 has no TF32: it computes in fp32$"),
        ((7, 5), "bf16", "bf16", "^system.precision: cuda:0 has no hardware for bf16 and emulates"),
        ((7, 5), "auto", "fp32", None),
        (None, "tf32", "fp32", "^system.precision: cpu has no TF32: it computes in fp32$"),
        (None, "bf16", "bf16", "^system.precision: cpu has no hardware for bf16 and emulates it"),
    ],
)
def test_a_precision_that_the_hardware_lacks_warns(
    capability, precision, chosen, warning, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    place = CUDA if capability else CPU
    assert choose_precision(precision, place) == chosen
    found = precision_warning(precision, place)
    assert found == warning if warning is None else re.search(warning, found)


def without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    return "torch is built without CUDA"


def with_hidden_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return "CUDA_VISIBLE_DEVICES hides every CUDA device"


def with_an_old_driver(monkeypatch):
    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040). See")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "init", init)
    return "The NVIDIA driver on your system is too old (found version 11040)"


def with_two_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    return "the last CUDA device is cuda:1"


@pytest.mark.parametrize(
    "machine", [without_cuda, with_hidden_devices, with_an_old_driver, with_two_devices]
)
def test_a_device_that_cannot_be_used_says_why(machine, monkeypatch):
    reason = machine(monkeypatch)
    with pytest.raises(ConfigError) as raised:
        choose_device("cuda:2")
    assert str(raised.value) == f"system.device: 'cuda:2' cannot be used: {reason}"


def test_a_machine_without_mps_says_so(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="^system.device: 'mps' cannot be used: torch finds no"):
        choose_device("mps")


@pytest.mark.parametrize("machine", [without_cuda, with_hidden_devices, with_an_old_driver])
@pytest.mark.parametrize("has_driver", [False, True])
def test_auto_says_why_it_takes_the_cpu(machine, has_driver, monkeypatch, tmp_path, caplog):
    reason = machine(monkeypatch)
    file = tmp_path / "version"
    if has_driver:
        file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.82.07  Wed Aug 27\n")
    monkeypatch.setattr(device, "DRIVER", file)
    assert explain_device(CPU) == (reason, has_driver)
    assert nvidia_driver() == ("580.82.07" if has_driver else None)
    assert explain_device(CPU, n_gpu=0) == ("n_gpu is 0", False)
    assert explain_device(CUDA) is None
    with caplog.at_level(logging.INFO):
        log_device(config_of(), CPU)
        log_device(config_of(system={"device": "cpu"}), CPU)
    (record,) = caplog.records
    assert record.getMessage() == f"system.device: auto takes the CPU: {reason}"
    assert record.levelno == (logging.WARNING if has_driver else logging.INFO)


def test_the_environment_names_driver_cuda_and_card(monkeypatch):
    with fake_device(monkeypatch):
        found = environment()
    assert found["gpus"] == [{"name": "fake", "compute_capability": "9.0", "memory_gib": 8.0}]
    assert found["cuda"].keys() == {"driver", "version", "cudnn", "nccl", "unavailable"}
    assert found["cuda"]["unavailable"] is None


def test_cards_with_a_driver_that_does_not_work_are_not_described(monkeypatch):
    reason = with_an_old_driver(monkeypatch)
    # NVML counts them without the driver of CUDA.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = environment()
    assert found["gpus"] == []
    assert found["cuda"]["unavailable"] == reason


def test_determinism_fills_no_new_tensors():
    set_determinism(True, None)
    try:
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        set_determinism(False, None)
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_a_card_that_torch_is_not_built_for_is_named(monkeypatch):
    message = (
        "^system.device: cuda:0 is a fake of compute capability 9.0, and torch .* is built for"
        " sm_90 only: install another build of torch, or take the CPU with system.device=cpu$"
    )
    with (
        fake_device(monkeypatch),
        pytest.raises(ConfigError, match=message),
        kernels_explained(CUDA),
    ):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate"
            " memory: you tried"
        ),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.\nmore"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        MemoryError(),
    ],
)
def test_a_batch_that_does_not_fit_into_memory_names_its_key(error):
    message = (
        "^data_loader.args.batch_size: batches of 7 images do not fit into the memory of cpu: "
    )
    with (
        pytest.raises(ConfigError, match=message) as caught,
        memory_explained("data_loader.args.batch_size", 7, CPU),
    ):
        raise error
    assert "\n" not in str(caught.value)


def test_a_training_step_without_memory_names_the_free_memory(monkeypatch, tmp_path):
    def forward(self, images):
        if self.training and len(images) == 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.\nmore")
        return plain(self, images)

    plain = SimpleCNN.forward
    monkeypatch.setattr(SimpleCNN, "forward", forward)
    message = (
        r"^data_loader.args.batch_size: batches of 8 images do not fit into the memory of cuda:0"
        r" \(1.0 of 8.0 GiB are free\): CUDA out of memory"
    )
    with fake_device(monkeypatch), pytest.raises(ConfigError, match=message):
        run(tmp_path / "run", config_of(system={"device": "cuda"}))


def test_a_failed_allocation_is_recognized_and_other_errors_are_not():
    with (
        pytest.raises(ConfigError, match="--batch_size: batches of 3"),
        memory_explained("--batch_size", 3, CPU),
    ):
        torch.empty(2**58, dtype=torch.uint8)
    with (
        pytest.raises(RuntimeError, match="shapes cannot be multiplied"),
        memory_explained("--batch_size", 3, CPU),
    ):
        torch.ones(2, 3) @ torch.ones(2, 3)
