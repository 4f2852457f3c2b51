"""What a model predicts for each image, how well each class is recognized, and what it is taken
for."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from attacks.attack import frozen
from attacks.classifier import Model
from evaluation.batches import device_of

CONFUSED = 10
"""The most frequent mistakes that are listed."""
NONE = -1
"""The class predicted by a model that answers NaN."""


@dataclass(frozen=True)
class Predictions:
    """What a model says about every image, in the order of the data; all `(N,)`, on the CPU.

    Attributes:
        label: int64, the true class.
        prediction: int64, the class of the largest logit; `NONE` where a logit is NaN.
        confidence: float32, the softmax probability of that class; NaN where a logit is NaN.
    """

    label: Tensor
    prediction: Tensor
    confidence: Tensor

    def __len__(self) -> int:
        return len(self.label)


@dataclass(frozen=True)
class ClassScore:
    """How well one class is recognized; all shares are fractions.

    Attributes:
        name: of the class.
        images: how many it has.
        predicted: how many images are given its name.
        precision: None where `predicted` is 0.
        recall: None where there are no images.
        f1: None where there are no images; 0 where there are none but some are given its name.
    """

    name: str
    images: int
    predicted: int
    precision: float | None
    recall: float | None
    f1: float | None


@dataclass(frozen=True)
class Confusion:
    """A mistake and how often it is made.

    Attributes:
        label: the name of the true class.
        predicted: the name of the class that it is taken for.
        images: how many of its images are.
        share: of all its images.
    """

    label: str
    predicted: str
    images: int
    share: float


@dataclass(frozen=True)
class ClassScores:
    """The scores of every class.

    Attributes:
        n: images.
        without_answer: for how many of them the model gave no answer.
        top1: accuracy.
        macro_recall, macro_f1: means over the classes that have images.
        classes: one for each class, in label order.
        confusion: a row for each true class, a column for each prediction; images without an
            answer are in none.
        confused: the `CONFUSED` most frequent mistakes, the largest share of a class first.
    """

    n: int
    without_answer: int
    top1: float
    macro_recall: float
    macro_f1: float
    classes: tuple[ClassScore, ...]
    confusion: tuple[tuple[int, ...], ...]
    confused: tuple[Confusion, ...]

    def as_dict(self) -> dict[str, Any]:
        """All of it in plain values, for JSON."""
        values = asdict(self)
        for name in ("classes", "confused"):
            values[name] = list(values[name])
        values["confusion"] = [list(row) for row in self.confusion]
        return values


@torch.no_grad()
def predict(
    model: Model,
    data: Iterable[tuple[Tensor, Tensor]],
    *,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> Predictions:
    """What a model, in evaluation mode, says about every image.

    Args:
        model: a module or function that maps images in `[0, 1]` to logits.
        data: batches of images `(B, C, H, W)`, which are moved to the model's device, and labels
            `(B,)`, at least one; a `torch.utils.data.DataLoader`, for one.
        autocast: context of the forward passes.
    """
    device = device_of(model)
    labels, predictions, confidences = [], [], []
    with frozen(model, training=False):
        for images, truth in tqdm(data, desc="predicting", disable=None, leave=False):
            if device is not None:
                images = images.to(device)
            with autocast():
                logits = model(images).float()
            no_answer = logits.isnan().any(dim=1)
            confidence, prediction = logits.softmax(dim=1).max(dim=1)
            labels.append(truth.cpu())
            predictions.append(prediction.masked_fill(no_answer, NONE).cpu())
            confidences.append(confidence.masked_fill(no_answer, float("nan")).cpu())
    return Predictions(torch.cat(labels), torch.cat(predictions), torch.cat(confidences))


def class_scores(
    labels: Sequence[int] | np.ndarray | Tensor,
    predictions: Sequence[int] | np.ndarray | Tensor,
    class_names: Sequence[str],
) -> ClassScores:
    """The scores of every class.

    Args:
        labels: integers `(N,)`, N at least 1.
        predictions: integers `(N,)`, the classes predicted; -1 where the model gave no answer,
            which is wrong.
        class_names: in label order.
    """
    # here and not above: it takes a second to import
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    labels, predictions = np.asarray(labels), np.asarray(predictions)
    numbers = range(len(class_names))
    confusion = confusion_matrix(labels, predictions, labels=numbers)
    scores = precision_recall_fscore_support(
        labels, predictions, labels=numbers, zero_division=np.nan
    )
    precision, recall, f1, images = (
        [None if np.isnan(value) else value.item() for value in row] for row in scores
    )
    present = [number for number in numbers if images[number]]
    return ClassScores(
        n=len(labels),
        without_answer=int(np.sum(predictions < 0)),
        top1=float(np.mean(labels == predictions)),
        macro_recall=float(np.mean([recall[number] for number in present])),
        macro_f1=float(np.mean([f1[number] for number in present])),
        classes=tuple(
            ClassScore(
                name=class_names[number],
                images=images[number],
                predicted=int(confusion[:, number].sum()),
                precision=precision[number],
                recall=recall[number],
                f1=f1[number],
            )
            for number in numbers
        ),
        confusion=tuple(tuple(row) for row in confusion.tolist()),
        confused=_most_confused(confusion, np.array(images), class_names),
    )


def _most_confused(
    confusion: np.ndarray, images: np.ndarray, class_names: Sequence[str]
) -> tuple[Confusion, ...]:
    shares = confusion / np.maximum(images[:, np.newaxis], 1)
    np.fill_diagonal(shares, 0)
    places = np.argsort(-shares, axis=None, kind="stable")[:CONFUSED]
    pairs = [divmod(int(place), len(class_names)) for place in places]
    return tuple(
        Confusion(
            label=class_names[label],
            predicted=class_names[prediction],
            images=int(confusion[label, prediction]),
            share=float(shares[label, prediction]),
        )
        for label, prediction in pairs
        if shares[label, prediction] > 0
    )
