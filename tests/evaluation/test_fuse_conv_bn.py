"""Fused batch norms: the same logits and gradients, and networks that cannot be fused unchanged."""

from threading import Lock

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from evaluation.fuse_conv_bn import fuse_conv_bn
from models import build_model

SHAPE = (2, 3, 32, 32)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def trained(model):
    """Give a model other running statistics, scales and shifts than those of a new network."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight, 1.0, 0.3)
                nn.init.normal_(module.bias)
    return model.eval()


def norms(model):
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize(
    ("arch", "layers", "left"),
    [
        ("simpleCNN", {}, 0),
        ("resnet18", {}, 0),
        ("resnet18", {"conv_layer_type": "prec_conv", "norm_layer_type": "no"}, 0),
        # Those behind a sum of branches, whose output the shortcut may take, too
        ("preact_resnet18", {}, 9),
        ("simpleCNN", {"conv_layer_type": "sn_conv"}, 6),  # weights that are computed in every pass
        ("resnet18", {"norm_layer_type": "gn"}, 0),
    ],
)
def test_logits_and_gradients_are_the_models(arch, layers, left):
    model = trained(build_model({"type": arch, "args": layers}))
    before = norms(model)
    images = torch.rand(SHAPE, requires_grad=True)
    copy = fuse_conv_bn(model, images)
    assert norms(copy) == left
    assert norms(model) == before
    assert (copy is model) == (before == left)
    expected, found = model(images), copy(images)
    torch.testing.assert_close(
        found, expected, rtol=1e-4, atol=1e-5 * float(expected.detach().abs().max())
    )
    gradients = [
        torch.autograd.grad(logits.square().sum(), images)[0] for logits in (expected, found)
    ]
    torch.testing.assert_close(
        gradients[1], gradients[0], rtol=1e-3, atol=1e-4 * float(gradients[0].abs().max())
    )


def test_biases_and_norms_without_scale_are_fused_too():
    model = trained(
        nn.Sequential(nn.Conv2d(3, 4, 3, bias=True), nn.BatchNorm2d(4, affine=False), nn.Flatten())
    )
    images = torch.rand(SHAPE)
    copy = fuse_conv_bn(model, images)
    assert norms(copy) == 0
    torch.testing.assert_close(copy(images), model(images))


class Twice(nn.Module):
    """The convolution's output goes into the norm and past it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, images):
        made = self.conv(images)
        return (self.norm(made) + made).flatten(1)


class Shared(Twice):
    def forward(self, images):
        return self.norm(self.conv(images)).flatten(1) + self.norm(
            self.conv(images.flip(3))
        ).flatten(1)


class Hidden(Twice):
    """The convolution's output goes past the norm in a way that no graph shows."""

    def forward(self, images):
        made = self.conv(images)
        return (self.norm(made) + made.detach()).flatten(1)


def hooked():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    model[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    return model


def parametrised():
    convolution = parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    return nn.Sequential(convolution, nn.BatchNorm2d(4), nn.Flatten())


def not_tracking():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten()
    )


def uncopyable():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    model.lock = Lock()
    return model


def compiled():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    model.compile(backend="eager")
    return model


def compiled_in_part():
    return nn.Sequential(
        torch.compile(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), backend="eager"),
        nn.Flatten(),
    )


def without_gradient():
    class Rounded(Twice):
        def forward(self, images):
            return self.norm(self.conv(images)).flatten(1).detach()

    return Rounded()


@pytest.mark.parametrize(
    "build",
    [
        Twice,
        Shared,
        Hidden,
        hooked,
        parametrised,
        not_tracking,
        uncopyable,
        compiled,
        compiled_in_part,
        without_gradient,
    ],
    ids=lambda build: build.__name__,
)
def test_a_network_that_cannot_be_fused_is_returned(build):
    model = build()
    if build is not not_tracking:
        trained(model)
    model.eval()
    assert fuse_conv_bn(model, torch.rand(SHAPE)) is model
    assert all(parameter.requires_grad for parameter in model.parameters())
