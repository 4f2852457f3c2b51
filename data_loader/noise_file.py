"""Noisy labels from a file: human mistakes such as CIFAR-N's, or noise that was made elsewhere.

This is the noise step of a data set with `trainer.noise_file`. `label_files` reads the file; this
module checks that its labels belong to the images of the data set, in their order.

CIFAR-N: Wei et al., "Learning with Noisy Labels Revisited: A Study Using Real-World Human
Annotations" (ICLR 2022).
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from base.errors import DataError
from base.registry import did_you_mean
from base.seeding import numpy_generator
from base.text import one_line
from data_loader.label_files import load_label_file

# CIFAR-N's names
CLEAN_KEY = "clean_label"
ORDER_FILES = "image_order*.npy"

RUN_KEYS = {
    f"{part}_{what}" for part in ("train", "val") for what in ("index", "label", "clean_label")
}
"""The entries of a run's `labels.npz`."""

NO_LABEL = -1
"""Stands for the label of an image that a run's `labels.npz` does not contain."""

DEVIATIONS = 3.0
"""An agreement must exceed chance by this many standard deviations. Labels in a random order do so
in one of 700 files."""

MOST_LISTED = 20
"""The largest number of entries of a file that a message lists."""

MOST_NAMED = 2000
"""The largest number of classes for which another naming is searched; the time grows with its
cube."""


def read_noise_file(
    file: str, key: str | None, clean_labels: np.ndarray, num_classes: int
) -> np.ndarray:
    """Read one noisy label per training image.

    The file covers the whole training set in its original order (CIFAR's; for an image folder:
    classes, then files, sorted by name). `label_files.load_label_file` lists the formats. A file
    with several sets of labels names them: CIFAR-N's are `clean_label`, `aggre_label`,
    `worse_label`, `random_label1` and so on, and `noisy_label` for CIFAR-100.

    Two kinds of files have another order. The labels of CIFAR-N's `*_human_ordered.npy` are sorted
    to CIFAR's order by its `image_order_*.npy`, which must be in the same folder or one above. A
    run's `labels.npz` holds positions.

    Args:
        file: the path.
        key: the set of labels to take, if there are several; None for a plain array and for a
            `labels.npz`.
        clean_labels: int64 `(N,)` labels of the data set, to recognize a file in another order or
            of another data set.
        num_classes: number of classes.

    Returns:
        int64 `(N,)` in `[0, num_classes)`; `NO_LABEL` for images that a `labels.npz` does not
        contain.

    Raises:
        DataError: the file is missing, cannot be read, or does not fit the data set: clean labels
            in the file differ from `clean_labels`, or the noisy ones disagree with them (see
            `check_agreement`).
    """
    path = Path(file).expanduser()
    where = f"trainer.noise_file: {file!r}"
    content = load_label_file(path, where)
    order = np.arange(len(clean_labels))
    if isinstance(content, Mapping):
        if key is None and content.keys() >= RUN_KEYS:
            return _labels_of_a_run(content, where, clean_labels, num_classes)
        if CLEAN_KEY in content:
            declared = _as_labels(
                content[CLEAN_KEY], f"{where}, entry {CLEAN_KEY!r}", len(clean_labels), num_classes
            )
            order = _order(declared, clean_labels, path, where)
        key = key or _only_key(content, where)
        content = _entry(content, key, where)
        where = f"{where}, entry {key!r}"
    elif key is not None:
        raise DataError(f"{where} holds a single array, so it has no entry {key!r}")
    noisy = _as_labels(content, where, len(clean_labels), num_classes)[order]
    check_agreement(noisy, clean_labels, num_classes, where)
    return noisy


