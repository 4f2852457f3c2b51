"""Tables hold the numbers of the runs, and p values that the closed formulas of small samples
give."""

import csv
from math import sqrt

import numpy as np
import pytest

from base.errors import ConfigError
from reports.groups import group_runs
from reports.runs import find_runs
from reports.tables import best_rows, compare, holm, last_beside_best, write_table

KEY = "arch.args.norm_layer_type"


def make(make_run, name, seeds, /, **sections):
    """A run for every seed, from seed -> what its result.json holds."""
    for seed, result in seeds.items():
        make_run(f"{name}_{seed}", {"val_top1": [0.5]}, result, seed=seed, **sections)


@pytest.fixture
def norms(make_run, tmp_path):
    """Three seeds of bn, two of gn, one without a norm."""
    bn = {
        seed: {"test_top1": value, "last_test_top1": 0.5, "test_loss": 2.0}
        for seed, value in enumerate((0.50, 0.52, 0.54))
    }
    gn = {
        seed: {"test_top1": value, "last_test_top1": 0.5, "test_loss": 1.0}
        for seed, value in ((1, 0.58), (2, 0.59))
    }
    make(make_run, "a", bn)
    make(make_run, "b", gn, arch={"args": {"norm_layer_type": "gn"}})
    make(
        make_run,
        "c",
        {0: {"test_top1": 0.1, "test_loss": 3.0}},
        arch={"args": {"norm_layer_type": "no"}},
    )
    return group_runs(find_runs([tmp_path]), [KEY])


def test_mean_sample_deviation_and_number_of_seeds(norms):
    table = compare(norms)
    assert table.metrics == ("test_top1", "last_test_top1")
    assert [(row.name, row.n) for row in table.rows] == [("bn", 3), ("gn", 2), ("no", 1)]
    bn, gn, no = (row.cells[0] for row in table.rows)
    assert np.allclose(
        [bn.mean, bn.std, gn.mean, gn.std, no.mean], [0.52, 0.02, 0.585, 0.01 / sqrt(2), 0.1]
    )
    assert no.std is None
    assert table.rows[2].cells[1].values == {}


def student_1(t):
    """The two-sided p value of Student's t with one degree of freedom, in closed form."""
    return 1 - 2 * np.arctan(abs(t)) / np.pi


def student_2(t):
    """The p value of Student's t with two degrees of freedom, in closed form."""
    return 1 - abs(t) / sqrt(2 + t**2)


def of_norms(make_run, folder, baseline="bn", paired=False, **values):
    """The cells of a table with a row per norm, of norm -> accuracies of its seeds from 0 on, or
    seed -> accuracy."""
    for norm, accuracies in values.items():
        seeds = accuracies if isinstance(accuracies, dict) else dict(enumerate(accuracies))
        results = {seed: {"test_top1": value} for seed, value in seeds.items()}
        make(make_run, folder / norm, results, arch={"args": {"norm_layer_type": norm}})
    table = compare(group_runs(find_runs([folder]), [KEY]), baseline=baseline, paired=paired)
    return {row.name: row.cells[0] for row in table.rows}


def test_welch_is_the_default(make_run, tmp_path):
    # One side without a spread: Welch's degrees of freedom are then those of the other side alone
    cells = of_norms(make_run, tmp_path, bn=(0.5, 0.5, 0.5, 0.5), gn=(0.55, 0.54, 0.60))
    t = (cells["gn"].mean - 0.5) / (cells["gn"].std / sqrt(3))
    assert cells["gn"].p == pytest.approx(student_2(t), rel=1e-6)
    assert (cells["bn"].p, cells["gn"].compared) == (None, 3)


def test_welch_needs_two_seeds_on_both_sides_and_a_spread_on_one(make_run, tmp_path):
    cells = of_norms(make_run, tmp_path, bn=(0.5, 0.5), gn=(0.6, 0.6), no=(0.7,))
    cells["in"] = of_norms(make_run, tmp_path / "b", bn=(0.5,), **{"in": (0.5, 0.6)})["in"]
    assert [cells[name].p for name in ("gn", "no", "in")] == [None, None, None]


