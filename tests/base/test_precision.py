"""The precision of float32, and what the hardware has."""

import re
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from fake_device import fake_device

from base.precision import (
    autocast,
    choose_precision,
    full_precision,
    precision_warning,
    set_full_precision,
    tf32,
)
from tiny_runs import config_of, run

pytestmark = pytest.mark.usefixtures("only_few_digits")

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


def test_the_config_chooses_the_precision():
    assert choose_precision("fp32", CPU) == "fp32"
    assert choose_precision("auto", CPU) in ("fp32", "bf16")


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


@pytest.mark.parametrize("around", [nullcontext, full_precision, partial(autocast, CPU, "fp32")])
@pytest.mark.parametrize("callers", [False, True])
def test_weights_that_an_update_has_changed_are_cast_anew(callers, around):
    layer, numbers = torch.nn.Linear(3, 2, bias=False), torch.rand(4, 3)
    with torch.autocast("cpu", torch.bfloat16, enabled=callers), around():
        with autocast(CPU, "bf16"):
            before = layer(numbers)
        layer.weight.data *= 2
        with autocast(CPU, "bf16"):
            assert torch.equal(layer(numbers), 2 * before)


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
