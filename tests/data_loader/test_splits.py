import numpy as np
import pytest

from base.errors import DataError
from data_loader.splits import first_of_every_class, stratified_split, stratified_subset

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(4), [40, 40, 100, 25]))


def per_class(index):
    return np.bincount(LABELS[index], minlength=4).tolist()


def test_split_is_disjoint_complete_sorted_and_stratified():
    train, held_out = stratified_split(LABELS, 0.1, seed=3)
    assert np.array_equal(np.sort(np.concatenate([train, held_out])), np.arange(len(LABELS)))
    assert (np.diff(train) > 0).all()
    assert (np.diff(held_out) > 0).all()
    assert per_class(held_out) == [4, 4, 10, 3]  # 2.5 rounds up
    assert train.dtype == held_out.dtype == np.int64


def test_every_seed_has_a_split_of_its_own():
    assert np.array_equal(stratified_split(LABELS, 0.1, 3)[1], stratified_split(LABELS, 0.1, 3)[1])
    assert not np.array_equal(
        stratified_split(LABELS, 0.1, 3)[1], stratified_split(LABELS, 0.1, 4)[1]
    )


def test_no_fraction_holds_nothing_out_and_a_tiny_one_holds_out_one_per_class():
    assert stratified_split(LABELS, 0.0, 0)[1].size == 0
    assert per_class(stratified_split(LABELS, 0.001, 0)[1]) == [1, 1, 1, 1]


def test_split_leaves_something_to_train_on():
    with pytest.raises(
        DataError, match=r"0\.9 would leave no image of class 0 for training: it has 3"
    ):
        stratified_split(np.zeros(3, np.int64), 0.9, 0)


@pytest.mark.parametrize("validation", [0.0, 0.1])
def test_subsets_are_nested_stratified_and_taken_from_remaining_images(validation):
    train, held_out = stratified_split(LABELS, validation, seed=5)
    smaller = None
    for fraction in (0.1, 0.25, 0.5, 0.9, 1.0):
        subset = stratified_subset(train, LABELS, fraction, seed=5)
        assert np.isin(subset, train).all()
        assert not np.isin(subset, held_out).any()
        if fraction < 0.9:
            assert per_class(subset) == [int(fraction * n + 0.5) for n in (40, 40, 100, 25)]
        if smaller is not None:
            assert np.isin(smaller, subset).all()
        smaller = subset
    assert np.array_equal(smaller, train)


def test_ninety_five_percent_and_all_mean_the_remaining_images():
    train, _ = stratified_split(LABELS, 0.1, seed=5)
    assert np.array_equal(stratified_subset(train, LABELS, 0.95, 5), train)


def test_a_class_without_images_is_an_error():
    with pytest.raises(
        DataError,
        match=r"trainer\.subset_percent: 0\.01 of the 40 images of class 0 rounds to none",
    ):
        stratified_subset(np.arange(len(LABELS)), LABELS, 0.01, 0)


def test_the_first_of_every_class_are_spread_as_equally_as_possible():
    assert first_of_every_class(np.array([0, 0, 0, 1, 2, 1, 2, 0]), 5).tolist() == [0, 1, 3, 4, 5]
    for count in (4, 50, 100, 160):
        index = first_of_every_class(LABELS, count)
        assert per_class(index) == per_class_of_a_fair_share(count)
        assert (np.diff(index) > 0).all()
        for label in range(4):
            members = np.flatnonzero(label == LABELS)
            assert np.isin(members, index).tolist() == sorted(
                np.isin(members, index), reverse=True
            ), "the first ones"
    assert first_of_every_class(LABELS, 1000).tolist() == list(range(len(LABELS)))
    assert first_of_every_class(LABELS, 0).size == 0


def per_class_of_a_fair_share(count):
    """Choose one image after the other, from each class in turn."""
    left, dealt = [40, 40, 100, 25], [0, 0, 0, 0]
    while sum(dealt) < count:
        for label in range(4):
            if dealt[label] < left[label] and sum(dealt) < count:
                dealt[label] += 1
    return dealt