def check_agreement(noisy: np.ndarray, clean: np.ndarray, num_classes: int, where: str) -> None:
    """Check that labels belong to these images, and number the classes in the same way.

    Two conditions must hold. First, the labels agree with the clean ones more often than they would
    in a random order, by `DEVIATIONS` standard deviations, given the class frequencies of both (see
    `chance_agreement`). Second, no other numbering of the classes agrees far better: significantly,
    and more than twice as far beyond its own chance. Such a numbering is fitted to one half of the
    images and tested on the other, so that it cannot fit the noise.

    Args:
        noisy: int64 `(N,)` labels of the file, in `[0, num_classes)`.
        clean: int64 `(N,)` labels of the data set.
        num_classes: number of classes.
        where: the beginning of an error message.

    Raises:
        DataError: the labels do not agree, or another numbering agrees far better.
    """
    agreement = float(np.mean(noisy == clean))
    if agreement == 1:
        return
    chance, deviation = chance_agreement(noisy, clean, num_classes)
    if len(clean) > 1:
        _check_naming(noisy, clean, num_classes, agreement - chance, where)
    # Labels that are all the same agree equally often in every order: the deviation is 0, and
    # rounding must not decide.
    if agreement - chance <= DEVIATIONS * deviation + 1e-9:
        raise DataError(
            f"{where}: only {agreement:.1%} of its labels are the data set's own, "
            f"no more than by chance ({chance:.1%} +- {deviation:.1%} for these class "
            "frequencies): its order differs, or it belongs to another data set"
        )


def chance_agreement(
    labels: np.ndarray, others: np.ndarray, num_classes: int
) -> tuple[float, float]:
    """Return mean and standard deviation of the fraction of equal labels in a random order.

    Let a_k and b_k be the numbers of labels of class k on the two sides, of n images, and
    S = sum_k a_k b_k. If one side is shuffled, the number of equal labels has the mean S / n and
    the second factorial moment

        (S^2 + sum_k a_k b_k (1 - a_k - b_k)) / (n (n - 1)).

    Both are exact.
    """
    n = len(labels)
    first = np.bincount(labels, minlength=num_classes).astype(float)
    second = np.bincount(others, minlength=num_classes).astype(float)
    products = first * second
    mean = products.sum() / n
    if n < 2:
        return mean / n, 0.0
    factorial_moment = (products.sum() ** 2 + (products * (1 - first - second)).sum()) / (
        n * (n - 1)
    )
    variance = max(factorial_moment + mean - mean**2, 0.0)
    return mean / n, float(np.sqrt(variance)) / n


def _check_naming(
    noisy: np.ndarray, clean: np.ndarray, num_classes: int, gain: float, where: str
) -> None:
    """Check that no other numbering of the classes agrees far better.

    `gain` is the agreement of `noisy` with `clean` beyond chance.
    """
    names, tested = _best_naming(noisy, clean, num_classes)
    renamed = names[noisy[tested]]
    seen = clean[tested]
    agreement = float(np.mean(renamed == seen))
    chance, deviation = chance_agreement(renamed, seen, num_classes)
    other_gain = agreement - chance
    if other_gain > 2 * gain and other_gain - max(gain, 0) > DEVIATIONS * deviation:
        own = float(np.mean(noisy == clean))
        changed = [label for label in np.unique(noisy) if names[label] != label]
        examples = ", ".join(f"{label} for class {names[label]}" for label in changed[:3])
        raise DataError(
            f"{where}: {own:.1%} of its labels are the data set's own, but {agreement:.1%} "
            f"would be if they stood for other classes ({examples}, ...): "
            "it numbers the classes in another way, or holds other classes"
        )


