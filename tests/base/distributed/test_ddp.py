"""The buffers of a layer that processes exchange after every update."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from base import base_trainer
from base.config.same_experiment import check_same_experiment
from base.distributed.ddp import running_statistics
from base.errors import ConfigError
from base.registry import ACTIVATION_LAYERS, CONV_LAYERS, LINEAR_LAYERS, NORM_LAYERS
from tiny_runs import config_of, run

pytestmark = pytest.mark.usefixtures("only_few_digits")

KINDS = {
    "conv": (CONV_LAYERS, (4, 8, 3), (5, 4, 8, 8)),
    "norm": (NORM_LAYERS, (4,), (5, 4, 8, 8)),
    "activation": (ACTIVATION_LAYERS, (4,), (5, 4, 8, 8)),
    "linear": (LINEAR_LAYERS, (4, 8), (5, 4)),
}


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, (table, _, _) in KINDS.items() for name in table]
)
def test_buffers_that_are_not_exchanged_do_not_depend_on_the_images(kind, name):
    table, arguments, shape = KINDS[kind]
    torch.manual_seed(0)
    model = nn.Sequential(table[name](*arguments)).train()
    copy = deepcopy(model)
    for each in (model, copy):
        each(torch.rand(shape))
    exchanged = {id(tensor) for tensor in running_statistics(model)}
    for (name_of, ours), theirs in zip(model.named_buffers(), copy.buffers(), strict=True):
        if id(ours) not in exchanged:
            assert torch.equal(ours, theirs), name_of


class OwnNorm(nn.Module):
    """Follows the mean of its images, and holds constants."""

    def __init__(self):
        super().__init__()
        self.register_buffer("followed", torch.zeros(4))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("constant", torch.ones(4), persistent=False)


def test_statistics_of_an_own_layer_are_exchanged_as_those_of_batch_normalization():
    model = nn.Sequential(OwnNorm(), nn.BatchNorm2d(4), CONV_LAYERS["prec_conv"](4, 4, 3))
    names = {id(tensor): name for name, tensor in model.named_buffers()}
    assert [names[id(tensor)] for tensor in running_statistics(model)] == [
        "0.followed",
        "1.running_mean",
        "1.running_var",
        "2.batch_norm.running_mean",
        "2.batch_norm.running_var",
    ]


def test_training_compresses_gradients_as_the_config_asks(monkeypatch):
    asked = []
    monkeypatch.setattr(
        base_trainer, "wrap_ddp", lambda model, compression: asked.append(compression) or model
    )
    for compression in ("bf16", None):
        system = {"device": "cpu", "gradient_compression": compression}
        run(None, config_of(trainer={"epochs": 1}, system=system))
    assert asked == ["bf16", None]


def test_a_run_goes_on_with_the_compression_it_began_with():
    before = config_of(system={"gradient_compression": "bf16"})
    check_same_experiment(before.dump(), before, "model_last.pth")
    with pytest.raises(ConfigError, match=r"system\.gradient_compression.*another experiment"):
        check_same_experiment(before.dump(), config_of(), "model_last.pth")
