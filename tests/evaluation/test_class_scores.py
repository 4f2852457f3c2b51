"""Class scores, compared with counts by hand."""

import numpy as np
import pytest

from evaluation.class_scores import class_scores
from reports.class_table import class_summary, class_table, class_warnings

NAMES = ("cat", "dog", "frog", "ship")
LABELS = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
PREDICTIONS = np.array([0, 0, 0, 1, 1, 0, 0, 3, 3, 3])


def test_every_number_by_hand():
    scores = class_scores(LABELS, PREDICTIONS, NAMES).as_dict()
    assert scores["confusion"] == [[3, 1, 0, 0], [2, 1, 0, 0], [0, 0, 0, 3], [0, 0, 0, 0]]
    cat, dog, frog, ship = scores["classes"]
    assert cat == {
        "name": "cat",
        "images": 4,
        "predicted": 5,
        "precision": 0.6,
        "recall": 0.75,
        "f1": pytest.approx(2 / 3),
    }
    assert dog == {
        "name": "dog",
        "images": 3,
        "predicted": 2,
        "precision": 0.5,
        "recall": pytest.approx(1 / 3),
        "f1": 0.4,
    }
    assert frog == {
        "name": "frog",
        "images": 3,
        "predicted": 0,
        "precision": None,
        "recall": 0,
        "f1": 0,
    }
    assert ship == {
        "name": "ship",
        "images": 0,
        "predicted": 3,
        "precision": 0,
        "recall": None,
        "f1": 0,
    }
    assert (scores["n"], scores["top1"]) == (10, 0.4)
    assert scores["macro_recall"] == pytest.approx((0.75 + 1 / 3 + 0) / 3)
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 0.4 + 0) / 3)
    assert [
        (entry["label"], entry["predicted"], entry["images"]) for entry in scores["confused"]
    ] == [
        ("frog", "ship", 3),
        ("dog", "cat", 2),
        ("cat", "dog", 1),
    ]
    assert [entry["share"] for entry in scores["confused"]] == pytest.approx([1, 2 / 3, 0.25])


def test_a_class_without_images_or_predictions_has_no_scores():
    scores = class_scores(np.array([0, 1]), np.array([0, 1]), ("a", "b", "c")).as_dict()
    assert scores["classes"][2] == {
        "name": "c",
        "images": 0,
        "predicted": 0,
        "precision": None,
        "recall": None,
        "f1": None,
    }
    assert (scores["macro_recall"], scores["macro_f1"], scores["confused"]) == (1, 1, [])


@pytest.mark.parametrize(
    ("labels", "predictions", "message"),
    [
        ([0, 4], [0, 0], "^labels: 4 is not one of the 4 classes of class_names$"),
        ([0, -1], [0, 0], "^labels: -1 is not one of the 4 classes of class_names$"),
        ([0, 1], [0, 7], "^predictions: 7 is not one of the 4 classes"),
        ([0, 1], [0, -2], "^predictions: -2 is not one of the 4 classes"),
        ([0, 1], [0], r"^labels and predictions: .* the shapes \(2,\) and \(1,\)$"),
        ([], [], "^labels and predictions: expected as many of each, at least one"),
    ],
)
def test_labels_that_are_no_classes_are_an_error_of_one_line(labels, predictions, message):
    with pytest.raises(ValueError, match=message):
        class_scores(labels, predictions, NAMES)


def test_the_table_is_aligned_and_shows_what_is_missing():
    scores = class_scores(LABELS, PREDICTIONS, NAMES).as_dict()
    lines = class_table(scores).splitlines()
    assert lines[0].split() == ["class", "images", "predicted", "precision", "recall", "F1"]
    assert lines[1].split() == ["cat", "4", "5", "60.00%", "75.00%", "66.67%"]
    assert lines[3].split() == ["frog", "3", "0", "-", "0.00%", "0.00%"]
    assert len({len(line) for line in lines[:5]}) == 1
    assert lines[5] == "frog taken for ship: 3 images, 100.0% of the class"
    assert (
        class_summary(scores)
        == "4 classes, 10 images: top-1 40.00%  mean recall 36.11%  mean F1 35.56%"
    )


def test_images_without_an_answer_are_wrong_and_in_no_column():
    predictions = PREDICTIONS.copy()
    predictions[[0, 7]] = -1
    scores = class_scores(LABELS, predictions, NAMES).as_dict()
    assert scores["confusion"] == [[2, 1, 0, 0], [2, 1, 0, 0], [0, 0, 0, 2], [0, 0, 0, 0]]
    assert (scores["n"], scores["top1"], scores["without_answer"]) == (10, 0.3, 2)
    assert [entry["recall"] for entry in scores["classes"]] == [0.5, pytest.approx(1 / 3), 0, None]
    assert scores["confused"][0] == {
        "label": "dog",
        "predicted": "cat",
        "images": 2,
        "share": pytest.approx(2 / 3),
    }
    assert scores["confused"][1]["share"] == pytest.approx(2 / 3), "of all images of the class"
    assert class_warnings(scores) == [
        "the logits of 2 of 10 images are NaN: they count as wrong, in no column"
    ]
    assert class_warnings(class_scores(LABELS, PREDICTIONS, NAMES).as_dict()) == []
    silent = class_scores(LABELS, np.full(10, -1), NAMES).as_dict()
    assert (silent["top1"], silent["macro_recall"], silent["confused"]) == (0, 0, [])
