"""Data sets, splits, label noise and augmentation: batches of pixels in `[0, 1]`.

The path from files to a batch, with the module of each step:

    read      data_loaders, the classes that a config names; datasets and folder_scan find the files
    split     splits.stratified_split: the validation part
    subset    splits.stratified_subset: the part that is trained on
    noise     label_noise, or noise_file for labels from a file
    batch     image_data_loader: order, positions; images, decoding and workers hold the pixels
    augment   augment, on the device

`training_data_loader` takes the first four steps in its constructor, and `image_data_loader` the
last two in every epoch. `own_images` builds a training loader from any class of DATA_LOADERS, and
`contract` checks what that class returns. A batch is a pure function of (seed, epoch, number).
"""

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
