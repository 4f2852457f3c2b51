"""How well each class is recognised, and what it is taken for."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

CONFUSED = 10


def class_scores(labels: np.ndarray, predictions: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """Scores of every class, in plain values; all shares are fractions.

    Args:
        labels: int64 `(N,)`, N at least 1.
        predictions: int64 `(N,)`, the classes predicted; -1 where the model gave no answer (NaN logits), which is wrong.
        class_names: in label order; C of them.

    Returns:
        `n`; `without_answer`, how many images the model gave no answer for; `top1`; `macro_recall` and
        `macro_f1`, means over the classes that have images; `classes`, for each one `name`,
        `images`, `predicted` (how many images are given its name), `precision` (None where that is
        0), `recall` and `f1` (None where there are no images; without images but with predictions
        `f1` is 0); `confusion`, C lists of C counts, a row for each true class, a column for each
        prediction (images without an answer are in none); `confused`, the `CONFUSED` most frequent
        mistakes, the largest share of a class first, each with `label`, `predicted`, `images` and
        `share` of the label's images.
    """
    numbers = range(len(class_names))
    confusion = confusion_matrix(labels, predictions, labels=numbers)
    scores = precision_recall_fscore_support(labels, predictions, labels=numbers, zero_division=np.nan)
    precision, recall, f1, images = ([None if np.isnan(value) else value.item() for value in row] for row in scores)
    present = [number for number in numbers if images[number]]
    shares = confusion / np.maximum(np.array(images)[:, np.newaxis], 1)
    np.fill_diagonal(shares, 0)
    worst = [divmod(int(place), len(class_names)) for place in np.argsort(-shares, axis=None, kind="stable")[:CONFUSED]]
    return {
        "n": len(labels),
        "without_answer": int(np.sum(predictions < 0)),
        "top1": float(np.mean(labels == predictions)),
        "macro_recall": float(np.mean([recall[number] for number in present])),
        "macro_f1": float(np.mean([f1[number] for number in present])),
        "classes": [
            {
                "name": class_names[number],
                "images": images[number],
                "predicted": int(confusion[:, number].sum()),
                "precision": precision[number],
                "recall": recall[number],
                "f1": f1[number],
            }
            for number in numbers
        ],
        "confusion": confusion.tolist(),
        "confused": [
            {
                "label": class_names[label],
                "predicted": class_names[prediction],
                "images": int(confusion[label, prediction]),
                "share": float(shares[label, prediction]),
            }
            for label, prediction in worst
            if shares[label, prediction] > 0
        ],
    }
