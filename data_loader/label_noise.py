"""Wrong training labels on purpose: symmetric, asymmetric, or read from a file, and what they
really amount to.

Every law is computed from the clean labels, never from labels that are already noisy.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from base.errors import DataError


@dataclass(frozen=True)
class LabelNoise:
    """What is asked for.

    Attributes:
        kind: `"none"`, `"sym"`, `"asym"` or `"file"`.
        percent: share of the labels that the law picks, in `[0, 1]` despite its name; a file brings
            its own.
        law: of symmetric noise. `"inclusive"` draws the new label from all classes, the true one
            too, as the published numbers do: of K classes, (K - 1) / K of the picked labels change.
            `"exclusive"` draws from the other classes.
        file: path of a label file, for `kind` `"file"`.
        key: which of the file's entries to take, where it holds several.
        on_validation: whether validation labels get the same noise, from a draw of their own.
    """

    kind: Literal["none", "sym", "asym", "file"] = "none"
    percent: float = 0.0
    law: Literal["inclusive", "exclusive"] = "inclusive"
    file: str | None = None
    key: str | None = None
    on_validation: bool = True

    @property
    def active(self) -> bool:
        """Whether labels may change at all."""
        return self.kind == "file" or (self.kind in ("sym", "asym") and self.percent > 0)


CLEAN = LabelNoise()

LARGEST_DIFFERENCE = 0.1
"""By which share of the rate asked for the realized one may differ from it without a warning."""

CIFAR10_FLIPS = {
    "truck": "automobile",
    "bird": "airplane",
    "cat": "dog",
    "dog": "cat",
    "deer": "horse",
}
CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)

CIFAR100_SUPERCLASSES = (
    ("beaver", "dolphin", "otter", "seal", "whale"),
    ("aquarium_fish", "flatfish", "ray", "shark", "trout"),
    ("orchid", "poppy", "rose", "sunflower", "tulip"),
    ("bottle", "bowl", "can", "cup", "plate"),
    ("apple", "mushroom", "orange", "pear", "sweet_pepper"),
    ("clock", "keyboard", "lamp", "telephone", "television"),
    ("bed", "chair", "couch", "table", "wardrobe"),
    ("bee", "beetle", "butterfly", "caterpillar", "cockroach"),
    ("bear", "leopard", "lion", "tiger", "wolf"),
    ("bridge", "castle", "house", "road", "skyscraper"),
    ("cloud", "forest", "mountain", "plain", "sea"),
    ("camel", "cattle", "chimpanzee", "elephant", "kangaroo"),
    ("fox", "porcupine", "possum", "raccoon", "skunk"),
    ("crab", "lobster", "snail", "spider", "worm"),
    ("baby", "boy", "girl", "man", "woman"),
    ("crocodile", "dinosaur", "lizard", "snake", "turtle"),
    ("hamster", "mouse", "rabbit", "shrew", "squirrel"),
    ("maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"),
    ("bicycle", "bus", "motorcycle", "pickup_truck", "train"),
    ("lawn_mower", "rocket", "streetcar", "tank", "tractor"),
)
"""The 20 superclasses of CIFAR-100, five classes each in the order of their numbers (which is
alphabetical)."""

CIFAR100_FLIPS = {
    name: group[(place + 1) % len(group)]
    for group in CIFAR100_SUPERCLASSES
    for place, name in enumerate(group)
}


def symmetric_noise(
    labels: np.ndarray, num_classes: int, percent: float, law: str, generator: np.random.Generator
) -> np.ndarray:
    """Pick ceil(percent * n) labels over the whole split and draw each anew.

    Args:
        labels: int64 `(n,)` clean labels in `[0, num_classes)`.
        num_classes: K, at least 2.
        percent: in `[0, 1]`.
        law: `"inclusive"`: uniform over all K classes; `"exclusive"`: uniform over the K - 1 wrong
            ones.
        generator: picks the labels and draws the new ones.

    Returns:
        int64 `(n,)`; `labels` is left alone.
    """
    noisy = labels.copy()
    picked = generator.permutation(len(labels))[: _ceil(percent * len(labels))]
    if law == "inclusive":
        noisy[picked] = generator.integers(0, num_classes, len(picked))
    else:
        noisy[picked] = (
            labels[picked] + generator.integers(1, num_classes, len(picked))
        ) % num_classes
    return noisy


def asymmetric_noise(
    labels: np.ndarray, class_names: Sequence[str], percent: float, generator: np.random.Generator
) -> np.ndarray:
    """Turn ceil(percent * n_class) labels of every source class into the class it is mistaken for.

    CIFAR-10: truck -> automobile, bird -> airplane, deer -> horse, cat -> dog and dog -> cat; other
    classes stay clean. CIFAR-100: every class -> the next one of its superclass, cyclically. Both
    apply to any data set with exactly these class names, in whatever order. ConvNorm rewrites
    labels in place, so that some cats become dogs and then cats again, and goes round blocks of
    five class numbers, which are no superclasses; neither is copied here.

    Args:
        labels: int64 `(n,)` clean labels.
        class_names: the classes' names in label order.
        percent: in `[0, 1]`.
        generator: picks the labels.

    Raises:
        DataError: there is no law for these classes.
    """
    number = {name: label for label, name in enumerate(class_names)}
    noisy = labels.copy()
    for source, target in _flips(class_names).items():
        members = generator.permutation(np.flatnonzero(labels == number[source]))
        noisy[members[: _ceil(percent * len(members))]] = number[target]
    return noisy


def apply_noise(
    labels: np.ndarray,
    class_names: Sequence[str],
    noise: LabelNoise,
    generator: np.random.Generator,
) -> np.ndarray:
    """The noisy labels of one split for `kind` `"sym"` or `"asym"`; a copy of `labels` for
    `"none"`."""
    if not noise.active:
        return labels.copy()
    if noise.kind == "sym":
        return symmetric_noise(labels, len(class_names), noise.percent, noise.law, generator)
    return asymmetric_noise(labels, class_names, noise.percent, generator)


def transition_matrix(clean: np.ndarray, noisy: np.ndarray, num_classes: int) -> np.ndarray:
    """float64 `(K, K)`: entry (i, j) is the share of the images of class i that are labeled j.

    Rows sum to 1; the row of a class without images is all 0.
    """
    counts = np.zeros((num_classes, num_classes))
    np.add.at(counts, (clean, noisy), 1)
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def describe_transitions(matrix: np.ndarray, class_names: Sequence[str]) -> list[str]:
    """A line per class that says what its labels became, most frequent first: `cat -> cat 60.0%,
    dog 40.0%`."""
    lines = []
    for name, row in zip(class_names, matrix, strict=True):
        targets = [
            f"{class_names[target]} {row[target]:.1%}"
            for target in np.argsort(-row, kind="stable")
            if row[target] > 0
        ]
        lines.append(f"{name} -> {', '.join(targets)}")
    return lines


def realized_rate(clean: np.ndarray, noisy: np.ndarray) -> float:
    """The share of labels that differ, in `[0, 1]`."""
    return float(np.mean(clean != noisy)) if len(clean) else 0.0


def explain_rate(noise: LabelNoise, class_names: Sequence[str], rate: float) -> str | None:
    """Why the realized rate differs from the one asked for by more than `LARGEST_DIFFERENCE`.

    Args:
        noise: what was asked for.
        class_names: in label order.
        rate: the share of training labels that have changed, in `[0, 1]`.

    Returns:
        One line; None where it does not differ that much, and for a file.
    """
    near = abs(rate - noise.percent) <= LARGEST_DIFFERENCE * noise.percent
    if noise.kind not in ("sym", "asym") or near:
        return None
    asked = (
        f"trainer.percent asks for {noise.percent:.4g}, "
        f"{rate:.4g} of the training labels have changed"
    )
    if noise.kind == "sym" and noise.law == "inclusive":
        return (
            f"{asked}: a new label may be the true one (trainer.noise_law: inclusive); "
            "with trainer.noise_law: exclusive it never is"
        )
    if noise.kind == "asym" and len(_flips(class_names)) < len(class_names):
        flips = len(_flips(class_names))
        return f"{asked}: the law changes labels of {flips} of the {len(class_names)} classes only"
    return f"{asked}: there are too few of them"


def _flips(class_names: Sequence[str]) -> dict[str, str]:
    names = set(class_names)
    if names == set(CIFAR10_CLASSES):
        return CIFAR10_FLIPS
    if names == set(CIFAR100_FLIPS):
        return CIFAR100_FLIPS
    shown = ", ".join(class_names[:5]) + (", ..." if len(class_names) > 5 else "")
    raise DataError(
        f"trainer.asym: no asymmetric law for classes {shown}; there is one for the classes of CIFAR-10 and of CIFAR-100"
    )


def _ceil(value: float) -> int:
    # 0.55 * 100 is a little more than 55 in floating point; nobody who asks for 55 % of 100 labels
    # means 56.
    return math.ceil(round(value, 6))
