"""How torch computes in this process."""

import os
from contextlib import nullcontext
from functools import partial

import pytest
import torch

from base.machine import machine_settings, set_determinism
from base.precision import autocast
from tiny_runs import config_of


def test_determinism_fills_no_new_tensors():
    set_determinism(True, None)
    try:
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        set_determinism(False, None)
    assert torch.utils.deterministic.fill_uninitialized_memory


def settings():
    """What a caller may have set, and the next number of torch's global generator."""
    cudnn = torch.backends.cudnn
    return {
        "threads": torch.get_num_threads(),
        "mode": torch.get_deterministic_debug_mode(),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,
        "cudnn": (cudnn.deterministic, cudnn.benchmark),
        "workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        "float32": torch.get_float32_matmul_precision(),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "defaults": (torch.get_default_dtype(), torch.get_default_device()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()),
        "generator": torch.get_rng_state().tolist(),
    }


def test_machine_settings_end_with_their_context(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    system = config_of(system={"deterministic": True, "num_threads": 2}).system
    torch.set_float32_matmul_precision("medium")
    # Warnings only: a mode that the settings themselves never choose
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            before = settings()
            with machine_settings(system):
                torch.manual_seed(1)
                inside = settings()
            assert settings() == before
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("highest")
    assert [name for name in before if before[name] == inside[name]] == []
    assert (inside["threads"], inside["mode"], inside["grad"]) == (2, 2, (True, False))
    assert inside["defaults"] == (torch.float32, torch.device("cpu"))
    assert inside["autocast"] == (False, True)


@pytest.mark.parametrize(
    "callers",
    [
        partial(torch.autocast, "cpu", torch.bfloat16),
        partial(torch.autocast, "cpu", torch.bfloat16, cache_enabled=False),
    ],
    ids=["with a cache", "without"],
)
def test_two_passes_of_one_step_have_the_same_gradients_inside_a_callers_autocast(callers):
    """The cast of a weight is shared by both passes, which adds up their gradients in bfloat16."""
    torch.manual_seed(0)
    layer, numbers = torch.nn.Linear(16, 16), torch.rand(2, 8, 16)
    gradients = []
    for context in (nullcontext, callers):
        with context(), machine_settings(config_of().system):
            with autocast(torch.device("cpu"), "bf16"):
                loss = sum(layer(batch).square().mean() for batch in numbers)
            gradients.append(torch.autograd.grad(loss, layer.weight)[0])
    assert torch.equal(*gradients)
