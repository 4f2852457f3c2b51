"""The plain reference computes the numbers recorded from the original's code, and the same as the
fast layer.
"""

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from benchmarks.original_conv_norm import OriginalConvNorm, use_original_conv_norm
from models import build_model
from models.layers import ConvNorm2d
from tiny_runs import read_arrays

GOLDEN = Path(__file__).parents[1] / "golden"
GOLDEN_CASES = json.loads((GOLDEN / "conv_norm_layer.json").read_text())
LAYERS = [
    (ConvNorm2d(3, 8, 3, 1, 1), (12, 12)),
    (ConvNorm2d(4, 6, 3, 2, 1), (9, 11)),
    (ConvNorm2d(5, 4, 1, 2, 0), (8, 8)),
    (ConvNorm2d(4, 3, 5, 1, 0, bias=True), (10, 7)),
]


@pytest.mark.parametrize("case", range(len(GOLDEN_CASES)))
def test_gives_the_numbers_of_the_original(case):
    golden = read_arrays(GOLDEN / "conv_norm_layer.npz")
    layer = ConvNorm2d(
        **{key: value for key, value in GOLDEN_CASES[case].items() if key not in ("size", "batch")}
    )
    init = f"case{case}/init/"
    layer.load_state_dict(
        {k.removeprefix(init): torch.from_numpy(golden[k]) for k in golden if k.startswith(init)}
    )
    plain = OriginalConvNorm(layer)

    def assert_close(actual, name):
        expected = torch.from_numpy(golden[f"case{case}/{name}"])
        assert actual.shape == expected.shape
        assert (actual.detach() - expected).abs().max() <= 1e-4 * expected.abs().max(), name

    for step in ("step0", "step1", "step2"):
        inputs = torch.from_numpy(golden[f"case{case}/{step}/input"]).requires_grad_()
        plain.zero_grad()
        output = plain(inputs)
        output.backward(torch.from_numpy(golden[f"case{case}/{step}/grad_output"]))
        assert_close(output, f"{step}/output")
        assert_close(inputs.grad, f"{step}/grad_input")
        assert_close(plain.weight.grad, f"{step}/grad_weight")
        assert_close(plain.running_V, f"{step}/running_V")
        with torch.no_grad():
            plain.weight.copy_(torch.from_numpy(golden[f"case{case}/{step}/weight_after"]))
    assert_close(plain.eval()(torch.from_numpy(golden[f"case{case}/eval/input"])), "eval/output")


@pytest.mark.parametrize(
    ("layer", "size"), LAYERS, ids=lambda value: str(getattr(value, "kernel_size", value))
)
def test_agrees_with_the_fast_layer_to_rounding(layer, size):
    torch.manual_seed(0)
    fast = deepcopy(layer).double()
    plain = OriginalConvNorm(deepcopy(fast))
    for _ in range(3):
        images = torch.randn(2, fast.in_channels, *size, dtype=torch.float64)
        results = [_outputs_and_gradients(each, images) for each in (fast, plain)]
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        with torch.no_grad():
            fast.weight.mul_(1.1)
            plain.weight.mul_(1.1)
    torch.testing.assert_close(
        fast.running_V, plain.running_V, rtol=1e-5, atol=0, check_dtype=False
    )
    torch.testing.assert_close(fast.eval()(images), plain.eval()(images), rtol=1e-5, atol=1e-5)


def _outputs_and_gradients(layer, images):
    inputs = images.clone().requires_grad_()
    output = layer(inputs)
    parameters = dict(layer.named_parameters())
    upstream = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
    gradients = torch.autograd.grad(
        output, [inputs, *(parameters[name] for name in sorted(parameters))], upstream
    )
    return [output, *gradients]


def test_a_network_is_swapped_on_the_same_parameters():
    torch.manual_seed(0)
    fast = build_model(
        {"type": "resnet18", "args": {"conv_layer_type": "prec_conv", "norm_layer_type": "no"}}
    ).double()
    plain = use_original_conv_norm(deepcopy(fast))
    layers = [module for module in plain.modules() if isinstance(module, OriginalConvNorm)]
    assert len(layers) == sum(isinstance(module, ConvNorm2d) for module in fast.modules()) == 20
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    results = []
    for model in (fast, plain):
        model.zero_grad()
        logits = model(images)
        logits.square().sum().backward()
        results.append([logits, model.conv1.weight.grad])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() <= 1e-7 * theirs.abs().max()
    kept = {id(parameter) for parameter in plain.parameters()}
    use_original_conv_norm(plain)
    assert {id(parameter) for parameter in plain.parameters()} == kept
