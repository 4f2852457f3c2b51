"""Split the training set, and take stratified subsets.

In the path read -> split -> subset -> noise -> batch -> augment, this is the split and the subset.
All functions return sorted positions and choose class by class, so that every part has the class
balance of the whole.
"""

import numpy as np
import torch

from base.base_data_loader import BaseDataLoader
from base.errors import DataError
from base.seeding import numpy_generator


def stratified_split(
    labels: np.ndarray, fraction: float, seed: int, key: str = "data_loader.args.validation_split"
) -> tuple[np.ndarray, np.ndarray]:
    """Hold out a fraction of every class.

    In a class of n images, round(fraction * n) are held out (halves round up), and at least one if
    `fraction` is above 0.

    Args:
        labels: int64 `(N,)` clean labels.
        fraction: in `[0, 1)`.
        seed: the split is a pure function of labels, fraction and seed.
        key: the config key that `fraction` comes from, for the error.

    Returns:
        `(train_index, held_out_index)`, int64, sorted and disjoint; together all of `range(N)`.

    Raises:
        DataError: no image of a class would be left for training.
    """
    if fraction == 0:
        return np.arange(len(labels)), np.empty(0, np.int64)
    held_out = []
    for label in np.unique(labels):
        members = _shuffled_members(labels, label, seed, "validation")
        count = max(1, _round(fraction * len(members)))
        if count >= len(members):
            raise DataError(
                f"{key}: {fraction} would leave no image of class {label} for training: "
                f"it has {len(members)}"
            )
        held_out.append(members[:count])
    held_out_index = np.sort(np.concatenate(held_out))
    return np.setdiff1d(np.arange(len(labels)), held_out_index), held_out_index


def stratified_subset(
    index: np.ndarray, labels: np.ndarray, fraction: float, seed: int
) -> np.ndarray:
    """Keep a fraction of the training images, class by class.

    `fraction` is relative to the whole training set, as in the ConvNorm paper: 0.1 of CIFAR-10 is
    5,000 images. They are taken only from `index`, the images that are not held out: with 10 % held
    out, 0.95 and 1.0 both mean the remaining 90 %. For one seed, a smaller subset is contained in
    every larger one.

    Args:
        index: int64 positions that may be used.
        labels: int64 `(N,)` clean labels of the whole training set.
        fraction: in `(0, 1]`.
        seed: the subset is a pure function of the arguments.

    Returns:
        int64 sorted positions; from a class of n images, round(fraction * n) or all in `index`,
        if these are fewer.

    Raises:
        DataError: a class would get no image.
    """
    kept = []
    usable = np.zeros(len(labels), dtype=bool)
    usable[index] = True
    for label in np.unique(labels):
        # The whole class is shuffled before images outside of `index` are dropped, so that the
        # order depends on the seed and the class alone.
        members = _shuffled_members(labels, label, seed, "subset")
        count = _round(fraction * len(members))
        if count < 1:
            raise DataError(
                f"trainer.subset_percent: {fraction} of the {len(members)} images of class {label}"
                f" rounds to none; expected at least {0.5 / len(members):.2g}"
            )
        kept.append(members[usable[members]][:count])
    return np.sort(np.concatenate(kept))


def first_of_every_class(labels: np.ndarray, count: int) -> np.ndarray:
    """Choose `count` images, spread as equally as possible over the classes.

    The first images of every class are chosen, in the order of `labels`. Unlike the first `count`
    images of all, they represent every class of a data set that is sorted by class.

    Args:
        labels: int64 `(N,)`.
        count: number of images; more than N gives all N.

    Returns:
        int64 sorted positions.
    """
    # The n-th image of its class
    nth = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        nth[members] = np.arange(len(members))
    # `lexsort` sorts by its last key first: all first images, then all second ones, and so on
    return np.sort(np.lexsort((labels, nth))[:count])


def some_of_every_class(loader: BaseDataLoader, count: int) -> BaseDataLoader:
    """Return a loader of at most `count` images of an unshuffled loader; see
    `first_of_every_class`."""
    index = first_of_every_class(loader.labels.cpu().numpy(), count)
    return loader.subset(torch.from_numpy(index))


def _shuffled_members(labels: np.ndarray, label: int, seed: int, purpose: str) -> np.ndarray:
    return numpy_generator(seed, purpose, int(label)).permutation(np.flatnonzero(labels == label))


def _round(value: float) -> int:
    # Python's `round` would round 0.5 and 2.5 down, to even numbers
    return int(value + 0.5)
