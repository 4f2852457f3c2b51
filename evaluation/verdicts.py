"""Verdicts: the outcome for every attacked image, and the uncertainty of their share."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from attacks.attack import Attack

NONE = -1
"""The prediction of a model that returns NaN."""


@dataclass(frozen=True)
class Verdicts:
    """The outcome for every attacked image; all tensors `(N,)`, on the CPU.

    Attributes:
        position: the position of the image in its data set, int64.
        label: its class, int64.
        clean_prediction: the predicted class of the image, int64; `NONE` if a logit is NaN, which
            counts as wrong.
        prediction: the predicted class of the worst image found, int64; `NONE` likewise.
        clean_top1: whether the image is classified correctly, bool.
        robust_top1: whether it is classified correctly, also under attack, bool.
        robust_top5: whether its label is among the five largest logits, also under attack, bool. An
            attack whose `rank` is below 5 does not try to prevent that: then the value is False for
            every image and means nothing (with at most five classes only NaN gives False).
        perturbation: the size of the change in the attack's norm, in units of the pixel range; 0
            if no change was needed.
    """

    position: Tensor
    label: Tensor
    clean_prediction: Tensor
    prediction: Tensor
    clean_top1: Tensor
    robust_top1: Tensor
    robust_top5: Tensor
    perturbation: Tensor

    def __len__(self) -> int:
        return len(self.position)

    def accuracy(self, name: str) -> float:
        """Return the share of images for which the verdict `name` is True, in `[0, 1]`."""
        return float(getattr(self, name).double().mean())

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all columns as arrays, by name."""
        return {field.name: getattr(self, field.name).numpy() for field in fields(self)}

    @classmethod
    def empty(cls) -> "Verdicts":
        """Return the verdicts on no images."""
        numbers = torch.empty(0, dtype=torch.int64)
        truths = torch.empty(0, dtype=torch.bool)
        sizes = torch.empty(0, dtype=torch.float32)
        return cls(numbers, numbers, numbers, numbers, truths, truths, truths, sizes)

    @classmethod
    def joined(cls, parts: Sequence["Verdicts"]) -> "Verdicts":
        """Join the verdicts of several parts, in the order of the images' positions."""
        columns = {
            field.name: torch.cat([getattr(part, field.name) for part in parts])
            for field in fields(cls)
        }
        order = columns["position"].argsort()
        return cls(**{name: column[order] for name, column in columns.items()})


def known_verdicts(partial: Path | None) -> Verdicts:
    """Return the verdicts of an interrupted evaluation: no verdicts if their file is missing or
    damaged."""
    if partial is None:
        return Verdicts.empty()
    try:
        with np.load(partial) as file:
            return Verdicts(**{name: torch.from_numpy(file[name]) for name in file.files})
    # The errors of a missing file, and of the ways in which a damaged one can fail to load.
    except (OSError, ValueError, TypeError, KeyError, EOFError, BadZipFile):
        return Verdicts.empty()


def attack_rank(num_classes: int) -> int:
    """Return the `early_stop` with which the verdicts of an attack decide both top-1 and top-5
    accuracy: 5, or 1 if there are at most five classes."""
    # With five classes or fewer, every label is among the five largest logits whatever is found.
    if num_classes > 5:
        return 5
    return 1


def knows_top5(attack: Attack, num_classes: int) -> bool:
    """Return whether `robust_top5` has a meaning after this attack."""
    return attack.rank >= 5 or num_classes <= 5


def wilson_interval(count: int, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of the share `count / n` of independent images."""
    # Imported here: it takes most of a second, which other commands need not wait for
    from scipy.stats import binomtest

    low, high = binomtest(count, n).proportion_ci(confidence_level=0.95, method="wilson")
    return float(low), float(high)
