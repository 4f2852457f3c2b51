"""Data sets, splits, label noise and augmentation: batches of pixels in `[0, 1]`, each a pure
function of its number."""

from base.registry import DATA_LOADERS
from data_loader.data_loaders import (
    CIFAR10DataLoader,
    CIFAR100DataLoader,
    DigitsDataLoader,
    ImageFolderDataLoader,
)
from data_loader.datasets import LabeledImages
from data_loader.images import MemoryImages
from data_loader.label_noise import LabelNoise
from data_loader.training_data_loader import TrainingDataLoader

for loader in (CIFAR10DataLoader, CIFAR100DataLoader, ImageFolderDataLoader, DigitsDataLoader):
    DATA_LOADERS[loader.__name__] = loader

__all__ = [
    "DATA_LOADERS",
    "CIFAR10DataLoader",
    "CIFAR100DataLoader",
    "DigitsDataLoader",
    "ImageFolderDataLoader",
    "LabelNoise",
    "LabeledImages",
    "MemoryImages",
    "TrainingDataLoader",
]
