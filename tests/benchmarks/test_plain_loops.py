"""The plain loops learn, attack within the ball, and compute the same as our side."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from benchmarks.plain_loops import (
    PlainImages,
    adversarial_step,
    attack_by_backward,
    plain_loader,
    train_epoch,
)
from benchmarks.rows import Settings
from benchmarks.steps import BATCH_NORM, LAYERS, build_trainer, step_config
from models import build_model

CPU = torch.device("cpu")
SMOKE = Settings(CPU, 1, smoke=True)
PLAIN = {"type": "simpleCNN", "args": {"conv_layer_type": "conv", "norm_layer_type": "bn"}}


@pytest.fixture
def digits():
    trainer = build_trainer(
        step_config(SMOKE, [*LAYERS[BATCH_NORM], ("data_loader.args.batch_size", "64")])
    )
    loader = trainer.train_loader
    return loader.images.pixels[:320], loader.labels[:320]


def test_the_plain_loop_learns(digits):
    torch.manual_seed(0)
    loader = plain_loader(*digits, (0.3,) * 3, (0.35,) * 3, 32, workers=0)
    model = build_model(PLAIN)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    first, _ = train_epoch(model, loader, optimizer, CPU)
    for _ in range(9):
        last, accuracy = train_epoch(model, loader, optimizer, CPU)
    assert last < first / 2
    assert accuracy > 0.6


def test_plain_images_are_the_pixels_they_were_given(digits):
    pixels, labels = digits
    from torchvision.transforms import ToTensor

    image, label = PlainImages(pixels, labels, ToTensor())[3]
    torch.testing.assert_close(image, pixels[3] / 255)
    assert label == labels[3]


def test_the_plain_transforms_are_those_of_our_loader(digits):
    pixels, labels = digits
    mean, std = (0.3, 0.2, 0.1), (0.35, 0.3, 0.25)
    images, _ = next(iter(plain_loader(pixels, labels, mean, std, 320, workers=0)))
    assert images.shape == (320, 3, 32, 32)
    black = -torch.tensor(mean) / torch.tensor(std)
    torch.testing.assert_close(images.amin(dim=(0, 2, 3)), black, rtol=0, atol=1e-5)
    assert (images[:, :, 0] == black.reshape(1, 3, 1)).flatten(1).all(dim=1).float().mean() > 0.3, (
        "crops show the padding"
    )


def test_one_plain_update_is_that_of_our_trainer():
    trainer = build_trainer(
        step_config(
            SMOKE,
            [*LAYERS[BATCH_NORM], ("optimizer.args.lr", "0.01"), ("system.precision", "fp32")],
        )
    )
    images, labels = (part[:16] for part in next(iter(trainer.train_loader)))
    plain = deepcopy(trainer.model)
    plain_optimizer = torch.optim.SGD(
        plain.parameters(), lr=0.01, momentum=0.9, weight_decay=0.0001
    )
    for _ in range(3):
        ours = trainer.train_batch(images, labels)
        theirs, _ = train_epoch(plain, [(images, labels)], plain_optimizer, CPU)
    assert float(ours.sums["loss"]) / ours.count == pytest.approx(theirs, rel=1e-5)
    for own, other in zip(trainer.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)


def test_the_attack_stays_in_the_ball_and_raises_the_loss():
    torch.manual_seed(0)
    model = build_model(PLAIN).train()
    images, labels = torch.rand(8, 3, 32, 32), torch.arange(8)
    delta = attack_by_backward(model, images, labels, 8 / 255, 2 / 255, steps=5)
    assert delta.abs().max() <= 8 / 255 + 1e-7
    assert (images + delta).min() >= 0
    assert (images + delta).max() <= 1
    clean = F.cross_entropy(model(images), labels)
    attacked = F.cross_entropy(model(images + delta), labels)
    assert attacked > clean + 0.01
    assert all(parameter.grad is not None for parameter in model.parameters()), (
        "as in their code, weights get gradients"
    )


def test_adversarial_steps_learn():
    torch.manual_seed(0)
    model = build_model(PLAIN)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    images, labels = torch.rand(16, 3, 32, 32), torch.arange(16) % 10
    losses = [
        adversarial_step(model, optimizer, images, labels, 8 / 255, 2 / 255, 2) for _ in range(20)
    ]
    assert losses[-1][0] < losses[0][0] / 2
    assert losses[-1][1] < losses[-1][0], (
        "clean images after the update are easier than attacked ones before it"
    )
