"""Verdicts: what became of every attacked image, and how sure their share is."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import sqrt
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from attacks.attack import Attack

Z = 1.959964
"""Standard deviations on both sides that hold 95 % of the normal distribution."""

NONE = -1
"""Prediction of a model that answers NaN."""


@dataclass(frozen=True)
class Verdicts:
    """What became of every attacked image; all tensors `(N,)`, on the CPU.

    Attributes:
        position: of the image in its data set.
        label: its class.
        clean_prediction: the predicted class of the image; `NONE` where a logit is NaN, which
            counts as wrong.
        prediction: the predicted class of the worst image found; `NONE` likewise.
        clean_top1: whether the image is classified correctly.
        robust_top1: whether it is, and stays so under attack.
        robust_top5: whether its label is among the five largest logits, and stays so under attack.
            Where the attack's `rank` is below 5 it did not try to prevent that, and nothing can be
            said: then it is False everywhere and not to be read (unless there are no more than five
            classes, when it is always true).
        perturbation: size of the change in the attack's norm, in units of the pixel range; 0 where
            none was needed.
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
        """The share of images for which the verdict `name` is true."""
        return float(getattr(self, name).double().mean())

    def arrays(self) -> dict[str, np.ndarray]:
        """All columns, for a file."""
        return {field.name: getattr(self, field.name).numpy() for field in fields(self)}

    @classmethod
    def joined(cls, parts: Sequence["Verdicts"]) -> "Verdicts":
        """All images of all parts, in the order of their positions."""
        columns = {
            field.name: torch.cat([getattr(part, field.name) for part in parts])
            for field in fields(cls)
        }
        order = columns["position"].argsort()
        return cls(**{name: column[order] for name, column in columns.items()})


def known_verdicts(partial: Path | None) -> Verdicts | None:
    """What an interrupted evaluation has left; None where it has left nothing, or a file that is
    damaged."""
    try:
        with np.load(partial or "") as file:
            return Verdicts(**{name: torch.from_numpy(file[name]) for name in file.files})
    except (OSError, ValueError, TypeError, KeyError, EOFError, BadZipFile):
        return None


def attack_rank(num_classes: int) -> int:
    """The rank that an attack has to push the label out of, so that its verdicts decide top-1 and,
    with more than five classes, top-5 accuracy: 5 or 1."""
    # With five classes or fewer, every label is among the five largest logits whatever is found.
    if num_classes > 5:
        return 5
    return 1


def knows_top5(attack: Attack, num_classes: int) -> bool:
    """Whether `robust_top5` can be read after this attack."""
    return attack.rank >= 5 or num_classes <= 5


def interval(share: float, n: int, z: float = Z) -> tuple[float, float]:
    """The Wilson score interval of a share of `n` independent images, at 95 % by default."""
    center = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, center - half), min(1.0, center + half)
