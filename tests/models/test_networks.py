"""The networks: sizes, keys, gradients with every combination of layers, the original's training,
error messages.
"""

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from base.errors import ConfigError
from base.registry import ACTIVATION_LAYERS, CONV_LAYERS, NORM_LAYERS
from models import MODELS, build_model
from models.layers import ONIConv2d
from models.losses import LOSSES
from models.resnet import PreActBlock
from tiny_runs import read_arrays

GOLDEN = Path(__file__).parents[1] / "golden"
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def layers(conv="conv", norm="bn", act="relu", **others):
    return {
        "conv_layer_type": conv,
        "norm_layer_type": norm,
        "activation_layer_type": act,
        **others,
    }


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet18", 11_173_962),
        ("resnet34", 21_282_122),
        ("resnet50", 23_520_842),
        ("resnet101", 42_512_970),
        ("resnet152", 58_156_618),
        ("preact_resnet18", 11_172_170),
        ("wide_resnet34_10", 46_160_474),
        ("wide_resnet28_10", 36_479_194),
        ("vgg16", 14_728_266),
    ],
)
def test_parameter_counts(name, count):
    with torch.device("meta"):
        assert build_model({"type": name}).num_parameters() == count


LARGE = {"resnet101", "resnet152", "wide_resnet28_10"}
"""Networks of the same blocks as smaller ones."""


@pytest.mark.parametrize("name", sorted(set(MODELS) - LARGE - {"wide_resnet34_10"}))
def test_shapes_on_the_meta_device(name):
    with torch.device("meta"):
        for conv in ("conv_norm", "oni_conv"):
            model = build_model(
                {"type": name, "args": {"num_classes": 7, "conv_layer_type": conv}}, MEAN, STD
            )
            assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
        args = {"stem": "imagenet"} if name.startswith("resnet") else {}
        assert build_model({"type": name, "args": args})(torch.zeros(2, 3, 64, 64)).shape == (2, 10)


@pytest.mark.parametrize("name", sorted(set(MODELS) - LARGE))
def test_any_number_of_channels(name):
    channels = 5
    args = {"in_channels": channels, "conv_layer_type": "prec_conv"}
    with torch.device("meta"):
        model = build_model({"type": name, "args": args}, [0.5] * channels, [0.2] * channels)
        assert model(torch.zeros(2, channels, 32, 32)).shape == (2, 10)
        assert (
            model.mean.shape
            == build_model({"type": name, "args": args}).std.shape
            == (1, channels, 1, 1)
        )
        with pytest.raises(
            ConfigError, match=rf"args\.mean: 2 values for images of {channels} channels$"
        ):
            build_model({"type": name, "args": args}, [0.5, 0.5], [0.2] * channels)


def assert_finite_gradients(name, args, size):
    torch.manual_seed(0)
    model = build_model({"type": name, "args": args}, MEAN, STD)
    logits = model(torch.rand(2, 3, size, size))
    LOSSES["cross_entropy"](logits, torch.tensor([1, 2])).sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("name", ["simpleCNN", "simpleCNN2"])
@pytest.mark.parametrize("conv", sorted(set(CONV_LAYERS) - {"prec_conv"}))
def test_gradients_of_small_networks_in_every_combination(name, conv):
    for norm, act in itertools.product(NORM_LAYERS, ACTIVATION_LAYERS):
        assert_finite_gradients(name, layers(conv, norm, act), 32)