def test_paired_tests_are_over_common_seeds(make_run, tmp_path):
    values = {"gn": (0.55, 0.54, 0.60), "in": {0: 0.55, 1: 0.54, 5: 0.60}, "no": {2: 0.55}}
    cells = of_norms(make_run, tmp_path, paired=True, bn=(0.50, 0.52, 0.54), **values)
    differences = np.array([0.05, 0.02, 0.06])
    t = differences.mean() / (differences.std(ddof=1) / sqrt(3))
    # Two tests: the smaller p counts twice, the larger once
    assert cells["gn"].p == pytest.approx(2 * student_2(t), rel=1e-6)
    assert cells["in"].p == pytest.approx(student_1(0.035 / (0.03 / sqrt(2) / sqrt(2))), rel=1e-6)
    assert cells["no"].p is None
    assert [cells[name].compared for name in ("gn", "in", "no")] == [3, 2, 1]


def test_holm_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    )
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_a_repeated_row_is_counted_once(make_run, tmp_path):
    for folder, names in {"once": ("gn", "in"), "twice": ("gn", "in", "no")}.items():
        for norm, shift in {"bn": 0.0, "gn": 0.1, "in": 0.03, "no": 0.1}.items():
            if norm == "bn" or norm in names:
                results = {seed: {"test_top1": 0.5 + seed**2 / 100 + shift} for seed in range(3)}
                make(
                    make_run, f"{folder}/{norm}", results, arch={"args": {"norm_layer_type": norm}}
                )
    once, twice = (
        {
            row.name: row.cells[0]
            for row in compare(
                group_runs(find_runs([tmp_path / folder]), [KEY]), baseline="bn"
            ).rows
        }
        for folder in ("once", "twice")
    )
    assert twice["gn"].p == twice["no"].p == once["gn"].p
    assert twice["in"].p == once["in"].p
    table = compare(group_runs(find_runs([tmp_path / "twice"]), [KEY]))
    assert best_rows(table, 0) == {1, 3}, "a row is not its own rival"


def test_a_lead_within_one_standard_error_is_not_bold(make_run, tmp_path):
    def best(folder, **values):
        cells = of_norms(make_run, tmp_path / folder, baseline=None, **values)
        return [
            list(cells)[index]
            for index in best_rows(compare(group_runs(find_runs([tmp_path / folder]), [KEY])), 0)
        ]

    # Means 0.52 and x + 0.02, both with a standard error of 0.02 / sqrt(3), of the difference
    # 0.0163
    low = (0.50, 0.52, 0.54)
    assert best("near", bn=low, gn=(0.516, 0.536, 0.556)) == []
    assert best("far", bn=low, gn=(0.517, 0.537, 0.557)) == ["gn"]
    assert best("third", bn=low, gn=(0.517, 0.537, 0.557), no=(0.516, 0.536, 0.556)) == []
    assert best("single", bn=(0.5,), gn=(0.9,)) == [], "no spread is known"
    assert best("half known", bn=(0.5,), gn=(0.9, 0.8, 0.85)) == ["gn"]
    assert best("equal", bn=(0.5, 0.5), gn=(0.5, 0.5)) == []
    rounded = (0.5 + 1e-16, 0.5, 0.5 + 2e-16)
    assert best("rounding", bn=(0.5, 0.5, 0.5), gn=rounded) == []


def test_numbers_that_are_not_finite_are_not_tested(make_run, tmp_path):
    make(make_run, "a", {seed: {"test_loss": float("inf")} for seed in range(2)})
    make(
        make_run,
        "b",
        {seed: {"test_loss": 0.1 * seed} for seed in range(2)},
        arch={"args": {"norm_layer_type": "gn"}},
    )
    table = compare(group_runs(find_runs([tmp_path]), [KEY]), ["test_loss"], baseline="bn")
    assert table.rows[1].cells[0].p is None
    assert np.isnan(table.rows[0].cells[0].std)
    assert best_rows(table, 0) == set()


