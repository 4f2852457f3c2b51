"""Class scores as text: a table, a summary of one line, and warnings."""

from collections.abc import Mapping
from typing import Any, TypedDict

from base.text import one_line, text_table


class ClassRow(TypedDict):
    """The scores of one class; None if it has no images, or was never predicted."""

    name: str
    images: int
    predicted: int
    precision: float | None
    recall: float | None
    f1: float | None


class ConfusionRow(TypedDict):
    """How often images of one class were predicted as another."""

    label: str
    predicted: str
    images: int
    share: float


HEADS = ("class", "images", "predicted", "precision", "recall", "F1")


def class_table(scores: Mapping[str, Any]) -> str:
    """Write a line per class, and the most frequent confusions.

    Args:
        scores: as `evaluation.ClassScores.as_dict()` returns them.
    """
    classes: list[ClassRow] = scores["classes"]
    confused: list[ConfusionRow] = scores["confused"]
    rows = [
        [
            row["name"],
            str(row["images"]),
            str(row["predicted"]),
            _percent(row["precision"]),
            _percent(row["recall"]),
            _percent(row["f1"]),
        ]
        for row in classes
    ]
    mistakes = [
        f"{one_line(pair['label'])} taken for {one_line(pair['predicted'])}:"
        f" {pair['images']} images, {pair['share']:.1%} of the class"
        for pair in confused
    ]
    return "\n".join([text_table(HEADS, rows), *mistakes])


def class_summary(scores: Mapping[str, Any]) -> str:
    """Write the scores in one line."""
    return (
        f"{len(scores['classes'])} classes, {scores['n']} images: top-1 {scores['top1']:.2%}"
        f"  mean recall {scores['macro_recall']:.2%}  mean F1 {scores['macro_f1']:.2%}"
    )


def class_warnings(scores: Mapping[str, Any]) -> list[str]:
    """Return a line for everything that makes the scores doubtful."""
    missing = scores["without_answer"]
    n = scores["n"]
    if missing == 0:
        return []
    return [f"the logits of {missing} of {n} images are NaN: they count as wrong, in no column"]


def _percent(value: float | None) -> str:
    # None: a class without images has no recall, and one that is never predicted no precision
    if value is None:
        return "-"
    return f"{value:.2%}"