@pytest.mark.parametrize(
    ("name", "size", "args"),
    [
        ("resnet18", 16, layers("conv", "gn", "srelu")),
        ("resnet18", 16, layers("conv_norm", "no", "srelu")),
        ("resnet18", 16, layers("own_conv", "bn", "relu")),
        ("resnet18", 64, layers("sn_conv", "in", "relu", stem="imagenet")),
        ("resnet50", 16, layers("conv_norm", "no", "srelu")),
        ("preact_resnet18", 16, layers("conv_norm", "no", "relu")),
        ("preact_resnet18", 16, layers("oni_conv", "gn", "srelu", norm_groups=7)),
        (
            "wide_resnet",
            8,
            layers("conv_norm", "no", "relu", depth=10, widen_factor=1, dropout=0.3),
        ),
        ("wide_resnet", 8, layers("own_conv", "in", "srelu", depth=16, widen_factor=2)),
        ("vgg11", 32, layers("conv_norm", "no", "srelu")),
        ("vgg11", 32, layers("sn_conv", "bn", "relu")),
    ],
)
def test_gradients_of_large_networks(name, size, args):
    assert_finite_gradients(name, args, size)


def test_preactivation_does_not_overwrite_the_shortcut():
    """With no norm the activation sees the block's input itself, and must not overwrite it."""
    block = PreActBlock(4, 4, 1, nn.Conv2d, NORM_LAYERS["no"], ACTIVATION_LAYERS["relu"])
    x = torch.randn(2, 4, 5, 5)
    expected = block.conv2(F.relu(block.conv1(F.relu(x)))) + x
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("shortcut_input", ["activated", "raw"])
def test_the_shortcuts_convolution_sees_the_chosen_input(shortcut_input):
    torch.manual_seed(0)
    args = {"num_classes": 7, "norm_layer_type": "gn", "shortcut_input": shortcut_input}
    model = build_model({"type": "preact_resnet18", "args": args}).eval()
    inputs = torch.randn(3, 3, 20, 20)
    out = model.conv1(inputs)
    for block in (block for stage in range(1, 5) for block in getattr(model, f"layer{stage}")):
        activated = F.relu(block.bn1(out))
        shortcut = (
            out
            if block.shortcut is None
            else block.shortcut(activated if shortcut_input == "activated" else out)
        )
        out = block.conv2(F.relu(block.bn2(block.conv1(activated)))) + shortcut
    torch.testing.assert_close(model(inputs), model.linear(F.relu(model.bn(out)).mean(dim=(2, 3))))
    default = build_model(
        {"type": "preact_resnet18", "args": {"num_classes": 7, "norm_layer_type": "gn"}}
    )
    assert default.state_dict().keys() == model.state_dict().keys()
    assert default.layer3[0].shortcut_input == "activated"


def test_a_preactivation_network_may_end_without_a_norm():
    torch.manual_seed(0)
    model = build_model(
        {"type": "preact_resnet18", "args": {"num_classes": 4, "final_norm": False}}
    ).eval()
    inputs = torch.randn(2, 3, 16, 16)
    features = model.layer4(model.layer3(model.layer2(model.layer1(model.conv1(inputs)))))
    torch.testing.assert_close(model(inputs), model.linear(features.mean(dim=(2, 3))))
    assert not [key for key in model.state_dict() if key.startswith("bn.")]


def test_onis_rule_reaches_the_layers():
    with torch.device("meta"):
        model = build_model(
            {"type": "resnet18", "args": {"conv_layer_type": "oni_conv", "oni_rule": "original"}}
        )
        assert (
            build_model({"type": "vgg11", "args": {"conv_layer_type": "oni_conv"}}).features[0].rule
            == "paper"
        )
    convolutions = [module for module in model.modules() if isinstance(module, ONIConv2d)]
    assert {layer.rule for layer in convolutions} == {"original"}
    assert sum(layer.out_channels > layer.weight[0].numel() for layer in convolutions) == 4


def test_models_normalize_pixels_themselves():
    torch.manual_seed(0)
    model = build_model({"type": "simpleCNN"}, MEAN, STD).eval()
    plain = build_model({"type": "simpleCNN"}).eval()
    plain.load_state_dict(model.state_dict())  # mean and std are not in it
    pixels = torch.rand(2, 3, 32, 32)
    normalized = torch.stack([(pixels[:, c] - MEAN[c]) / STD[c] for c in range(3)], 1)
    torch.testing.assert_close(model(pixels), plain(normalized))


