"""The full convolution in the form that is fast on a CPU against torch's own."""

import pytest
import torch
import torch.nn.functional as F

from models.layers.conv_norm.full_convolution import FEW_CHANNELS, full_convolution

CASES = {
    # in_channels, out_channels, kernel, padding, dilation, groups
    "few channels": (3, 4, (3, 3), [2, 2], (1, 1), 1),
    "many channels": (8, 4, (3, 3), [2, 2], (1, 1), 1),
    "groups": (8, 12, (3, 3), [2, 2], (1, 1), 4),
    "few channels in groups": (4, 6, (3, 3), [2, 2], (1, 1), 2),
    "dilation": (8, 4, (3, 3), [4, 6], (2, 3), 1),
    "another kernel": (9, 5, (2, 5), [1, 4], (1, 1), 1),
    "more padding than the kernel reaches": (8, 4, (3, 3), [3, 5], (1, 1), 1),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_torch_in_value_and_gradients(name, bias):
    in_channels, out_channels, kernel, padding, dilation, groups = CASES[name]
    torch.manual_seed(0)
    images = torch.randn(2, in_channels, 7, 6, dtype=torch.float64, requires_grad=True)
    shape = (out_channels, in_channels // groups, *kernel)
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    inputs = [images, weight]
    offset = None
    if bias:
        offset = torch.randn(out_channels, dtype=torch.float64, requires_grad=True)
        inputs.append(offset)
    expected = F.conv2d(images, weight, offset, 1, padding, dilation, groups)
    output = full_convolution(images, weight, offset, padding, dilation, groups)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    seen = torch.randn_like(expected)
    for actual, right in zip(
        torch.autograd.grad(output, inputs, seen),
        torch.autograd.grad(expected, inputs, seen),
        strict=True,
    ):
        torch.testing.assert_close(actual, right, rtol=1e-12, atol=1e-12)


def test_the_cases_take_both_forms():
    channels = [case[0] for case in CASES.values()]
    assert min(channels) < FEW_CHANNELS <= max(channels)
