"""Rows: the direction of their ratio, whether their goal is met, and how they are printed."""

import pytest

from benchmarks.rows import BenchmarkRow, BenchmarkTable, Goal, cost_row, speed_row
from benchmarks.table import format_markdown, format_number, format_text, summary
from benchmarks.timing import Paired

TIMES = Paired({"ours": [1.0, 2.0, 3.0], "theirs": [2.0, 6.0, 6.0]})


def test_cost_and_speed_are_ratios_in_opposite_directions():
    cost, speed = (
        cost_row("step", TIMES, "ours", "theirs", 0.4),
        speed_row("step", TIMES, "ours", "theirs", 2.0),
    )
    assert cost.result.median == 0.5
    assert cost.met is False
    assert speed.result.median == 2.0
    assert speed.met is True
    assert speed_row("step", TIMES, "ours", "theirs", None).met is None


def test_images_per_second_stand_beside_a_speed():
    row = speed_row("epoch", TIMES, "ours", "theirs", None, images=12)
    assert (row.ours_value.median, row.other_value.median, row.unit) == (6.0, 2.0, "images/s")


def test_bytes_are_shown_as_mebibytes():
    row = cost_row(
        "memory", Paired({"a": [3.0 * 2**20], "b": [2.0 * 2**20]}), "a", "b", 1.5, unit="MiB"
    )
    assert (row.ours_value.median, row.other_value.median, row.result.median, row.met) == (
        3.0,
        2.0,
        1.5,
        True,
    )


@pytest.mark.parametrize(
    ("at_least", "below", "equal", "above"), [(True, False, True, True), (False, True, True, False)]
)
def test_a_goal_holds_at_its_own_value(at_least, below, equal, above):
    goal = Goal(2, at_least)
    assert (goal.met(1.9), goal.met(2.0), goal.met(2.1)) == (below, equal, above)


def test_the_table_names_goals_misses_and_reasons():
    rows = [
        cost_row("training step", TIMES, "ours", "theirs", 0.4, note="on a rainy day"),
        speed_row("attack", TIMES, "ours", "theirs", 2.0),
        BenchmarkRow("large network", "ours", skipped="no --checkpoint RUN was given"),
    ]
    tables = [BenchmarkTable("Batch", ("batch", "s/step"), (("1", "0.1"), ("256", "3.2")), "grows")]
    results = {"first": rows, "growth": tables}
    text = format_text(results)
    assert "0.5 x the cost (0.417 to 0.5)  <= 0.4   NO  3" in text
    assert "2 x as fast (2 to 2.5)" in text
    assert "skipped: no --checkpoint RUN was given" in text
    assert text.count("on a rainy day") == 1
    assert summary(results) == "1 of 2 goals met"
    markdown = format_markdown(results)
    assert (
        "| first | training step | ours | 2 s | theirs | 6 s | 0.5 x the cost (0.417 to 0.5) "
        "| <= 0.4 | NO | 3 |" in markdown
    )
    assert "| 256 | 3.2 |" in markdown
    assert all(
        line.count("|") == 11 for line in markdown.splitlines() if line.startswith("| first")
    )


def test_numbers_have_three_digits():
    assert [format_number(value) for value in (0.01234, 1.5, 99.94, 99.96, 12345.6)] == [
        "0.0123",
        "1.5",
        "99.9",
        "100",
        "12346",
    ]


def test_plain_values_say_whether_the_goal_is_met():
    plain = cost_row("step", TIMES, "ours", "theirs", 0.4).as_dict()
    assert plain["met"] is False
    assert plain["goal"] == {"value": 0.4, "at_least": False}
    assert plain["result"] == {"median": 0.5, "low": pytest.approx(5 / 12), "high": 0.5, "n": 3}
