"""Classifier: the model under attack, with its answers checked."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Model = nn.Module | Callable[[Tensor], Tensor]
"""What can be attacked: a module, or any function of images `(B, C, H, W)` in `[0, 1]` that returns
logits `(B, classes)`."""


class Classifier:
    """A model that gets a copy of the images and whose answers are checked.

    Args:
        model: a module or a function.
        labels: int64 `(B,)`, of all images that the model will be called with.

    Raises:
        TypeError: the model cannot be called. A call raises it where the answer is not a tensor.
        ValueError: a call raises it where the answer is not logits of at least two classes for
            every image, or where a label is not one of the classes.
    """

    def __init__(self, model: Model, labels: Tensor) -> None:
        if isinstance(model, type):
            raise TypeError(
                f"model: expected a module or a function of logits, not the class {model.__name__}"
            )
        if not callable(model):
            raise TypeError(
                f"model: expected a module or a function of logits, not {type(model).__name__}"
            )
        self.model = model
        self.smallest = 0
        self.largest = 0
        if len(labels):
            # Read now, so that no forward pass has to wait for the device
            self.smallest = int(labels.min())
            self.largest = int(labels.max())

    def __call__(self, images: Tensor) -> Tensor:
        logits = checked_logits(self.model, images)
        classes = logits.shape[1]
        for label in (self.smallest, self.largest):
            if not 0 <= label < classes:
                raise ValueError(
                    f"labels: {label} is not one of the model's {classes} classes,"
                    f" 0 to {classes - 1}"
                )
        return logits


def checked_logits(model: Model, images: Tensor) -> Tensor:
    """Return the model's logits `(B, classes)` for `images` `(B, C, H, W)`.

    Raises:
        TypeError: the answer is not a tensor of numbers.
        ValueError: the answer has another shape, or only one class.
    """
    # A copy, as the model may write into its input
    answer = model(images.clone())
    expected = "the model must return logits (B, classes)"
    if not isinstance(answer, Tensor):
        raise TypeError(f"{expected}, a tensor, not {_describe(answer)}")
    if answer.dtype == torch.bool or answer.is_complex():
        raise TypeError(f"{expected}, real numbers, not {answer.dtype}")
    if answer.ndim != 2 or len(answer) != len(images):
        raise ValueError(f"{expected}, here ({len(images)}, classes), not {tuple(answer.shape)}")
    if answer.shape[1] < 2:
        raise ValueError(f"{expected} of at least 2 classes, not of {answer.shape[1]}")
    return answer


def _describe(answer: object) -> str:
    if isinstance(answer, dict):
        return f"a dict with the keys {', '.join(map(repr, answer))}: return one of its values"
    if isinstance(answer, tuple | list):
        return f"a {type(answer).__name__} of {len(answer)}: return one of its elements"
    return type(answer).__name__
