"""In an attack, batch norms of a frozen network compute the gradient of their input only, and the
same bits as torch."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from attacks import PGD
from attacks.batch_norm import cheap_batch_norm
from attacks.frozen import frozen
from evaluation.attack_batch import attack_batch
from trainer.adversarial_trainer import AdversarialTrainer

FORMATS = (torch.contiguous_format, torch.channels_last)


class Backwards(TorchDispatchMode):
    """Counts torch's own backward passes of batch norms."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "batch_norm_backward" in str(func)
        return func(*args, **(kwargs or {}))


def norm(channels, affine=True, dtype=torch.float32):
    layer = nn.BatchNorm2d(channels, affine=affine).to(dtype)
    generator = torch.Generator().manual_seed(channels)
    with torch.no_grad():
        layer.running_var.uniform_(1e-4, 3, generator=generator)
        for values in (layer.running_mean, *layer.parameters()):
            values.normal_(generator=generator)
    return layer


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), norm(8), nn.ReLU(inplace=True), norm(8), nn.Flatten(), nn.Linear(288, 4)
    )


def problem(n=6):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(n, 3, 8, 8, generator=generator)
    return images, torch.randint(4, (n,), generator=generator)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(5, 8, 9, 7), (2, 64, 4, 4), (3, 3, 1, 1), (0, 4, 3, 3)])
def test_outputs_and_gradients_are_torchs_bit_by_bit(shape, affine, dtype, memory_format):
    layer = norm(shape[1], affine, torch.promote_types(dtype, torch.float32)).eval()
    generator = torch.Generator().manual_seed(1)
    images, gradient = (
        torch.randn(shape, generator=generator).to(dtype, memory_format=memory_format)
        for _ in range(2)
    )
    images.requires_grad_()
    with frozen(layer):
        expected = layer(images)
        (gradient_expected,) = torch.autograd.grad(expected, images, gradient)
        with cheap_batch_norm(layer), Backwards() as backwards:
            found = layer(images)
            (gradient_found,) = torch.autograd.grad(found, images, gradient)
    assert backwards.count == (dtype == torch.bfloat16 and images.numel() > 0)
    assert torch.equal(found, expected)
    assert torch.equal(gradient_found, gradient_expected)
    assert gradient_found.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_attack_an_evaluation_and_a_training_attack_leave_torchs_pass_out(norm):
    model, (images, labels) = network(), problem()
    attack = PGD(0.1, 0.03, 4, norm)
    state = deepcopy(model.state_dict())
    with Backwards() as backwards:
        found = attack(model, images, labels)
        attack_batch(model.eval(), images, labels, attack, positions=torch.arange(6), seed=0)
        trainer = AdversarialTrainer.__new__(AdversarialTrainer)
        trainer.model, trainer.bn_mode, trainer.autocast = model, "eval", torch.enable_grad
        with trainer.attacking():
            attack.run(model, images, labels, images)
    assert backwards.count == 0
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with Backwards() as backwards:
        # A function is left to torch
        assert torch.equal(attack(lambda pixels: model(pixels), images, labels), found)
    assert backwards.count == 2 * attack.steps


def test_what_is_not_a_product_is_left_to_torch():
    layer, images = norm(3), problem()[0].requires_grad_()
    with frozen(layer, training=True), cheap_batch_norm(layer), Backwards() as backwards:
        outer = layer.forward
        with cheap_batch_norm(layer):
            assert layer.forward is outer
        torch.autograd.grad(layer(images).square().sum(), images)
        layer.eval()
        layer.weight.requires_grad_(True)
        layer(images).sum().backward()
        layer.weight.requires_grad_(False)
        statistics = {"running_mean": torch.zeros(3), "running_var": torch.ones(3)}
        other = torch.func.functional_call(layer, statistics, images)
        torch.autograd.grad(other.sum(), images)
        torch.autograd.grad(deepcopy(layer)(images).sum(), images)
    assert backwards.count == 3
    assert layer.weight.grad is not None
    assert "forward" not in vars(layer)


# torch itself compiles its rules for jvp with torch.jit.script
@pytest.mark.filterwarnings("ignore:`torch.jit.script:FutureWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_a_model_may_differentiate_inside_in_other_ways():
    layer, images = norm(3).eval(), problem()[0]
    direction = torch.randn_like(images)

    def derivatives():
        along = torch.func.jvp(layer, (images,), (direction,))[1]
        gradient = torch.func.grad(lambda pixels: layer(pixels).square().sum())(images)
        each = torch.func.vmap(layer)(images.unsqueeze(1))
        first = images.clone().requires_grad_()
        (slope,) = torch.autograd.grad(layer(first).pow(3).sum(), first, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), first)
        return along, gradient, each, curvature

    with frozen(layer):
        expected = derivatives()
        with cheap_batch_norm(layer):
            found = derivatives()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
