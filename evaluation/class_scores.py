"""Predictions of a model, and how well it recognizes each class."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from attacks.classifier import Classifier, Model
from attacks.frozen import frozen
from base.precision import full_precision
from evaluation.attack_batch import Autocast
from evaluation.batches import Batches, Data
from evaluation.verdicts import NONE

# The number of mistakes that are listed.
CONFUSED = 10


@dataclass(frozen=True)
class Predictions:
    """The predictions for every image, in the order of the data; all `(N,)`, on the CPU.

    Attributes:
        label: int64, the true class.
        prediction: int64, the class of the largest logit; `NONE` if a logit is NaN.
        confidence: float32, the softmax probability of that class; NaN if a logit is NaN.
    """

    label: Tensor
    prediction: Tensor
    confidence: Tensor

    def __len__(self) -> int:
        return len(self.label)


@dataclass(frozen=True)
class ClassScore:
    """How well one class is recognized; all scores are in `[0, 1]`.

    Attributes:
        name: the name of the class.
        images: the number of its images.
        predicted: the number of images that are predicted to be of this class.
        precision: the share of the predicted images that are of the class; None if there are none.
        recall: the share of the class's images that are predicted; None if it has none.
        f1: the harmonic mean of precision and recall; None if the class has no images and is never
            predicted, 0 if it has none and is predicted.
    """

    name: str
    images: int
    predicted: int
    precision: float | None
    recall: float | None
    f1: float | None


@dataclass(frozen=True)
class Confusion:
    """A mistake and its frequency.

    Attributes:
        label: the name of the true class.
        predicted: the name of the class predicted.
        images: the number of images of class `label` that are predicted as `predicted`.
        share: the same as a share of the images of class `label`.
    """

    label: str
    predicted: str
    images: int
    share: float


@dataclass(frozen=True)
class ClassScores:
    """The scores of every class.

    Attributes:
        n: the number of images.
        without_answer: the number of images for which the model returned NaN.
        top1: accuracy.
        macro_recall, macro_f1: means over the classes that have images.
        classes: one for each class, in label order.
        confusion: a row for each true class, a column for each prediction; images without an
            answer are not counted.
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
        """Return plain values, for JSON."""
        values = asdict(self)
        values["classes"] = list(values["classes"])
        values["confused"] = list(values["confused"])
        values["confusion"] = [list(row) for row in self.confusion]
        return values


@full_precision()
@torch.no_grad()
def predict(
    model: Model,
    data: Data,
    *,
    autocast: Autocast = nullcontext,
) -> Predictions:
    """Return the predictions of a model, in evaluation mode, for every image.

    Args:
        model, data: see `robust_accuracy`.
        autocast: the context of the forward passes.

    Raises:
        TypeError, ValueError: see `robust_accuracy`.
    """
    batches = Batches(data, model)
    labels, predictions, confidences = [], [], []
    with frozen(model, training=False):
        for batch in tqdm(
            batches, desc="predicting", total=batches.count(), disable=None, leave=False
        ):
            with autocast():
                logits = Classifier(model, batch.labels)(batch.images).float()
            # argmax of NaN is a class like any other
            no_answer = logits.isnan().any(dim=1)
            confidence, prediction = logits.softmax(dim=1).max(dim=1)
            labels.append(batch.labels.cpu())
            predictions.append(prediction.masked_fill(no_answer, NONE).cpu())
            confidences.append(confidence.masked_fill(no_answer, float("nan")).cpu())
    return Predictions(torch.cat(labels), torch.cat(predictions), torch.cat(confidences))


def class_scores(
    labels: Sequence[int] | np.ndarray | Tensor,
    predictions: Sequence[int] | np.ndarray | Tensor,
    class_names: Sequence[str],
) -> ClassScores:
    """Return the scores of every class.

    Args:
        labels: integers `(N,)`, N at least 1.
        predictions: integers `(N,)`, the classes predicted; -1 if the model gave no answer, which
            is wrong.
        class_names: in label order.

    Raises:
        ValueError: labels and predictions are not equally many, or are not classes.
    """
    # Imported here: it takes a second, which other commands need not wait for
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    labels = np.asarray(labels)
    predictions = np.asarray(predictions)
    numbers = range(len(class_names))
    if labels.ndim != 1 or labels.shape != predictions.shape or len(labels) == 0:
        raise ValueError(
            "labels and predictions: expected as many of each, at least one, not the shapes"
            f" {labels.shape} and {predictions.shape}"
        )
    for name, values, smallest in (("labels", labels, 0), ("predictions", predictions, NONE)):
        for value in (values.min(), values.max()):
            if not smallest <= value < len(class_names):
                raise ValueError(
                    f"{name}: {value} is not one of the {len(class_names)} classes of class_names"
                )
    confusion = confusion_matrix(labels, predictions, labels=numbers)
    scores = precision_recall_fscore_support(
        labels, predictions, labels=numbers, zero_division=np.nan
    )
    precision, recall, f1, images = ([_number(value) for value in row] for row in scores)
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


def _number(value: np.generic) -> float | int | None:
    """Return a score as a plain number; None for NaN, which JSON cannot hold."""
    if np.isnan(value):
        return None
    return value.item()


def _most_confused(
    confusion: np.ndarray, images: np.ndarray, class_names: Sequence[str]
) -> tuple[Confusion, ...]:
    # A class without images has no mistakes: any divisor will do
    shares = confusion / np.maximum(images[:, np.newaxis], 1)
    np.fill_diagonal(shares, 0)
    # Stable: equal shares keep the order of the classes on every platform
    largest = np.argsort(-shares, axis=None, kind="stable")[:CONFUSED]
    pairs = [divmod(int(index), len(class_names)) for index in largest]
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
