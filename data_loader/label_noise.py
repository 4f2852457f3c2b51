"""Label noise: labels that are corrupted on purpose, and how many of them changed.

In the path read -> split -> subset -> noise -> batch -> augment, this is the noise.
`training_data_loader` applies it to the labels of one split: the subset that is trained on, or the
validation part. `noise_file` reads labels from a file instead.

Let y be the clean label of an image, K the number of classes and p the rate, `percent`. The
asymmetric and the exclusive law are those of Patrini et al., "Making Deep Neural Networks Robust to
Label Noise" (CVPR 2017). The inclusive law, the default, is that of ConvNorm (Liu et al.,
"Convolutional Normalization", NeurIPS 2021):

    symmetric, inclusive:   P(j | y) = (1 - p) [j = y] + p / K
    symmetric, exclusive:   P(j | y) = (1 - p) [j = y] + p / (K - 1) [j != y]
    asymmetric:             P(j | y) = (1 - p) [j = y] + p [j = flip(y)]

As in ConvNorm for CIFAR-10, the number of labels that are picked is not random: ceil(p n) of the n
labels of a split for symmetric noise, and ceil(p n_y) of every class that is flipped for asymmetric
noise. Every law is computed from the clean labels, never from labels that are already noisy.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from base.errors import DataError


@dataclass(frozen=True)
class LabelNoise:
    """The label noise that a config requests.

    Attributes:
        kind: `"none"`, `"sym"`, `"asym"` or `"file"`.
        percent: the rate p, the fraction of labels that the law picks. It is in `[0, 1]` despite
            its name, which is ConvNorm's. A picked label need not change, see `law`. Without effect
            for a file.
        law: for symmetric noise. `"inclusive"` draws the new label from all K classes, including
            the clean one, as for the published numbers: (K - 1) / K of the picked labels change.
            `"exclusive"` draws from the other K - 1 classes, so that all picked labels change.
        file: path of a label file, for the kind `"file"`.
        key: the entry of the file to take, if it holds several.
        on_validation: whether validation labels get the same noise, drawn independently.
    """

    kind: Literal["none", "sym", "asym", "file"] = "none"
    percent: float = 0.0
    law: Literal["inclusive", "exclusive"] = "inclusive"
    file: str | None = None
    key: str | None = None
    on_validation: bool = True

    @property
    def active(self) -> bool:
        """Whether any label may change."""
        if self.kind == "file":
            return True
        return self.kind != "none" and self.percent > 0


CLEAN = LabelNoise()

LARGEST_DIFFERENCE = 0.1
"""The realized rate may differ from `percent` by this fraction of it without a warning."""

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
"""The 20 superclasses of CIFAR-100, each with its five classes in the order of their numbers, which
is alphabetical."""

# As in Patrini et al.'s paper: to the next class of the superclass, and from the last to the first
CIFAR100_FLIPS = {
    name: superclass[(place + 1) % len(superclass)]
    for superclass in CIFAR100_SUPERCLASSES
    for place, name in enumerate(superclass)
}


def symmetric_noise(
    labels: np.ndarray, num_classes: int, percent: float, law: str, generator: np.random.Generator
) -> np.ndarray:
    """Pick ceil(percent * n) labels of the whole split and replace each by a random one.

    Args:
        labels: int64 `(n,)` clean labels in `[0, num_classes)`.
        num_classes: K, at least 2.
        percent: the fraction of labels to pick, in `[0, 1]`.
        law: `"inclusive"` draws uniformly from all K classes, `"exclusive"` from the K - 1 wrong
            ones.
        generator: picks the labels and draws the new ones.

    Returns:
        int64 `(n,)`, a copy.
    """
    noisy = labels.copy()
    picked = generator.permutation(len(labels))[: _ceil(percent * len(labels))]
    if law == "inclusive":
        noisy[picked] = generator.integers(0, num_classes, len(picked))
    else:
        # A shift by 1 ... K - 1 reaches every class but the clean one
        shift = generator.integers(1, num_classes, len(picked))
        noisy[picked] = (labels[picked] + shift) % num_classes
    return noisy


def asymmetric_noise(
    labels: np.ndarray, class_names: Sequence[str], percent: float, generator: np.random.Generator
) -> np.ndarray:
    """Flip ceil(percent * n_class) labels of every source class to the class it is mistaken for.

    The flips are those of Patrini et al. CIFAR-10: truck -> automobile, bird -> airplane,
    deer -> horse, cat <-> dog; the other classes stay clean. CIFAR-100: every class -> the next one
    of its superclass, cyclically. Both apply to any data set with exactly these class names, in any
    order.

    Args:
        labels: int64 `(n,)` clean labels.
        class_names: the classes' names in label order.
        percent: the fraction of each source class to flip, in `[0, 1]`.
        generator: picks the labels.

    Returns:
        int64 `(n,)`, a copy.

    Raises:
        DataError: the law does not cover these classes.
    """
    # ConvNorm's code rewrites labels in place, so that some cats become dogs and then cats again,
    # and cycles through blocks of five class numbers, which are not CIFAR-100's superclasses.
    # Neither is copied here.
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
    """Return the noisy labels of one split.

    Args:
        labels: int64 `(n,)` clean labels.
        class_names: the classes' names in label order.
        noise: of the kind `"sym"`, `"asym"` or `"none"`.
        generator: picks the labels and draws the new ones.
    """
    if not noise.active:
        return labels.copy()
    if noise.kind == "sym":
        return symmetric_noise(labels, len(class_names), noise.percent, noise.law, generator)
    return asymmetric_noise(labels, class_names, noise.percent, generator)


def transition_matrix(clean: np.ndarray, noisy: np.ndarray, num_classes: int) -> np.ndarray:
    """Return float64 `(K, K)`: entry (i, j) is the fraction of images of class i with the label j.

    Rows sum to 1; the row of a class without images is 0.
    """
    counts = np.zeros((num_classes, num_classes))
    # `counts[clean, noisy] += 1` would count repeated pairs once
    np.add.at(counts, (clean, noisy), 1)
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def describe_transitions(matrix: np.ndarray, class_names: Sequence[str]) -> list[str]:
    """Write a line per class with the labels it received, most frequent first, such as
    `cat -> cat 60.0%, dog 40.0%`."""
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
    """Return the fraction of labels that differ, in `[0, 1]`; 0 without labels."""
    if len(clean) == 0:
        return 0.0
    return float(np.mean(clean != noisy))


def explain_rate(noise: LabelNoise, class_names: Sequence[str], rate: float) -> str | None:
    """Explain why the realized rate differs from `percent` by more than `LARGEST_DIFFERENCE`.

    Args:
        noise: the noise that the config requests.
        class_names: the classes' names in label order.
        rate: the fraction of training labels that changed, in `[0, 1]`.

    Returns:
        One line; None for a smaller difference, and for a file.
    """
    near = abs(rate - noise.percent) <= LARGEST_DIFFERENCE * noise.percent
    if noise.kind not in ("sym", "asym") or near:
        return None
    difference = (
        f"trainer.percent is {noise.percent:.4g},"
        f" but {rate:.4g} of the training labels have changed"
    )
    if noise.kind == "sym" and noise.law == "inclusive":
        return (
            f"{difference}: a new label may be the true one (trainer.noise_law: inclusive);"
            " with trainer.noise_law: exclusive it never is"
        )
    if noise.kind == "asym":
        flips = len(_flips(class_names))
        classes = len(class_names)
        if flips < classes:
            return f"{difference}: the law changes labels of {flips} of the {classes} classes only"
    return f"{difference}: there are too few labels for this rate"


def _flips(class_names: Sequence[str]) -> dict[str, str]:
    names = set(class_names)
    if names == set(CIFAR10_CLASSES):
        return CIFAR10_FLIPS
    if names == set(CIFAR100_FLIPS):
        return CIFAR100_FLIPS
    shown = ", ".join(class_names[:5])
    if len(class_names) > 5:
        shown += ", ..."
    raise DataError(
        f"trainer.asym: asymmetric noise is not defined for the classes {shown};"
        " it is for those of CIFAR-10 and of CIFAR-100"
    )


def _ceil(value: float) -> int:
    # 0.55 * 100 is a little more than 55 in floating point, and 55 % of 100 labels are not 56.
    return math.ceil(round(value, 6))
