"""Group and instance normalization: values, and on a GPU dtypes and memory formats, which torch's
fake tensors know without one.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from base.registry import NORM_LAYERS

LAST = torch.channels_last


@contextmanager
def autocast_of_a_gpu() -> Iterator[None]:
    """bf16 autocast for CUDA. `torch.autocast` would switch itself off where no GPU is."""
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", before)
        torch.clear_autocast_cache()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST])
@pytest.mark.parametrize("name", ["gn", "in"])
def test_output_on_a_gpu_keeps_dtype_and_memory_format(name, memory_format, dtype):
    with FakeTensorMode(), autocast_of_a_gpu():
        with torch.device("cuda"):
            layer = NORM_LAYERS[name](64)
        images = torch.empty(4, 64, 8, 8, device="cuda", dtype=dtype)
        output = layer(images.contiguous(memory_format=memory_format))
        assert output.dtype == dtype
        assert output.is_contiguous(memory_format=memory_format)


def test_the_memory_format_and_dtype_can_be_lost():
    with FakeTensorMode(), autocast_of_a_gpu():
        images = torch.empty(4, 16, 8, 8, device="cuda", dtype=torch.bfloat16)
        output = nn.GroupNorm(4, 16, device="cuda")(images.contiguous(memory_format=LAST))
        assert output.dtype == torch.float32
        output = nn.InstanceNorm2d(16, device="cuda")(images.contiguous(memory_format=LAST))
        if output.is_contiguous(memory_format=LAST):
            pytest.skip("this torch keeps the memory format itself")


@pytest.mark.parametrize("affine", [True, False])
def test_group_norm_is_its_definition(affine):
    torch.manual_seed(0)
    layer = NORM_LAYERS["gn"](12, affine=affine, norm_groups=4)
    images = 3 + 2 * torch.randn(5, 12, 6, 7)
    if affine:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    groups = images.double().unflatten(1, (4, 3))
    mean = groups.mean(dim=(2, 3, 4), keepdim=True)
    variance = groups.var(dim=(2, 3, 4), keepdim=True, correction=0)
    expected = ((groups - mean) / (variance + layer.eps).sqrt()).flatten(1, 2)
    if affine:
        expected = expected * layer.weight.double().reshape(-1, 1, 1)
        expected = expected + layer.bias.double().reshape(-1, 1, 1)
    torch.testing.assert_close(layer(images).double(), expected, rtol=1e-5, atol=1e-5)
    low = layer(images.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), expected, rtol=0.02, atol=0.03)


@pytest.mark.parametrize("low", [True, False])
@pytest.mark.parametrize("name", ["gn", "in"])
def test_the_layers_of_torch_give_the_same_bits_on_a_cpu(name, low):
    torch.manual_seed(0)
    layer = NORM_LAYERS[name](12)
    assert isinstance(layer, nn.GroupNorm if name == "gn" else nn.InstanceNorm2d)
    for memory_format in (torch.contiguous_format, LAST):
        with torch.autocast("cpu", enabled=low):
            images = torch.randn(5, 12, 6, 7).contiguous(memory_format=memory_format)
            images = images.to(torch.bfloat16 if low else torch.float32)
            if name == "gn":
                plain = F.group_norm(images, layer.num_groups, layer.weight, layer.bias, layer.eps)
            else:
                plain = F.instance_norm(images, None, None, layer.weight, layer.bias)
            output = layer(images)
        assert output.is_contiguous(memory_format=memory_format)
        assert output.dtype == plain.dtype
        assert torch.equal(output, plain)


@pytest.mark.parametrize(
    ("channels", "asked", "groups"),
    [(64, 32, 32), (32, 32, 32), (8, 32, 8), (48, 32, 24), (7, 3, 1), (1, 32, 1)],
)
def test_groups_are_the_largest_number_up_to_the_one_asked_for_that_divides(
    channels, asked, groups
):
    assert NORM_LAYERS["gn"](channels, norm_groups=asked).num_groups == groups