def test_a_seed_that_diverged_or_has_no_value_takes_bold_and_p_value_from_its_row(
    make_run, tmp_path, caplog
):
    low = dict(enumerate((0.3, 0.31, 0.32)))
    good = dict(enumerate((0.1, 0.11, 0.12)))
    results = {
        "bn": {seed: {"test_loss": loss} for seed, loss in low.items()},
        "gn": {seed: {"test_loss": loss} for seed, loss in good.items()} | {2: {"test_loss": None}},
        "in": {seed: {"test_loss": loss} for seed, loss in good.items()} | {2: {"test_top1": 0.1}},
    }
    for norm, seeds in results.items():
        make(make_run, norm, seeds, arch={"args": {"norm_layer_type": norm}})
    groups = group_runs(find_runs([tmp_path]), [KEY])
    for paired in (False, True):
        table = compare(groups, ["test_loss"], baseline="bn", paired=paired)
        assert [row.cells[0].p for row in table.rows] == [None, None, None]
        assert best_rows(table, 0) == set()
    write_table(tmp_path / "table.md", table)
    assert [
        line.split(" | ")[2] for line in (tmp_path / "table.md").read_text().splitlines()[2:5]
    ] == [
        "0.31 ± 0.01",
        "nan",
        "0.105 ± 0.007071 (n = 2)",
    ]
    assert f"{tmp_path / 'gn_2'}: test_loss is not finite: the run has diverged" in caplog.text
    assert (
        "in: only 2 of 3 runs have test_loss, so it is neither bold nor tested;"
        f" without it: {tmp_path / 'in_2'}" in caplog.text
    )


def test_equal_differences_have_no_p_value(make_run, tmp_path):
    cells = of_norms(make_run, tmp_path, paired=True, bn=(0.5, 0.6, 0.7), gn=(0.6, 0.7, 0.8))
    assert (cells["gn"].p, cells["gn"].compared) == (None, 3)


def test_the_best_is_the_highest_accuracy_and_the_lowest_loss(norms, make_run, tmp_path):
    table = compare(norms, ["test_top1", "last_test_top1", "test_loss"])
    assert [best_rows(table, column) for column in range(3)] == [{1}, set(), {1}]
    assert best_rows(compare(norms[:1]), 0) == set(), "nothing to compare with"
    make_run(
        "x",
        {"val_top1": [0.5]},
        {"test_loss": float("nan"), "parameters": 23538},
        arch={"type": "vgg11"},
    )
    groups = group_runs(find_runs([tmp_path]), ["arch.type", KEY])
    table = compare(groups, ["test_loss", "parameters"])
    assert [best_rows(table, column) for column in range(2)] == [{1}, set()], (
        "parameters have no best"
    )


def test_the_last_model_stands_beside_the_best():
    names = [
        "last_test_robust_top1",
        "test_top1",
        "test_robust_top1",
        "last_test_top1",
        "test_top1",
    ]
    assert last_beside_best(names) == [
        "test_robust_top1",
        "last_test_robust_top1",
        "test_top1",
        "last_test_top1",
    ]


def test_markdown(norms, tmp_path):
    write_table(
        tmp_path / "new" / "table.md",
        compare(norms, ["last_test_top1", "test_top1"], baseline="bn"),
    )
    text = (tmp_path / "new" / "table.md").read_text()
    p = compare(norms, baseline="bn").rows[1].cells[0].p
    assert text.splitlines()[:5] == [
        "| runs | n | test_top1 (%) | p (Holm) | last_test_top1 (%) | p (Holm) |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| bn | 3 | 52.00 ± 2.00 |  | 50.00 ± 0.00 |  |",
        f"| gn | 2 | **58.50 ± 0.71** | {p:.3f} | 50.00 ± 0.00 |  |",
        "| no | 1 | 10.00 |  | – |  |",
    ]
    assert "by more than one standard error of the difference" in text
    assert "p: Welch's t test against bn, two-sided, Holm-corrected over the table's rows." in text
    write_table(tmp_path / "paired.md", compare(norms, baseline="bn", paired=True))
    assert (
        "p: paired t test over common seeds against bn, two-sided, Holm"
        in (tmp_path / "paired.md").read_text()
    )


