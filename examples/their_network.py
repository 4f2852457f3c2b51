"""An ordinary PyTorch network, which does not use this project, and images in folders to measure
it on."""

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

TEST_EVERY = 5


def build() -> nn.Module:
    """Return the network, which maps pixels in `[0, 1]` to logits; validate_pgd.py calls this."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 2 * 2, 10),
    )


def main() -> None:
    """Train on digits, save the weights, and write the test images as
    `digits/<class>/<number>.png`."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(digits.target).long()
    is_test = torch.arange(len(labels)) % TEST_EVERY == 0
    network = build()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(network(images[~is_test]), labels[~is_test]).backward()
        optimizer.step()
    torch.save(network.state_dict(), "their_network.pth")
    for number in is_test.nonzero().flatten().tolist():
        folder = Path("digits") / str(labels[number].item())
        folder.mkdir(parents=True, exist_ok=True)
        pixels = (255 * images[number, 0]).round().byte()
        Image.fromarray(pixels.numpy()).save(folder / f"{number:04}.png")


if __name__ == "__main__":
    main()
