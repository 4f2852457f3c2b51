"""Initial weights: He's distribution, residual branches that begin at zero and still learn."""

import pytest
import torch
from torch import nn

from base.errors import ConfigError
from models import build_model

WIDE = {"type": "wide_resnet", "args": {"depth": 10, "widen_factor": 2, "norm_layer_type": "gn"}}


def build(arch, **args):
    torch.manual_seed(0)
    return build_model({"type": arch["type"], "args": {**arch["args"], **args}})


def test_he_gives_plain_convolutions_the_variance_two_by_fan_out():
    model = build(WIDE, init="he")
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            weights = layer.weight.flatten().double()
            variance = 2 / (layer.out_channels * layer.kernel_size[0] * layer.kernel_size[1])
            # The mean square of n normal numbers has a standard deviation of sqrt(2 / n) times the
            # variance; 5 of them are allowed.
            assert weights.square().mean().item() / variance == pytest.approx(
                1, abs=5 * (2 / len(weights)) ** 0.5
            ), name
    assert not model.fc.bias.any()
    assert torch.equal(model.bn1.weight, torch.ones(128))


def test_he_does_not_change_layers_that_normalize_their_kernels():
    for conv in ("prec_conv", "oni_conv", "own_conv", "sn_conv"):
        default, he = (
            build(WIDE, conv_layer_type=conv, init=init).state_dict() for init in ("default", "he")
        )
        changed = {key for key in default if not torch.equal(default[key], he[key])}
        assert changed <= {"fc.bias"}, conv


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_only_group_norms_that_end_a_branch_begin_at_zero(name):
    for norm in ("gn", "bn", "in"):
        model = build(
            {"type": name, "args": {"norm_layer_type": norm, "num_classes": 7}}, init="he_zero_gn"
        )
        ends = {id(getattr(m, m.branch_end)) for m in model.modules() if hasattr(m, "branch_end")}
        for key, layer in model.named_modules():
            if isinstance(layer, nn.BatchNorm2d | nn.GroupNorm) and layer.weight is not None:
                expected = 0.0 if norm == "gn" and id(layer) in ends else 1.0
                assert set(layer.weight.tolist()) == {expected}, f"{norm}: {key}"
        weights = model.layer2[0].conv2.weight
        variance = 2 / (weights.shape[0] * weights.shape[2] * weights.shape[3])
        assert weights.square().mean().item() / variance == pytest.approx(
            1, abs=5 * (2 / weights.numel()) ** 0.5
        )
        assert model.linear.bias.any(), "linear layers keep PyTorch's initial weights"


def test_branches_that_end_in_a_convolution_keep_their_norms():
    model = build(WIDE, init="he_zero_gn")
    norms = [layer for layer in model.modules() if isinstance(layer, nn.GroupNorm)]
    assert len(norms) > 5
    assert all((layer.weight == 1).all() for layer in norms)


@pytest.mark.parametrize(
    "arch",
    [
        WIDE,
        {"type": "preact_resnet18", "args": {}},
        *({"type": f"resnet{n}", "args": {}} for n in (18, 50)),
    ],
)
def test_blocks_begin_as_their_shortcuts_and_learn(arch):
    model = build(arch, zero_init_residual=True).eval()
    ends, seen = [], []
    for block in model.modules():
        if hasattr(block, "branch_end"):
            ends.append(getattr(block, block.branch_end))
            ends[-1].register_forward_hook(
                lambda layer, inputs, output: seen.append(float(output.detach().abs().max()))
            )
    loss = nn.functional.cross_entropy(model(torch.rand(4, 3, 16, 16)), torch.tensor([0, 1, 2, 3]))
    loss.backward()
    assert len(ends) == len(seen) > 2
    assert max(seen) == 0
    assert all(end.weight.grad.any() for end in ends)


@pytest.mark.parametrize(
    ("arch", "end"),
    [
        ({"type": "vgg11", "args": {}}, "vgg11 has no residual blocks"),
        (
            {"type": "resnet18", "args": {"norm_layer_type": "no"}},
            "resnet18 end in Identity, whose weight cannot begin at zero",
        ),
        (
            {"type": "preact_resnet18", "args": {"conv_layer_type": "prec_conv"}},
            "whose weight cannot begin at zero",
        ),
    ],
)
def test_networks_whose_branches_cannot_be_zero_are_rejected(arch, end):
    with pytest.raises(ConfigError, match=f"^arch.args.zero_init_residual: .*{end}$"):
        build(arch, zero_init_residual=True)