def test_latex_escapes_what_latex_would_not_print(make_run, tmp_path):
    make_run(
        "a",
        {"val_top1": [0.5]},
        {"test_top1": 0.5},
        trainer={"label_dir": "50%_of $x^2$ #1 & {b} ~ \\"},
    )
    make_run(
        "b",
        {"val_top1": [0.5]},
        {"test_top1": 0.25, "test_loss": 3.0},
        trainer={"label_dir": "[c]"},
    )
    write_table(
        tmp_path / "table.tex",
        compare(group_runs(find_runs([tmp_path]), ["trainer.label_dir"]), ["test_top1"]),
    )
    lines = (tmp_path / "table.tex").read_text().splitlines()
    body = [line for line in lines if not line.startswith("%")]
    assert body == [
        r"\begin{tabular}{lrr}",
        r"\toprule",
        r"runs & n & test\_top1 (\%) \\",
        r"\midrule",
        r"50\%\_of \$x\textasciicircum{}2\$ \#1 \& \{b\} \textasciitilde{} \textbackslash{}"
        r" & 1 & 50.00 \\",
        r"{[}c] & 1 & 25.00 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]
    assert any("booktabs" in line for line in lines)


def test_latex_writes_plus_minus_as_a_formula(norms, tmp_path):
    write_table(tmp_path / "table.tex", compare(norms, ["test_top1"], baseline="no"))
    assert r"bn & 3 & 52.00 $\pm$ 2.00 &  \\" in (tmp_path / "table.tex").read_text()


def test_csv_has_a_column_for_every_number(norms, tmp_path):
    write_table(tmp_path / "table.csv", compare(norms, ["test_top1", "test_loss"], baseline="bn"))
    with (tmp_path / "table.csv").open(newline="") as file:
        bn, gn, no = csv.DictReader(file)
    names = ["test_top1_mean", "test_top1_std", "test_loss_mean", "test_loss_std"]
    assert [float(gn[name]) for name in names] == pytest.approx(
        [0.585, 0.01 / sqrt(2), 1, 0], rel=1e-12
    )
    assert (bn["runs"], bn["n"], bn["test_top1_n"], bn["test_top1_p_holm"]) == ("bn", "3", "3", "")
    assert float(gn["test_top1_p_holm"]) == compare(norms, baseline="bn").rows[1].cells[0].p
    assert (no["test_top1_mean"], no["test_top1_std"]) == ("0.1", "")


def test_rows_of_different_rates_are_neither_tested_nor_compared(make_run, tmp_path):
    accuracies = {
        ("bn", 0.2): (0.7, 0.8),
        ("gn", 0.2): (0.75, 0.9),
        ("bn", 0.4): (0.5, 0.6),
        ("gn", 0.4): (0.4, 0.3),
    }
    for (norm, rate), values in accuracies.items():
        runs = {seed: {"test_top1": value} for seed, value in enumerate(values)}
        make(
            make_run,
            f"{norm}{rate}",
            runs,
            arch={"args": {"norm_layer_type": norm}},
            trainer={"percent": rate, "sym": True},
        )
    table = compare(
        group_runs(find_runs([tmp_path]), [KEY, "trainer.percent"]), baseline="bn", by_last_key=True
    )
    assert [(row.name.partition("=")[2], row.cells[0].p is None) for row in table.rows] == [
        ("bn, percent=0.2", True),
        ("bn, percent=0.4", True),
        ("gn, percent=0.2", False),
        ("gn, percent=0.4", False),
    ]
    paired = compare(
        group_runs(find_runs([tmp_path]), [KEY, "trainer.percent"]),
        baseline="bn",
        by_last_key=True,
        paired=True,
    )
    ps = [row.cells[0].p for row in paired.rows[2:]]
    # Differences 0.05 and 0.1 at one rate, -0.1 and -0.3 at the other: two tests in one table
    assert ps == pytest.approx(
        [2 * student_1(0.075 / 0.025), 2 * student_1(0.075 / 0.025)], rel=1e-6
    )
    assert best_rows(table, 0) == {1}, "0.825 does not lead 0.75 by more than a standard error"


def test_markdown_keeps_names_and_counts_missing_seeds(make_run, tmp_path):
    make(
        make_run,
        "a",
        {0: {"test_top1": 0.5, "val_top1": 0.3}, 1: {"test_top1": 0.5, "val_top1": None}},
        name="a|b*_c_",
    )
    write_table(
        tmp_path / "table.md",
        compare(group_runs(find_runs([tmp_path]), ["name"]), ["test_top1", "val_top1"]),
    )
    assert (tmp_path / "table.md").read_text().splitlines()[
        2
    ] == r"| a\|b\*\_c\_ | 2 | 50.00 ± 0.00 | 30.00 (n = 1) |"


def test_errors(norms, tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"^--result test_top5: no result.json has it;"
        r" there are: test_top1, last_test_top1, test_loss",
    ):
        compare(norms, ["test_top5"])
    with pytest.raises(
        ConfigError,
        match=r"^--baseline bnn: no such row; there are: bn, gn, no; did you mean 'bn'\?$",
    ):
        compare(norms, baseline="bnn")
    with pytest.raises(
        ConfigError,
        match=r"table.txt: '.txt' is not a format of tables; expected one of: md, tex, csv$",
    ):
        write_table(tmp_path / "table.txt", compare(norms))


def test_results_without_accuracies_are_named(make_run, tmp_path):
    make_run("a", {"val_top1": [0.5]}, {"parameters": 5})
    with pytest.raises(
        ConfigError,
        match=r"^--result: no run has any of test_top1, .*; choose from: parameters$",
    ):
        compare(group_runs(find_runs([tmp_path]), []))


@pytest.mark.parametrize("suffix", ["md", "tex", "csv"])
def test_hostile_names_do_not_break_tables(make_run, tmp_path, suffix):
    names = {"a": "=1+1\n\x1b[2J", "b": "@x\u202e|y\r\n% z", "c": "-[link](to)"}
    for folder, name in names.items():
        results = {seed: {"test_top1": 0.1 * seed + 0.5, "+top1": 0.5} for seed in range(2)}
        make(make_run, folder, results, trainer={"label_dir": name})
    groups = group_runs(find_runs([tmp_path]), ["trainer.label_dir"])
    path = tmp_path / f"table.{suffix}"
    write_table(path, compare(groups, ["test_top1", "+top1"], baseline="=1+1\n\x1b[2J"))
    text = path.read_bytes().decode()
    assert all(character.isprintable() or character == "\n" for character in text)
    lines = text.splitlines()
    if suffix == "csv":
        with path.open(newline="") as file:
            rows = list(csv.reader(file))
        assert [row[0] for row in rows] == [
            "runs",
            r"'=1+1\n\x1b[2J",
            r"'@x\u202e|y\r\n% z",
            "'-[link](to)",
        ]
        assert rows[0][6] == "'+top1_mean"
        assert [float(row[2]) for row in rows[1:]] == pytest.approx([0.55] * 3)
    else:
        assert len(lines) == {"md": 7, "tex": 11}[suffix]
    if suffix == "md":
        assert r"\[link\](to)" in lines[4]
        assert r"against =1+1\\n\\x1b\[2J, two-sided" in lines[-1]


def test_a_negative_number_stays_a_number(make_run, tmp_path):
    make(make_run, "a", {seed: {"test_loss": -0.5} for seed in range(2)})
    write_table(
        tmp_path / "table.csv", compare(group_runs(find_runs([tmp_path]), [KEY]), ["test_loss"])
    )
    assert (tmp_path / "table.csv").read_text().splitlines()[1] == "bn,2,-0.5,0.0,2"


def test_a_baseline_without_the_value_of_a_seed_tests_no_row(make_run, tmp_path):
    results = {
        "bn": {0: {"test_loss": 0.3}, 1: {"test_loss": 0.31}, 2: {"test_top1": 0.1}},
        "gn": {seed: {"test_loss": 0.1 + 0.01 * seed**2} for seed in range(3)},
    }
    for norm, seeds in results.items():
        make(make_run, norm, seeds, arch={"args": {"norm_layer_type": norm}})
    groups = group_runs(find_runs([tmp_path]), [KEY])
    for paired in (False, True):
        table = compare(groups, ["test_loss"], baseline="bn", paired=paired)
        assert [row.cells[0].p for row in table.rows] == [None, None]
