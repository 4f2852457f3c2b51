"""Classifier: a model as attacks ask it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Model = nn.Module | Callable[[Tensor], Tensor]
"""What can be attacked: a module, or any function of images `(B, C, H, W)` in `[0, 1]` that returns
logits `(B, classes)`."""


class Classifier:
    """A model that is asked with a copy of the images, as it may write into its input, and whose
    answers are checked.

    Args:
        model: a module or a function.
        labels: int64 `(B,)`, of all images that it will be asked about.

    Raises:
        TypeError: the model cannot be called. A call: it does not answer with a tensor.
        ValueError: a call: its answers are not logits of at least two classes for every image, or a
            label is none of them.
    """

    def __init__(self, model: Model, labels: Tensor) -> None:
        if not callable(model) or isinstance(model, type):
            found = (
                f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
            )
            raise TypeError(f"model: expected a module or a function of logits, not {found}")
        self.model = model
        # read now, so that no forward pass has to wait for the device
        self.smallest = int(labels.min()) if len(labels) else 0
        self.largest = int(labels.max()) if len(labels) else 0

    def __call__(self, images: Tensor) -> Tensor:
        logits = ask(self.model, images)
        classes = logits.shape[1]
        if self.smallest < 0 or self.largest >= classes:
            wrong = self.smallest if self.smallest < 0 else self.largest
            raise ValueError(
                f"labels: {wrong} is not one of the model's {classes} classes, 0 to {classes - 1}"
            )
        return logits


def ask(model: Model, images: Tensor) -> Tensor:
    """The model's logits `(B, classes)` for `images` `(B, C, H, W)`, of which it gets a copy.

    Raises:
        TypeError: it does not answer with a tensor of numbers.
        ValueError: its answer is of another shape, or of one class.
    """
    answer = model(images.clone())
    expected = "the model must return logits (B, classes)"
    if not isinstance(answer, Tensor):
        raise TypeError(f"{expected}, a tensor, not {_in_words(answer)}")
    if answer.dtype == torch.bool or answer.is_complex():
        raise TypeError(f"{expected}, real numbers, not {answer.dtype}")
    if answer.ndim != 2 or len(answer) != len(images):
        raise ValueError(f"{expected}, here ({len(images)}, classes), not {tuple(answer.shape)}")
    if answer.shape[1] < 2:
        raise ValueError(f"{expected} of at least 2 classes, not of {answer.shape[1]}")
    return answer


def _in_words(answer: Any) -> str:
    if isinstance(answer, dict):
        return f"a dict with the keys {', '.join(map(repr, answer))}: return one of its values"
    if isinstance(answer, tuple | list):
        return f"a {type(answer).__name__} of {len(answer)}: return one of its elements"
    return type(answer).__name__