def test_norm_layers():
    for norm_groups, groups in ((32, 6), (4, 3), (1, 1)):
        assert NORM_LAYERS["gn"](6, norm_groups=norm_groups).num_groups == groups
    for name in ("bn", "gn", "in"):
        assert len(list(NORM_LAYERS[name](6).parameters())) == 2
        assert len(list(NORM_LAYERS[name](6, affine=False).parameters())) == 0
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(NORM_LAYERS["no"](3, affine=True)(x), x)
    torch.testing.assert_close(
        NORM_LAYERS["in"](3)(x),
        (x - x.mean((2, 3), True)) / (x.var((2, 3), False, keepdim=True) + 1e-5).sqrt(),
    )


def test_srelu_is_a_maximum_with_a_learned_threshold():
    layer = ACTIVATION_LAYERS["srelu"](3, inplace=True)
    assert torch.equal(layer.srelu_bias, torch.full((1, 3, 1, 1), -1.0))
    nn.init.normal_(layer.srelu_bias)
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(layer(x), torch.maximum(x, layer.srelu_bias))
    layer = layer.double()
    assert torch.autograd.gradcheck(
        lambda x, b: torch.func.functional_call(layer, {"srelu_bias": b}, (x,)),
        (x.double().requires_grad_(), layer.srelu_bias),
    )


def conv_norm_keys(name):
    tail = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return {
        f"{name}.{key}"
        for key in ("weight", "running_V", "num_batches_tracked", "bpconv.weight", "bpconv.bias")
    } | {f"{name}.batch_norm.{key}" for key in tail}


def test_resnet_has_the_originals_keys():
    with torch.device("meta"):
        keys = set(
            build_model(
                {"type": "resnet18", "args": layers("prec_conv", "no", "srelu")}
            ).state_dict()
        )
        basic = set(build_model({"type": "resnet18"}).state_dict())
        bottleneck = set(build_model({"type": "resnet50"}).state_dict())
    blocks = [f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2)]
    convs = [
        "conv1",
        *(f"{block}.conv{i}" for block in blocks for i in (1, 2)),
        *(f"layer{stage}.0.shortcut.0" for stage in (2, 3, 4)),
    ]
    expected = {key for conv in convs for key in conv_norm_keys(conv)} | {
        "linear.weight",
        "linear.bias",
    }
    expected |= {
        f"{block}.srelu_bias" for block in ("relu", *(f"{block}.relu" for block in blocks))
    }
    assert keys == expected
    assert {
        "norm1.running_mean",
        "layer1.0.norm2.weight",
        "layer2.0.shortcut.1.bias",
        "layer4.1.conv2.weight",
    } <= basic
    assert {
        "layer1.0.shortcut.0.weight",
        "layer3.5.norm3.running_var",
        "layer4.2.conv3.weight",
    } <= bottleneck


def test_other_models_have_the_originals_keys():
    with torch.device("meta"):
        vgg = build_model({"type": "vgg11"}).state_dict()
        small = build_model({"type": "simpleCNN2"}).state_dict()
        wide = build_model({"type": "wide_resnet34_10"}).state_dict()
        preact = build_model({"type": "preact_resnet18"}).state_dict()
    convs = [key.split(".")[1] for key, value in vgg.items() if value.dim() == 4]
    assert convs == ["0", "6", "12", "16", "22", "26", "32", "36"]
    assert {"features.0.bias", "features.1.running_mean", "classifier.weight"} <= set(vgg)
    assert {key.split(".")[0] for key in small} == {
        f"{kind}{i}" for kind in ("conv", "norm") for i in range(1, 5)
    } | {"fc"}
    assert small["conv1.weight"].shape == (6, 3, 5, 5)
    assert "conv1.bias" not in small
    assert {
        "block1.layer.0.convShortcut.weight",
        "block3.layer.4.bn2.running_var",
        "bn1.weight",
        "fc.bias",
    } <= set(wide)
    assert {
        "conv1.weight",
        "layer1.0.bn1.weight",
        "layer2.0.shortcut.0.weight",
        "bn.running_mean",
        "linear.bias",
    } <= set(preact)


