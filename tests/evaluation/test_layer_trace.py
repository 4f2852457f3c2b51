"""The layers that a forward pass calls, and the batch norm that follows each."""

import pytest
import torch
from torch import nn

from evaluation.layer_trace import linear_calls
from models import build_model
from models.layers import ConvNorm2d


def uneven(norm):
    """Return a batch norm with statistics and weights of its own, and its largest factor."""
    torch.manual_seed(norm.num_features)
    with torch.no_grad():
        norm.running_var.uniform_(0.1, 3)
        if norm.weight is not None:
            norm.weight.uniform_(-2, 1)
    weight = [1.0] * norm.num_features if norm.weight is None else norm.weight.tolist()
    return [
        w / (v + norm.eps) ** 0.5 for w, v in zip(weight, norm.running_var.tolist(), strict=True)
    ]


def largest(factors):
    return pytest.approx(max(map(abs, factors)), rel=1e-5)


def scales(model, shape=(3, 8, 8)):
    return {call.name: call.batch_norm_scale for call in linear_calls(model, shape)}


def test_a_resnet_in_its_order_at_its_sizes():
    model = build_model({"type": "resnet18", "args": {"num_classes": 7}}).train()
    expected = {
        name: uneven(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
    }
    calls = linear_calls(model, (3, 16, 16))
    assert [call.name for call in calls[:4]] == [
        "conv1",
        "layer1.0.conv1",
        "layer1.0.conv2",
        "layer1.1.conv1",
    ]
    assert len(calls) == 21
    by_name = {call.name: call for call in calls}
    assert by_name["conv1"].input_shape == (3, 16, 16)
    assert (
        by_name["layer2.0.conv1"].input_shape
        == by_name["layer2.0.shortcut.0"].input_shape
        == (64, 16, 16)
    )
    assert by_name["layer4.1.conv2"].input_shape == (512, 2, 2)
    assert (by_name["linear"].input_shape, by_name["linear"].batch_norm_scale) == ((512,), None)
    assert by_name["conv1"].batch_norm_scale == largest(expected["norm1"])
    assert by_name["layer3.0.conv2"].batch_norm_scale == largest(expected["layer3.0.norm2"])
    assert by_name["layer3.0.shortcut.0"].batch_norm_scale == largest(
        expected["layer3.0.shortcut.1"]
    )
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_before_activations_only_the_batch_norm_that_takes_the_output_counts():
    model = build_model({"type": "preact_resnet18"})
    expected = uneven(model.layer1[0].bn2)
    found = scales(model, (3, 16, 16))
    assert found["layer1.0.conv1"] == largest(expected)
    assert found["layer1.0.conv2"] is None


def test_conv_norm_gives_two_calls_and_its_batch_norm_follows_the_second():
    conv_norm = ConvNorm2d(3, 4, 3, padding=1, stride=2)
    inner = uneven(conv_norm.batch_norm)
    calls = linear_calls(nn.Sequential(conv_norm), (3, 8, 8))
    assert [(call.name, call.input_shape, call.batch_norm_scale) for call in calls] == [
        ("0", (3, 8, 8), None),
        ("0.bpconv", (4, 4, 4), largest(inner)),
    ]
    outer = nn.BatchNorm2d(4, affine=False)
    both = [a * b for a, b in zip(inner, uneven(outer), strict=True)]
    assert scales(nn.Sequential(conv_norm, outer)) == {"0": None, "0.bpconv": largest(both)}


def test_conv_norm_without_the_depthwise_convolution_is_followed_by_its_own_batch_norm():
    conv_norm = ConvNorm2d(3, 4, 3, affine=False)
    inner = uneven(conv_norm.batch_norm)
    assert scales(nn.Sequential(conv_norm)) == {"0": largest(inner)}


def test_only_the_identity_may_stand_between_layer_and_batch_norm():
    norm = nn.BatchNorm2d(4)
    factors = uneven(norm)
    conv = nn.Conv2d(3, 4, 3)
    assert scales(nn.Sequential(conv, nn.Identity(), norm)) == {"0": largest(factors)}
    for activation in (nn.ReLU(), nn.ReLU(inplace=True)):
        assert scales(nn.Sequential(conv, activation, norm)) == {"0": None}
    assert scales(nn.Sequential(conv, nn.BatchNorm2d(4, track_running_stats=False))) == {"0": None}
    assert scales(nn.Sequential(conv, nn.GroupNorm(2, 4))) == {"0": None}


def test_a_layer_that_is_called_twice_counts_twice():
    conv = nn.Conv2d(3, 3, 3)
    calls = linear_calls(nn.Sequential(conv, conv), (3, 8, 8))
    assert [call.input_shape for call in calls] == [(3, 8, 8), (3, 6, 6)]
