"""Which training images are held out for validation, which of the rest are used, and which images
stand for many.

All functions return sorted positions and choose class by class, so that every part has the class
balance of the whole."""

import numpy as np
import torch

from base.base_data_loader import BaseDataLoader
from base.errors import DataError
from base.seeding import numpy_generator


def stratified_split(
    labels: np.ndarray, fraction: float, seed: int, key: str = "data_loader.args.validation_split"
) -> tuple[np.ndarray, np.ndarray]:
    """Hold out a fraction of every class.

    A class of n images gives up round(fraction * n) of them (halves round up), at least one if
    `fraction` is above 0.

    Args:
        labels: int64 `(N,)` clean labels.
        fraction: in `[0, 1)`.
        seed: the split is a pure function of labels, fraction and seed.
        key: the config key that `fraction` comes from, for the error.

    Returns:
        `(train_index, held_out_index)`, int64, sorted and disjoint; together all of `range(N)`.

    Raises:
        DataError: a class would be held out entirely.
    """
    held_out = [np.empty(0, np.int64)]
    for label in np.unique(labels) if fraction > 0 else ():
        members = _shuffled_members(labels, label, seed, "validation")
        count = max(1, _round(fraction * len(members)))
        if count >= len(members):
            raise DataError(
                f"{key}: {fraction} would hold out all {len(members)} images of class {label}; "
                "expected a value that leaves some for training"
            )
        held_out.append(members[:count])
    held_out_index = np.sort(np.concatenate(held_out))
    return np.setdiff1d(np.arange(len(labels)), held_out_index), held_out_index


def stratified_subset(
    index: np.ndarray, labels: np.ndarray, fraction: float, seed: int
) -> np.ndarray:
    """Keep a part of the training images, class by class.

    `fraction` counts the whole training set, as in the ConvNorm paper: 0.1 of CIFAR-10 is 5,000
    images. They are taken only from `index`, what validation has left, so with 10 % held out 0.95
    and 1.0 both mean the remaining 90 %. With one seed, a smaller subset is part of every larger
    one.

    Args:
        index: int64 positions that may be used.
        labels: int64 `(N,)` clean labels of the whole training set.
        fraction: in `(0, 1]`.
        seed: the subset is a pure function of the arguments.

    Returns:
        int64 sorted positions, per class min(round(fraction * class size), what `index` has of it).

    Raises:
        DataError: a class would get no image.
    """
    kept, usable = [], np.zeros(len(labels), dtype=bool)
    usable[index] = True
    for label in np.unique(labels):
        # All of the class is shuffled, then what is not in `index` dropped: the order depends on
        # the seed and the class alone.
        members = _shuffled_members(labels, label, seed, "subset")
        count = _round(fraction * len(members))
        if count < 1:
            raise DataError(
                f"trainer.subset_percent: {fraction} of the {len(members)} images of class {label} is none; "
                f"expected at least {0.5 / len(members):.2g}"
            )
        kept.append(members[usable[members]][:count])
    return np.sort(np.concatenate(kept))


def first_of_every_class(labels: np.ndarray, count: int) -> np.ndarray:
    """`count` images as equally spread over the classes as can be: of every class the first ones,
    in the order of `labels`.

    Unlike the first `count` images, this is a fair sample of a data set that is sorted by class,
    too.

    Args:
        labels: int64 `(N,)`.
        count: at most all N are returned.

    Returns:
        int64 sorted positions.
    """
    nth = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        nth[members] = np.arange(len(members))
    return np.sort(np.lexsort((labels, nth))[:count])


def some_of_every_class(loader: BaseDataLoader, count: int) -> BaseDataLoader:
    """A loader of `first_of_every_class`, `count` images of an unshuffled loader (all, where it has
    no more)."""
    return loader.subset(torch.from_numpy(first_of_every_class(loader.labels.cpu().numpy(), count)))


def _shuffled_members(labels: np.ndarray, label: int, seed: int, purpose: str) -> np.ndarray:
    return numpy_generator(seed, purpose, int(label)).permutation(np.flatnonzero(labels == label))


def _round(value: float) -> int:
    return int(value + 0.5)
