"""Sides take turns, and medians, quartiles and ratios are those of numbers computed by hand."""

import itertools

import pytest

from benchmarks.timing import Paired, Spread, compare, seconds_of


def test_sides_take_turns_and_only_rounds_after_the_warmup_count():
    now = 0.0
    order = []
    durations = {"a": iter([9.0, 1.0, 3.0, 2.0]), "b": iter([9.0, 4.0, 6.0, 8.0])}

    def side(name):
        def run():
            nonlocal now
            order.append(name)
            now += next(durations[name])

        return run

    times = compare({"a": side("a"), "b": side("b")}, repeats=3, warmup=1, clock=lambda: now)
    assert order == ["a", "b"] * 4
    assert times.values == {"a": [1.0, 3.0, 2.0], "b": [4.0, 6.0, 8.0]}


@pytest.mark.parametrize(("each", "rounds"), [(0.1, 5), (1.9, 5), (2.5, 4), (4.0, 3), (100.0, 3)])
def test_long_rounds_are_fewer(each, rounds):
    now = 0.0

    def side():
        nonlocal now
        now += each

    times = compare(
        {"a": side, "b": side}, repeats=5, warmup=2, clock=lambda: now, at_least=3, enough=20.0
    )
    assert [len(values) for values in times.values.values()] == [rounds, rounds]


def test_what_happens_between_two_sides_is_not_timed():
    # Ten seconds pass between two calls of the clock.
    clock = itertools.count(0, 10)
    times = compare(
        {"a": lambda: None, "b": lambda: None}, repeats=2, warmup=0, clock=lambda: next(clock)
    )
    assert times.values == {"a": [10, 10], "b": [10, 10]}


def test_ratios_are_taken_round_by_round():
    times = Paired({"a": [1.0, 10.0, 3.0], "b": [2.0, 5.0, 6.0]})
    assert times.ratio("a", "b") == Spread(0.5, 0.5, 1.25, 3), (
        "the ratio of the medians would be 0.6"
    )
    assert times.spread("a") == Spread(3.0, 2.0, 6.5, 3)
    assert times.difference("a", "b") == Spread(-1.0, -2.0, 2.0, 3)
    assert times.rate("b", 30) == Spread(6.0, 5.5, 10.5, 3)
    assert times.smallest(["a", "b"]) == "a"
    assert times.smallest(["b"]) == "b"


def test_an_even_number_of_values_has_its_median_in_between():
    assert Spread.of([4.0, 1.0, 2.0, 3.0]) == Spread(2.5, 1.75, 3.25, 4)


def test_one_side_alone():
    calls = []
    assert seconds_of(lambda: calls.append(1), 3, warmup=2).n == 3
    assert len(calls) == 5


def test_sides_of_different_lengths_are_an_error():
    with pytest.raises(ValueError, match="shorter"):
        Paired({"a": [1.0], "b": [1.0, 2.0]}).ratio("b", "a")
