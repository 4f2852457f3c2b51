"""ConvNorm2d in use: checkpoints, compilers, several processes, bf16, other people's networks."""

import copy
import warnings
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed
import torchvision
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

from models.layers import ConvNorm2d, ONIConv2d, SpectralNormConv2d, replace_with_conv_norm
from models.layers.conv_norm import layer as layer_module
from models.layers.conv_norm.recomputation import NARROW
from tiny_runs import exit_code, forked


def trained_layer(size=6):
    torch.manual_seed(0)
    layer = ConvNorm2d(2, 3, 3, padding=1)
    for _ in range(2):
        layer(torch.rand(2, 2, size, size))
    return layer


def test_a_state_dict_of_any_size_is_loaded():
    layer = trained_layer()
    assert layer.num_batches_tracked == 2
    for other in (ConvNorm2d(2, 3, 3, padding=1), trained_layer(size=9)):
        buffer = other.running_V
        other.load_state_dict(layer.state_dict())
        assert other.running_V is buffer
        assert all(
            torch.equal(a, b)
            for a, b in zip(other.state_dict().values(), layer.state_dict().values(), strict=True)
        )


def test_an_original_checkpoint_has_no_counter():
    layer = trained_layer()
    state = {
        key: value for key, value in layer.state_dict().items() if key != "num_batches_tracked"
    }
    given = dict(state)
    layer.load_state_dict(state)
    assert layer.num_batches_tracked == 0
    assert list(state) == list(given), "the caller's dictionary is not changed"
    del state["running_V"]
    with pytest.raises(RuntimeError, match=r"Missing key.*running_V"):
        layer.load_state_dict(state)


def test_deepcopy_is_independent():
    layer = trained_layer()
    twin = copy.deepcopy(layer)
    layer(torch.rand(2, 2, 9, 9))
    assert twin.running_V.shape == (3, 8, 5)
    assert twin.num_batches_tracked == 2


def test_channels_last():
    layer = trained_layer().eval()
    x = torch.rand(2, 2, 6, 6)
    torch.testing.assert_close(
        copy.deepcopy(layer).to(memory_format=torch.channels_last)(
            x.to(memory_format=torch.channels_last)
        ),
        layer(x),
    )


def test_the_fft_runs_in_float32_under_bf16_autocast():
    torch.manual_seed(0)
    layer = ConvNorm2d(2, 3, 3, padding=1, affine=False, bn=False)
    twin = copy.deepcopy(layer)
    x = torch.rand(2, 2, 8, 8)
    exact = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = twin(x)
    assert output.dtype == torch.bfloat16
    assert torch.equal(twin.running_V, layer.running_V)
    assert (output.float() - exact).abs().max() < 0.02 * exact.abs().max()


