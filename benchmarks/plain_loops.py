"""The peers of training: loops as they are usually written."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from benchmarks.timing import synchronize


class PlainImages(Dataset):
    """Images in memory that are transformed one by one, as in torchvision's CIFAR data sets.

    Args:
        pixels: uint8 `(N, C, H, W)`.
        labels: int64 `(N,)`.
        transform: of a PIL image.
    """

    def __init__(
        self, pixels: Tensor, labels: Tensor, transform: Callable[[Image.Image], Tensor]
    ) -> None:
        self.pixels = pixels.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def plain_loader(
    pixels: Tensor,
    labels: Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    batch_size: int,
    workers: int,
) -> DataLoader:
    """Random crops with 4 pixels of padding, flips, ToTensor and Normalize per image, in a
    shuffling DataLoader.
    """
    from torchvision import transforms

    transform = transforms.Compose(
        [
            transforms.RandomCrop(pixels.shape[-1], padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )
    return DataLoader(
        PlainImages(pixels, labels, transform), batch_size, shuffle=True, num_workers=workers
    )


def train_epoch(
    model: nn.Module, loader: DataLoader, optimizer: Optimizer, device: torch.device
) -> tuple[float, float]:
    """One epoch of standard training in fp32; returns mean loss and accuracy."""
    criterion = nn.CrossEntropyLoss()
    model.train()
    total_loss = 0.0
    correct = 0
    seen = 0
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        optimizer.zero_grad()
        outputs = model(images)
        loss = criterion(outputs, labels)
        loss.backward()
        optimizer.step()
        total_loss += loss.item() * labels.size(0)
        correct += outputs.argmax(dim=1).eq(labels).sum().item()
        seen += labels.size(0)
    synchronize(device)
    return total_loss / seen, correct / seen


def attack_by_backward(
    model: nn.Module, images: Tensor, labels: Tensor, epsilon: float, step_size: float, steps: int
) -> Tensor:
    """The l-inf PGD of Rice et al. ("Overfitting in adversarially robust deep learning",
    arXiv:2002.11569): the perturbation `(B, C, H, W)`.
    """
    delta = torch.empty_like(images).uniform_(-epsilon, epsilon)
    delta = torch.clamp(delta, -images, 1 - images).requires_grad_()
    for _ in range(steps):
        loss = F.cross_entropy(model(images + delta), labels)
        # As in their code: this computes and accumulates the gradients of all weights, too.
        loss.backward()
        moved = torch.clamp(delta.detach() + step_size * delta.grad.sign(), -epsilon, epsilon)
        delta.data = torch.clamp(moved, -images, 1 - images)
        delta.grad.zero_()
    # Their code ends with the losses of the last points, to choose among restarts, of which there
    # is one here. The forward pass is part of what their loop costs.
    losses = F.cross_entropy(model(images + delta), labels, reduction="none").detach().float()
    chosen = torch.zeros_like(images)
    better = losses >= 0
    chosen[better] = delta.detach()[better]
    return chosen


def adversarial_step(
    model: nn.Module,
    optimizer: Optimizer,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    step_size: float,
    steps: int,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> tuple[float, float]:
    """One step of PGD training in the loop of Rice et al.: attack, update, and a forward pass of
    the clean images for the log.

    Returns:
        The losses on the attacked and on the clean images.
    """
    model.train()
    with autocast():
        delta = attack_by_backward(model, images, labels, epsilon, step_size, steps)
        robust_loss = F.cross_entropy(model(torch.clamp(images + delta, 0, 1)), labels)
    optimizer.zero_grad()
    robust_loss.backward()
    optimizer.step()
    with autocast():
        loss = F.cross_entropy(model(images), labels)
    return robust_loss.item(), loss.item()
