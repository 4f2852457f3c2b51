"""Synchronized batch normalization; in several processes it is tested by
tests/test_distributed.py."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from base.distributed.sync_batch_norm import SynchronizedBatchNorm2d, convert_sync_batchnorm
from models.layers import ConvNorm2d


@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}]
)
def test_with_one_process_it_is_batch_norm(options):
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(4, **options).double()
    ours = convert_sync_batchnorm(nn.Sequential(deepcopy(plain)))[0]
    assert type(ours) is SynchronizedBatchNorm2d
    for _ in range(2):
        images = (3 + 2 * torch.randn(5, 4, 3, 3)).double()
        inputs = [images.clone().requires_grad_() for _ in range(2)]
        outputs = [norm(part) for norm, part in zip((plain, ours), inputs, strict=True)]
        torch.testing.assert_close(*outputs)
        for output in outputs:
            (output**3).sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for (name, a), b in zip(plain.state_dict().items(), ours.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    for a, b in zip(plain.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(plain.eval()(images), ours.eval()(images))


def test_conv_norms_inner_norm_is_synchronized_and_names_stay():
    model = nn.Sequential(ConvNorm2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4))
    names = list(model.state_dict())
    convert_sync_batchnorm(model)
    assert type(model[0].batch_norm) is type(model[1]) is SynchronizedBatchNorm2d
    assert list(model.state_dict()) == names
    assert model(torch.rand(2, 3, 6, 6, dtype=torch.bfloat16).float()).dtype == torch.float32


def test_low_precision_in_low_precision_out():
    norm = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(2)))
    images = torch.randn(4, 2, 5, 5).bfloat16()
    output = norm(images).detach()
    assert output.dtype == torch.bfloat16
    assert output.float().var(unbiased=False) == pytest.approx(1, abs=0.02)