def test_compiles_as_one_graph_from_the_first_step_on():
    torch.manual_seed(0)
    network = nn.Sequential(
        ConvNorm2d(3, 4, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        ConvNorm2d(4, 2, 1, bn=False),
    )
    twin = copy.deepcopy(network)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    for step in range(3):
        if step == 2:
            network.eval()
            twin.eval()
        x = torch.rand(2, 3, 8, 8)
        output, expected = compiled(x), twin(x)
        torch.testing.assert_close(output, expected)
        output.sum().backward()
        expected.sum().backward()
    for (name, actual), wanted in zip(
        network.state_dict().items(), twin.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(actual, wanted, msg=name)
    for actual, wanted in zip(network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, wanted.grad)


def _ddp_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(
        nn.Sequential(ConvNorm2d(2, 3, 3), SpectralNormConv2d(3, 2, 3))
    )
    torch.manual_seed(rank)
    for step in range(2):
        # DistributedDataParallel starts every forward pass with rank 0's buffers, so this change
        # must be gone afterwards.
        if step == 1 and rank == 1:
            for buffer in model.buffers():
                buffer.add_(1)
        model(torch.rand(2, 2, 8, 8)).sum().backward()
    layer = model.module[0]
    torch.save(
        {
            "running_V": layer.running_V,
            "counter": layer.num_batches_tracked,
            "grad": layer.weight.grad,
        },
        f"{folder}/{rank}.pt",
    )
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(tmp_path: Path):
    processes = [forked(partial(_ddp_worker, rank, str(tmp_path))) for rank in range(2)]
    assert [exit_code(process) for process in processes] == [0, 0]
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert states[0]["counter"] == 2
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
    assert states[0]["running_V"].shape == (3, 10, 6)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_a_network_is_averaged_from_its_first_step_on(use_buffers: bool):
    """As docs/conv_norm.md says."""
    layer = ConvNorm2d(3, 8, 3, padding=1)
    images = torch.randn(4, 3, 8, 8)
    early = AveragedModel(layer, use_buffers=use_buffers)
    layer(images)
    average = AveragedModel(layer, use_buffers=use_buffers)
    with torch.no_grad():
        layer.weight.mul_(2).add_(0.1)
    layer(images)
    with pytest.raises(RuntimeError, match="shape"):
        early.update_parameters(layer)
    for _ in range(2):
        average.update_parameters(layer)
    update_bn([images], average)
    average.module.buffers_from_weights()
    average.eval()
    twin = ConvNorm2d(3, 8, 3, padding=1, track_running_stats=False).eval()
    weights = {**average.module.state_dict(), "running_V": torch.zeros(1)}
    twin.load_state_dict(weights)
    torch.testing.assert_close(average(images), twin(images))


def test_replace_in_a_torchvision_resnet():
    torch.manual_seed(0)
    network = torchvision.models.resnet18(num_classes=5)
    network.layer1.eval()
    weights = [m.weight for m in network.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert replace_with_conv_norm(network) is network
    layers = [m for m in network.modules() if isinstance(m, ConvNorm2d)]
    assert [layer.weight for layer in layers] == weights
    assert [layer.batch_norm for layer in layers] == norms
    assert type(network.bn1) is type(network.layer2[0].downsample[1]) is nn.Identity
    assert (layers[0].kernel_size, layers[0].stride, layers[0].padding) == ((7, 7), (2, 2), (3, 3))
    assert not layers[1].training
    assert layers[-1].training

    modules = list(network.modules())
    replace_with_conv_norm(network)
    assert list(network.modules()) == modules

    network.train()
    network(torch.rand(2, 3, 64, 64)).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


def test_replace_keeps_the_function_of_an_orthogonal_convolution():
    """A kernel with a flat spectrum has V = 1. With an identity in bpconv the new layer then
    computes the same as the old one, if everything else is copied.
    """
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, 3, stride=2, padding=2, dilation=2, padding_mode="reflect")
    with torch.no_grad():
        # The kernel shifts its input by (2, -2).
        conv.weight.copy_(
            torch.eye(4)[:, :, None, None] * torch.eye(3)[0, :, None] * torch.eye(3)[2]
        )
    norm = nn.BatchNorm2d(4, eps=0.1, momentum=0.3, affine=False)
    network = nn.Sequential(
        conv, norm, nn.ReLU(), nn.Conv2d(4, 2, 1, bias=False), nn.BatchNorm2d(3)
    ).double()
    # A norm of another width does not belong to the convolution before it.
    del network[4]
    nn.init.dirac_(network[3].weight)
    network(torch.rand(8, 4, 9, 9, dtype=torch.float64))
    network.eval()
    x = torch.rand(2, 4, 9, 9, dtype=torch.float64)
    expected = network(x)
    replace_with_conv_norm(network)
    for layer in (network[0], network[3]):
        nn.init.dirac_(layer.bpconv.weight, groups=layer.out_channels)
        nn.init.zeros_(layer.bpconv.bias)
    assert not network[3].bn
    torch.testing.assert_close(network(x), expected)


def test_only_plain_convolutions_are_replaced():
    norm = nn.BatchNorm2d(2)
    with warnings.catch_warnings():
        # The hook is deprecated, but still works.
        warnings.simplefilter("ignore")
        hooked = nn.utils.spectral_norm(nn.Conv2d(3, 3, 1))
    others = nn.Sequential(
        hooked,
        ONIConv2d(3, 3, 1),
        SpectralNormConv2d(3, 3, 1),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1)),
    )
    modules = list(others.modules())
    replace_with_conv_norm(others)
    assert list(others.modules()) == modules
    network = replace_with_conv_norm(nn.Sequential(nn.Conv2d(3, 3, 1), norm))
    assert network[1] is norm
    assert not network[0].bn
    assert isinstance(replace_with_conv_norm(nn.Conv2d(3, 3, 1)), ConvNorm2d)
    shared = nn.Conv2d(3, 3, 3)
    network = replace_with_conv_norm(nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)}))
    assert network["a"] is network["b"][0]
    assert isinstance(network["a"], ConvNorm2d)


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize(("way", "batch"), [("fft", 4), ("dft", 4), ("fourier", 32)])
def test_the_output_is_memory_of_its_own_and_may_be_changed_in_place(way, batch, low, monkeypatch):
    torch.manual_seed(0)
    layer = ConvNorm2d(64, 64, 3, stride=2, padding=1, affine=False, bn=False)
    images = torch.randn(batch, 64, 8, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        assert (layer_module.plan_for_layer(layer, images) is not None) == (way == "fourier")
        if way == "fft":
            monkeypatch.setattr(layer_module, "dft_filter_is_faster", lambda _: False)
        output = layer(images)
        (expected,) = torch.autograd.grad(output.relu().square().sum(), images)
        # A view of the whole map would keep it alive for the backward pass of what follows.
        assert output.untyped_storage().nbytes() == output.nbytes
        (gradient,) = torch.autograd.grad(layer(images).relu_().square().sum(), images)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("low", [False, True])
def test_a_wide_layer_computes_the_input_of_batch_norm_again(low, monkeypatch):
    torch.manual_seed(0)
    layer = ConvNorm2d(3, NARROW, 3, padding=1)
    twin = copy.deepcopy(layer)
    alive = []
    layer.bpconv.register_forward_hook(
        lambda module, inputs, output: alive.append(weakref.ref(output))
    )
    images = torch.randn(4, 3, 8, 8)

    def one_step(layer):
        mine = images.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            output = layer(mine)
        assert not alive or alive[0]() is None
        output.float().sin().sum().backward()
        return [output, mine.grad, *(p.grad for p in layer.parameters()), *layer.buffers()]

    with monkeypatch.context() as patch:
        patch.setattr(layer_module, "recomputed_batch_norm", lambda x, conv, norm: norm(conv(x)))
        kept = one_step(twin)
    for actual, expected in zip(one_step(layer), kept, strict=True):
        assert torch.equal(actual, expected)
    assert len(alive) == 1


def test_a_narrow_layer_keeps_the_input_of_batch_norm():
    layer = ConvNorm2d(3, NARROW - 1, 3, padding=1)
    alive = []
    layer.bpconv.register_forward_hook(
        lambda module, inputs, output: alive.append(weakref.ref(output))
    )
    output = layer(torch.randn(4, 3, 8, 8))
    assert output.requires_grad
    assert alive[0]() is not None


def test_off_the_cpu_a_narrow_layer_computes_the_input_of_batch_norm_again(monkeypatch):
    calls = []
    monkeypatch.setattr(layer_module, "recomputed_batch_norm", lambda *args: calls.append(args))
    layer = ConvNorm2d(3, NARROW - 1, 3, padding=1).to("meta")
    layer(torch.empty(4, 3, 8, 8, device="meta"))
    assert len(calls) == 1