@pytest.mark.parametrize(("conv", "norm"), [("conv", "bn"), ("prec_conv", "no"), ("sn_conv", "bn")])
def test_training_follows_the_original(conv, norm):
    golden = read_arrays(GOLDEN / f"trajectory_standard_{conv}_{norm}.npz")
    model = build_model({"type": "simpleCNN", "args": layers(conv, norm)}, MEAN, STD)
    model.load_state_dict(
        {k[5:]: torch.from_numpy(golden[k]) for k in golden if k.startswith("init/")}
    )
    images = torch.from_numpy(golden["images_uint8"]).permute(0, 3, 1, 2) / 255
    labels = torch.from_numpy(golden["labels"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    for step, expected in enumerate(golden["losses"]):
        batch = slice(32 * step, 32 * step + 32)
        optimizer.zero_grad()
        loss = LOSSES["cross_entropy"](model(images[batch]), labels[batch]).mean()
        loss.backward()
        optimizer.step()
        assert loss.item() == pytest.approx(expected, rel=1e-2)
    expected = torch.from_numpy(golden["eval_logits"])
    assert (model.eval()(images) - expected).abs().max() < 1e-2 * expected.abs().max()


def test_loads_an_original_checkpoint():
    checkpoint = torch.load(
        GOLDEN / "original_checkpoint_prec_conv" / "model_best.pth", weights_only=True
    )
    model = build_model({"type": "simpleCNN", "args": layers("prec_conv", "no")})
    model.load_state_dict(checkpoint["state_dict"])  # strict
    for key, value in checkpoint["state_dict"].items():
        assert torch.equal(model.state_dict()[key], value)
    assert model.features[0].num_batches_tracked == 0


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        (
            {"type": "resnet19"},
            r"arch\.type: 'resnet19' is not one of: resnet18, .*did you mean 'resnet18'",
        ),
        ({"args": {}}, r"arch\.type: None is not one of"),
        (
            {"type": "resnet18", "args": {"depth": 3}},
            r"arch\.args\.depth: resnet18 takes no such argument; it takes: num_classes, stem, ",
        ),
        (
            {"type": "wide_resnet34_10", "args": {"depth": 34}},
            r"arch\.args\.depth: wide_resnet34_10 takes no such argument",
        ),
        (
            {"type": "vgg16", "args": {"norm_layer": "bn"}},
            r"arch\.args\.norm_layer: vgg16 .*linear_layer_type, .*in_channels, .*;"
            r" did you mean 'norm_layer_type'\?$",
        ),
        (
            {"type": "vgg16", "args": {"mean": [0]}},
            r"arch\.args\.mean: vgg16 takes no such argument",
        ),
        (
            {"type": "resnet18", "args": {"conv_layer_type": "convnorm"}},
            r"arch\.args\.conv_layer_type: 'convnorm' .*mean 'conv_norm'",
        ),
        (
            {"type": "resnet18", "args": {"stem": "image-net"}},
            r"arch\.args\.stem: 'image-net' is not one of: cifar, imagenet",
        ),
        (
            {"type": "preact_resnet18", "args": {"shortcut_input": "active"}},
            r"arch\.args\.shortcut_input: 'active' is not one of: activated, raw",
        ),
        ({"type": "wide_resnet", "args": {"depth": 30}}, r"arch\.args\.depth: 30 is not 6 n \+ 4"),
        (
            {"type": "wide_resnet", "args": {"dropout": 1}},
            r"arch\.args\.dropout: 1 is not in \[0, 1\)",
        ),
    ],
)
def test_errors_name_the_key_and_the_choices(arch, message):
    with pytest.raises(ConfigError, match=message), torch.device("meta"):
        build_model(arch)


def test_none_means_not_given():
    model = build_model(
        {"type": "simpleCNN", "args": {"num_classes": 3, "stem": None, "norm_layer_type": None}}
    )
    assert model(torch.rand(2, 3, 48, 40)).shape == (2, 3)
