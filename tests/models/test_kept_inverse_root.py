"""V of fixed weights is computed once, and nothing else changes."""

import copy
import pickle
from contextlib import contextmanager, nullcontext

import pytest
import torch

from attacks import PGD
from attacks.frozen import frozen
from models import build_model
from models.layers import ConvNorm2d
from models.layers.conv_norm import kept_inverse_root
from models.layers.conv_norm import layer as layer_module
from models.layers.conv_norm.kernel_energy import inverse_root_energy

ATTACK = PGD(2 / 255, 0.5 / 255, 4)


@pytest.fixture
def computed(monkeypatch):
    """The sizes for which V has been computed."""
    sizes = []

    def counting(weight, size, dilation):
        sizes.append(size)
        return inverse_root_energy(weight, size, dilation)

    monkeypatch.setattr(layer_module, "inverse_root_energy", counting)
    monkeypatch.setattr(kept_inverse_root, "inverse_root_energy", counting)
    return sizes


def attacked_in_training_mode(keep):
    """Adversarial images, state and number of computations of an attack as training makes it."""
    torch.manual_seed(0)
    model = build_model({"type": "simpleCNN", "args": {"conv_layer_type": "conv_norm"}}).train()
    images, labels = torch.rand(4, 3, 32, 32), torch.arange(4)
    with frozen(model) if keep else nullcontext():
        found = ATTACK.perturb(model, images, labels, torch.Generator().manual_seed(0))
        model(images)
    return found, model


def test_an_attack_in_training_mode_computes_v_once_and_changes_no_bit(computed):
    found, model = attacked_in_training_mode(keep=True)
    layers = [module for module in model.modules() if isinstance(module, ConvNorm2d)]
    assert len(computed) == len(layers) > 1
    computed.clear()
    expected, plain = attacked_in_training_mode(keep=False)
    assert len(computed) >= (ATTACK.steps + 1) * len(layers), "the attack makes several passes"
    assert torch.equal(found, expected)
    assert layers[0].num_batches_tracked > ATTACK.steps
    for (name, ours), theirs in zip(
        model.state_dict().items(), plain.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_the_count_can_fail(computed, monkeypatch):
    monkeypatch.setattr(ConvNorm2d, "fixed_weights", lambda self: nullcontext())
    attacked_in_training_mode(keep=True)
    assert len(computed) > 20


def small():
    torch.manual_seed(0)
    layer = ConvNorm2d(2, 3, 3, padding=1, track_running_stats=False)
    layer.weight.requires_grad_(False)
    return layer, torch.rand(2, 2, 6, 6)


def assert_right(layer, x):
    fresh = copy.deepcopy(layer)
    torch.testing.assert_close(layer(x), fresh(x), rtol=0, atol=0)


def in_place(layer):
    # Adding, because V makes up for a factor.
    with torch.no_grad():
        layer.weight.add_(1)


def training_step(**arguments):
    def step(layer):
        layer.weight.requires_grad_(True)
        layer(torch.rand(2, 2, 6, 6)).square().sum().backward()
        torch.optim.SGD([layer.weight], lr=0.1, **arguments).step()
        layer.weight.requires_grad_(False)

    return step


def other_memory(layer):
    layer.weight.data = torch.rand_like(layer.weight)


def other_parameter(layer):
    layer.weight = torch.nn.Parameter(torch.rand_like(layer.weight))


def loaded(layer):
    layer.load_state_dict(ConvNorm2d(2, 3, 3, padding=1).state_dict())


CHANGES = {
    "in place": in_place,
    "optimizer": training_step(foreach=False),
    "foreach optimizer": training_step(foreach=True),
    "fused optimizer": training_step(fused=True),
    "other memory": other_memory,
    "other parameter": other_parameter,
    "loaded": loaded,
    "other precision": lambda layer: layer.double().float(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_have_another_v_also_within_the_context(change):
    layer, x = small()
    with layer.fixed_weights():
        before = layer(x)
        CHANGES[change](layer)
        assert_right(layer, x)
        if change != "other precision":
            assert not torch.equal(layer(x), before)


def test_each_size_and_a_call_with_other_weights_has_its_own_v():
    layer, x = small()
    with layer.fixed_weights():
        layer(x)
        assert_right(layer, torch.rand(2, 2, 9, 6))
        assert_right(layer, x)
        other, _ = small()
        in_place(other)
        values = dict(other.named_parameters())
        called = torch.func.functional_call(layer, values, (x,))
        assert torch.equal(called, other(x))


def test_nothing_is_kept_after_the_outermost_context(computed):
    layer, x = small()
    with layer.fixed_weights():
        layer(x)
        with layer.fixed_weights():
            layer(x)
        layer(x)
    assert len(computed) == 1
    layer.weight.data.add_(1)
    assert_right(layer, x)
    assert len(computed) == 3


@contextmanager
def failing():
    raise RuntimeError
    yield


def test_an_error_ends_it(computed):
    layer, x = small()
    with pytest.raises(RuntimeError), frozen(layer), failing():
        pass
    layer(x)
    layer(x)
    assert len(computed) == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])  # noqa: S301
def test_a_copy_keeps_nothing(copied, computed):
    layer, x = small()
    with layer.fixed_weights():
        layer(x)
        twin = copied(layer)
    computed.clear()
    twin.weight.data.add_(1)
    twin(x)
    twin(x)
    assert len(computed) == 2


def test_a_v_from_inference_mode_takes_part_in_gradients():
    layer, x = small()
    with layer.fixed_weights():
        with torch.inference_mode():
            expected = layer(x)
        images = x.clone().requires_grad_()
        output = layer(images)
        output.sum().backward()
    torch.testing.assert_close(output, expected)
    assert images.grad.isfinite().all()


def test_a_compiled_layer_keeps_nothing(computed):
    layer, x = small()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with layer.fixed_weights():
        before = compiled(x)
        layer.weight.data.add_(1)
        assert not torch.equal(compiled(x), before)
