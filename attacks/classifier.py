"""Classifier: the model under attack, with its answers checked."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Model = nn.Module | Callable[[Tensor], Tensor]
"""What can be attacked: a module, or any function of images `(B, C, H, W)` in `[0, 1]` that returns
logits `(B, classes)`."""

SMALLEST_BATCH = 32
"""The smallest batch on a GPU: fewer images take about as long."""
SMALLER_BATCHES = 3
"""The number of sizes below that of the whole batch."""


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
            # Read now, so that no forward pass has to wait for the device; both in one read
            self.smallest, self.largest = torch.stack([labels.min(), labels.max()]).tolist()

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


class FilledClassifier(Classifier):
    """A classifier that fills batches up with copies of their last image.

    An attack that stops early has fewer images left in every step. A GPU prepares its algorithms
    for each batch size separately, so the model sees only a few sizes there; see `batch_sizes`. On
    the CPU it gets the images as they are.

    Args:
        model, labels: see `Classifier`; the whole batch has as many images as labels.
    """

    def __init__(self, model: Model, labels: Tensor) -> None:
        super().__init__(model, labels)
        self.sizes = batch_sizes(len(labels))

    def __call__(self, images: Tensor) -> Tensor:
        n = len(images)
        missing = self.filled_size(n, images.device) - n
        if missing <= 0:
            return super().__call__(images)
        # Detached, because the answers for the copies are dropped
        copies = images[-1:].detach().expand(missing, *images.shape[1:])
        return super().__call__(torch.cat([images, copies]))[:n]

    def filled_size(self, n: int, device: torch.device) -> int:
        """Return the size to which a batch of `n` images is filled up, or `n` if it is not."""
        # A batch without images has no last one
        if n == 0 or device.type == "cpu":
            return n
        return next((size for size in self.sizes if size >= n), n)


def batch_sizes(whole: int) -> list[int]:
    """Return the batch sizes of an attack on `whole` images on a GPU, the smallest first.

    These are `whole` itself and the largest powers of two below it, from `SMALLEST_BATCH` on: 32,
    64 and 128 for 128 images, and 64, 128, 256 and 512 for 512.
    """
    powers = [2**power for power in range((whole - 1).bit_length())] if whole > 1 else []
    large = [power for power in powers if power >= SMALLEST_BATCH]
    return [*large[-SMALLER_BATCHES:], whole]


@contextmanager
def without_benchmark() -> Iterator[None]:
    """Within the context, cuDNN chooses its algorithms without timing them.

    Timing them for every batch size of an attack would cost more time than it saves.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


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