def _best_naming(
    noisy: np.ndarray, clean: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Find the class that each label should stand for, to agree best on one half of the images.

    Returns:
        int64 `(K,)` classes, and the positions of the other half of the images.
    """
    # Not a generator that noise is drawn from: the halves must not depend on the noise
    order = numpy_generator(0, "halves of a noise file").permutation(len(clean))
    fitted, tested = np.array_split(order, 2)
    names = np.arange(num_classes)
    if num_classes <= MOST_NAMED:
        # Imported here, because it takes a moment, and only noise files need it
        from scipy.optimize import linear_sum_assignment

        pairs = np.bincount(noisy[fitted] * num_classes + clean[fitted], minlength=num_classes**2)
        # Less than one image per class, so that it only decides between equally good numberings:
        # the one that changes fewer classes wins.
        gains = pairs.reshape(num_classes, num_classes) + np.eye(num_classes) / 2
        names = linear_sum_assignment(gains, maximize=True)[1]
    return names, tested


def _labels_of_a_run(
    content: Mapping, where: str, clean_labels: np.ndarray, num_classes: int
) -> np.ndarray:
    """Return the labels of a run's `labels.npz`, at their positions in the training set."""
    labels = np.full(len(clean_labels), NO_LABEL)
    for part in ("train", "val"):
        index = _as_array(content[f"{part}_index"], where)
        if index.ndim != 1 or index.dtype.kind not in "iu" or (index < 0).any():
            raise DataError(
                f"{where}, entry '{part}_index': expected positions in the training set"
            )
        own, noisy = (
            _as_labels(content[name], f"{where}, entry {name!r}", len(index), num_classes)
            for name in (f"{part}_clean_label", f"{part}_label")
        )
        # Positions beyond the training set are those of a `val` folder
        inside = index < len(clean_labels)
        if part == "train" and not inside.all():
            raise DataError(
                f"{where}: its run had more training images than this data set, which has"
                f" {len(clean_labels)}"
            )
        index = index[inside]
        own = own[inside]
        noisy = noisy[inside]
        differing = int(np.sum(own != clean_labels[index]))
        if differing:
            raise DataError(
                f"{where}: its '{part}_clean_label' differs from the data set's labels in "
                f"{differing} of {len(index)} images: its run had another data set"
            )
        labels[index] = noisy
    return labels


def _order(declared: np.ndarray, clean_labels: np.ndarray, path: Path, where: str) -> np.ndarray:
    """Return the position in the file of every training image.

    `declared` are the clean labels in the file, and `clean_labels` those of the data set.

    Raises:
        DataError: they differ, even after sorting by `image_order_*.npy`.
    """
    if np.array_equal(declared, clean_labels):
        return np.arange(len(declared))
    beside = [
        found
        for folder in (path.parent, path.parent.parent)
        for found in sorted(folder.glob(ORDER_FILES))
    ]
    for found in beside:
        # A file that cannot be read does not bring the labels into order.
        with suppress(Exception):
            # Its n-th number is the position in the training set of the file's n-th image
            with found.open("rb") as opened:
                places = np.load(opened, allow_pickle=False).ravel()
            if np.array_equal(np.sort(places), np.arange(len(declared))) and np.array_equal(
                declared, clean_labels[places]
            ):
                return np.argsort(places)
    differing = int(np.sum(declared != clean_labels))
    hint = ""
    if beside:
        hint = f"; {beside[0].name} does not bring it into order"
    elif path.suffix == ".npy":
        hint = (
            "; CIFAR-N's '_ordered' files need image_order_c10.npy or image_order_c100.npy "
            "beside them"
        )
    raise DataError(
        f"{where}: its {CLEAN_KEY!r} differs from the data set's labels in {differing} of "
        f"{len(clean_labels)} images: its order differs, or it belongs to another data set{hint}"
    )


def _only_key(content: Mapping[str, Any], where: str) -> str:
    if not content:
        raise DataError(f"{where} holds no labels")
    if len(content) > 1:
        raise DataError(
            f"{where} holds several arrays; choose one with trainer.noise_key: {_listed(content)}"
        )
    return next(iter(content))


def _entry(content: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in content:
        near = did_you_mean(key, content)
        raise DataError(f"{where} has no entry {key!r}; its entries are: {_listed(content)}{near}")
    return content[key]


def _listed(content: Mapping[str, Any]) -> str:
    """List the first names in a file."""
    listed = ", ".join(one_line(name) for name in list(content)[:MOST_LISTED])
    if len(content) > MOST_LISTED:
        listed += f", ... ({len(content)} in all)"
    return listed


def _as_labels(values: Any, where: str, length: int, num_classes: int) -> np.ndarray:
    """Check labels and return them as int64 `(length,)`."""
    array = _as_array(values, where)
    # A matrix of one column
    if array.shape == (length, 1):
        array = array[:, 0]
    if array.shape != (length,):
        raise DataError(
            f"{where}: its shape is {array.shape}, expected ({length},), "
            "one label per training image"
        )
    if length and array.dtype.kind not in "iu":
        first = one_line(repr(array[:1].tolist()[0]), 40)
        raise DataError(f"{where}: expected integers, but it holds {first}")
    if length and (array.min() < 0 or array.max() >= num_classes):
        raise DataError(
            f"{where}: its labels range from {array.min()} to {array.max()}, "
            f"expected 0 to {num_classes - 1}"
        )
    return array.astype(np.int64)


def _as_array(values: Any, where: str) -> np.ndarray:
    try:
        if isinstance(values, torch.Tensor):
            return values.numpy()
        return np.asarray(values)
    except (ValueError, TypeError, RuntimeError, OverflowError):
        raise DataError(f"{where}: is not an array of integers") from None
