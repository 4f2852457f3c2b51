"""An attack that stops early shrinks its batches: exactly on the CPU, to a few sizes on an
accelerator, and cuDNN does not time algorithms for them."""

import pytest
import torch
import torch._dynamo  # not in the first backward pass, in the middle of the modes
from fake_device import fake_device
from torch import nn

from attacks import APGD, PGD, Square
from attacks.classifier import FilledClassifier, batch_sizes
from evaluation.attack_batch import attack_batch

SEARCHES = [
    PGD(0.3, 0.02, 12, random_start=False, early_stop=True),
    APGD(0.1, 8),
    Square(0.4, 60),
]


class Brightness(nn.Module):
    """Class 1 is brighter than a half; notes the sizes of its batches."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.sizes = []

    def forward(self, images):
        self.sizes.append(len(images))
        brightness = self.scale * images.mean(dim=(1, 2, 3)) - 0.5
        return torch.stack([-brightness, brightness], dim=1)


def ramp(n):
    """Images that take more and more steps, and their labels."""
    brightness = torch.linspace(0.51, 0.8, n).reshape(n, 1, 1, 1)
    noise = 0.1 * torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return (brightness + noise - 0.05).clamp(0, 1), torch.ones(n, dtype=torch.int64)


@pytest.mark.parametrize(
    ("whole", "sizes"),
    [
        (1, [1]),
        (32, [32]),
        (33, [32, 33]),
        (128, [32, 64, 128]),
        (359, [64, 128, 256, 359]),
        (512, [64, 128, 256, 512]),
    ],
)
def test_batch_sizes_are_powers_of_two_and_the_whole(whole, sizes):
    assert batch_sizes(whole) == sizes


@pytest.mark.parametrize("attack", SEARCHES, ids=lambda attack: type(attack).__name__)
@pytest.mark.parametrize("evaluated", [False, True])
def test_on_an_accelerator_a_model_sees_four_batch_sizes_and_finds_the_same(
    attack, evaluated, monkeypatch
):
    model = Brightness()
    images, labels = ramp(359)
    generators = {"positions": torch.arange(359), "seed": 0}

    def search(images, labels):
        if evaluated:
            return attack_batch(model, images, labels, attack, **generators)[1]
        return attack(model, images, labels)

    expected = search(images, labels)
    exact = set(model.sizes)
    assert exact - {64, 128, 256, 359, 360}, "the batches of the CPU have sizes of their own"
    model.sizes.clear()
    with fake_device(monkeypatch) as fake:
        model.to("cuda")
        images, labels = images.to("cuda"), labels.to("cuda")
        fake.forget()
        found = search(images, labels)
        waits = fake.waits.copy()
        found = found.cpu()
    if not evaluated:
        # Two for the checks of images and labels
        assert sum(waits.values()) <= len(model.sizes) + 2, waits
    assert len(set(model.sizes)) > 1
    assert set(model.sizes) <= {64, 128, 256, 359}
    torch.testing.assert_close(found, expected)


def test_the_copies_that_fill_a_batch_do_not_change_a_gradient(monkeypatch):
    model = Brightness()
    images, labels = ramp(70)
    attack = PGD(0.1, 0.05, 1)

    def answers(images, labels):
        classifier = FilledClassifier(model, labels)
        return attack.value_and_grad(classifier, images[:40], labels[:40])

    expected = answers(images, labels)
    with fake_device(monkeypatch):
        model.to("cuda")
        found = [part.cpu() for part in answers(images.to("cuda"), labels.to("cuda"))]
    assert model.sizes == [40, 64]
    torch.testing.assert_close(tuple(found), expected)


def test_cudnn_does_not_time_algorithms_within_an_attack(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    seen = []

    def model(images):
        seen.append(torch.backends.cudnn.benchmark)
        return torch.stack([images.mean(dim=(1, 2, 3)), images.amax(dim=(1, 2, 3))], dim=1)

    images, labels = ramp(4)
    PGD(0.1, 0.05, 2)(model, images, labels)
    attack_batch(model, images, labels, PGD(0.1, 0.05, 2), positions=torch.arange(4), seed=0)
    assert seen
    assert not any(seen)
    assert torch.backends.cudnn.benchmark

    def fails(images):
        raise RuntimeError("the model fails")

    with pytest.raises(RuntimeError, match="the model fails"):
        PGD(0.1, 0.05, 2)(fails, images, labels)
    assert torch.backends.cudnn.benchmark
