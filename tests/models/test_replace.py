"""replace_with_conv_norm pairs convolutions and batch norms by the flow of data, or warns that it
cannot.
"""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.layers import ConvNorm2d, replace_with_conv_norm


def pairs(network):
    """Replace the network's layers; name of each convolution -> name that its batch norm had."""
    names = {
        norm: name for name, norm in network.named_modules() if isinstance(norm, nn.BatchNorm2d)
    }
    replace_with_conv_norm(network)
    layers = {
        name: layer for name, layer in network.named_modules() if isinstance(layer, ConvNorm2d)
    }
    return {name: names[layer.batch_norm] if layer.bn else None for name, layer in layers.items()}


class Crossed(nn.Module):
    """Its layers are registered in another order than they are used, and in other modules."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(6), nn.BatchNorm2d(6), nn.BatchNorm2d(6)])
        self.last = nn.Conv2d(6, 6, 1)
        self.middle = nn.Conv2d(6, 6, (1, 3), groups=2)
        self.first = nn.Conv2d(2, 6, 3, stride=2)
        self.calls = 0

    def forward(self, x, scale=1.0, reverse=False):
        self.calls += 1
        self.seen = x
        x = self.norms[2](self.first(x))
        x = F.relu(self.norms[0](self.middle(x)))
        out = self.last(x)
        x = x.expand(out.shape)
        return x if reverse else scale * self.norms[1](out) + x


def test_the_order_of_registration_does_not_matter():
    network = Crossed()
    assert pairs(network) == {"first": "norms.2", "middle": "norms.0", "last": "norms.1"}
    assert all(type(norm) is nn.Identity for norm in network.norms)
    assert network.calls == 0
    assert not hasattr(network, "seen"), "the network itself is not traced"
    network(torch.rand(2, 2, 9, 11)).sum().backward()
    assert network.first.batch_norm.weight.grad is not None


class Unpaired(nn.Module):
    """Convolutions that no batch norm may be moved into, though one is registered behind each."""

    def __init__(self):
        super().__init__()
        self.skipped = nn.Conv2d(3, 4, 1)
        self.norm_of_skipped = nn.BatchNorm2d(4)
        self.one = nn.Conv2d(4, 4, 1)
        self.shared = nn.BatchNorm2d(4)
        self.other = nn.Conv2d(4, 4, 1)
        self.activated = nn.Conv2d(4, 4, 1)
        self.norm_of_activated = nn.BatchNorm2d(4)
        self.twice = nn.Conv2d(4, 4, 1)
        self.first_of_twice = nn.BatchNorm2d(4)
        self.second_of_twice = nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.skipped(x)
        x = x + self.norm_of_skipped(x)
        x = self.shared(self.one(x)) + self.shared(self.other(x))
        x = self.norm_of_activated(self.activated(x).relu())
        return self.second_of_twice(self.twice(self.first_of_twice(self.twice(x))))


def test_a_batch_norm_with_other_uses_is_not_moved():
    network = Unpaired()
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert set(pairs(network).values()) == {None}
    assert [module for module in network.children() if isinstance(module, nn.BatchNorm2d)] == norms


def test_a_layer_that_is_called_twice_is_paired_once():
    conv, norm = nn.Conv2d(5, 5, 3, padding=1), nn.BatchNorm2d(5)
    network = nn.Sequential(conv, norm, nn.ReLU(), conv, norm)
    assert pairs(network) == {"0": "1"}
    assert network[0] is network[3]
    assert type(network[1]) is nn.Identity


class WithHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 2, 1)
        self.norm_of_head, self.norm_of_body = nn.BatchNorm2d(2), nn.BatchNorm2d(3)

    def forward(self, x):
        x = self.norm_of_body(self.body(x))
        return self.norm_of_head(self.head(x)) if self.training else x


@pytest.mark.parametrize("wrap", [lambda network: network, nn.DataParallel, nn.Sequential])
@pytest.mark.parametrize("training", [True, False])
def test_both_modes_and_wrappers_are_traced(wrap, training):
    network = wrap(WithHead()).train(training)
    found = {conv.split(".")[-1]: norm.split(".")[-1] for conv, norm in pairs(network).items()}
    assert found == {"body": "norm_of_body", "head": "norm_of_head"}
    assert all(module.training == training for module in network.modules())


class Branching(nn.Module):
    """Its forward depends on values, so it cannot be traced; that of its block can."""

    def __init__(self):
        super().__init__()
        self.block = Crossed()
        self.outside = nn.Conv2d(6, 8, 1)
        self.norm = nn.BatchNorm2d(8)
        self.plain = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        x = self.block(x)
        return self.plain(self.norm(self.outside(x)) if x.sum() > 0 else self.outside(x))


def test_what_cannot_be_followed_is_guessed_with_a_warning():
    network = Branching()
    with pytest.warns(
        UserWarning,
        match="cannot follow the data through Branching to the batch norms behind outside: each",
    ):
        found = pairs(network)
    assert found.pop("outside") == "norm"
    assert found.pop("plain") is None
    assert found == {
        "block.first": "block.norms.2",
        "block.middle": "block.norms.0",
        "block.last": "block.norms.1",
    }


def test_a_convolution_that_is_never_called_is_not_replaced():
    class Taken(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x):
            x = F.conv2d(x, self.first.weight)
            return self.norm(self.second(x + self.second.weight.mean()))

    network = Taken()
    with pytest.warns(
        UserWarning, match=r"does not replace first: Taken reads the weight without calling"
    ) as caught:
        assert pairs(network) == {"second": "norm"}
    assert (len(caught), caught[0].filename) == (1, __file__)
    assert type(network.first) is nn.Conv2d


def test_without_a_free_batch_norm_there_is_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network = replace_with_conv_norm(nn.ModuleList([nn.Conv2d(3, 4, 1), nn.BatchNorm2d(5)]))
    assert isinstance(network[0], ConvNorm2d)
    assert type(network[1]) is nn.BatchNorm2d


def test_convolutions_with_old_weight_hooks_do_not_hide_the_others():
    with warnings.catch_warnings():
        # The hook is deprecated, but still works.
        warnings.simplefilter("ignore")
        hooked = nn.utils.weight_norm(nn.Conv2d(2, 2, 1))
    assert pairs(nn.Sequential(hooked, WithHead().eval())) == {
        "1.body": "1.norm_of_body",
        "1.head": "1.norm_of_head",
    }
