"""Initial weights: He's law, residual branches that begin at zero and still learn."""

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
            # the mean square of n normal numbers lies within 5 of its standard deviations, sqrt(2 / n)
            assert weights.square().mean().item() / variance == pytest.approx(1, abs=5 * (2 / len(weights)) ** 0.5), name
    assert not model.fc.bias.any()
    assert torch.equal(model.bn1.weight, torch.ones(128))


def test_he_leaves_layers_alone_that_normalise_their_kernels():
    for conv in ("prec_conv", "oni_conv", "own_conv", "sn_conv"):
        default, he = (build(WIDE, conv_layer_type=conv, init=init).state_dict() for init in ("default", "he"))
        changed = {key for key in default if not torch.equal(default[key], he[key])}
        assert changed <= {"fc.bias"}, conv


@pytest.mark.parametrize(
    "arch", [WIDE, {"type": "preact_resnet18", "args": {}}, *({"type": f"resnet{n}", "args": {}} for n in (18, 50))]
)
def test_blocks_begin_as_their_shortcuts_and_learn(arch):
    model = build(arch, zero_init_residual=True).eval()
    ends, seen = [], []
    for block in model.modules():
        if hasattr(block, "branch_end"):
            ends.append(getattr(block, block.branch_end))
            ends[-1].register_forward_hook(lambda layer, inputs, output: seen.append(float(output.detach().abs().max())))
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
        ({"type": "preact_resnet18", "args": {"conv_layer_type": "prec_conv"}}, "whose weight cannot begin at zero"),
    ],
)
def test_networks_without_such_a_layer_are_refused(arch, end):
    with pytest.raises(ConfigError, match=f"^arch.args.zero_init_residual: .*{end}$"):
        build(arch, zero_init_residual=True)
