"""Tables hold the numbers of the runs, and p values that the closed formulas of small samples give."""

import csv
from math import sqrt

import numpy as np
import pytest

from base.errors import ConfigError
from reports.groups import group_runs
from reports.runs import find_runs
from reports.tables import best_rows, compare, last_beside_best, write_table

KEY = "arch.args.norm_layer_type"


def make(make_run, name, seeds, /, **sections):
    """A run for every seed, from seed -> what its result.json holds."""
    for seed, result in seeds.items():
        make_run(f"{name}_{seed}", {"val_top1": [0.5]}, result, seed=seed, **sections)


@pytest.fixture
def norms(make_run, tmp_path):
    """Three seeds of bn, two of gn, one without a norm."""
    bn = {seed: {"test_top1": value, "last_test_top1": 0.5, "test_loss": 2.0} for seed, value in enumerate((0.50, 0.52, 0.54))}
    gn = {seed: {"test_top1": value, "last_test_top1": 0.5, "test_loss": 1.0} for seed, value in ((1, 0.58), (2, 0.59))}
    make(make_run, "a", bn)
    make(make_run, "b", gn, arch={"args": {"norm_layer_type": "gn"}})
    make(make_run, "c", {0: {"test_top1": 0.1, "test_loss": 3.0}}, arch={"args": {"norm_layer_type": "no"}})
    return group_runs(find_runs([tmp_path]), [KEY])


def test_mean_sample_deviation_and_number_of_seeds(norms):
    table = compare(norms)
    assert table.metrics == ("test_top1", "last_test_top1")
    assert [(row.name, row.n) for row in table.rows] == [("bn", 3), ("gn", 2), ("no", 1)]
    bn, gn, no = (row.cells[0] for row in table.rows)
    assert np.allclose([bn.mean, bn.std, gn.mean, gn.std, no.mean], [0.52, 0.02, 0.585, 0.01 / sqrt(2), 0.1])
    assert no.std is None
    assert table.rows[2].cells[1].values == {}


def test_p_values_are_those_of_the_closed_formulas(make_run, tmp_path):
    first = {seed: {"test_top1": value} for seed, value in enumerate((0.50, 0.52, 0.54))}
    other = {seed: {"test_top1": value} for seed, value in enumerate((0.55, 0.54, 0.60))}
    make(make_run, "a", first)
    make(make_run, "b", other, arch={"args": {"norm_layer_type": "gn"}})
    make(make_run, "c", {0: other[0], 1: other[1], 5: other[2]}, arch={"args": {"norm_layer_type": "in"}})
    make(make_run, "d", {2: other[0]}, arch={"args": {"norm_layer_type": "no"}})
    bn, gn, three, no = (row.cells[0] for row in compare(group_runs(find_runs([tmp_path]), [KEY]), baseline="bn").rows)
    differences = np.array([0.05, 0.02, 0.06])
    t = differences.mean() / (differences.std(ddof=1) / sqrt(3))
    assert (bn.p, no.p) == (None, None)
    assert gn.p == pytest.approx(1 - t / sqrt(2 + t**2), rel=1e-6)  # Student's t with two degrees of freedom
    t = 0.035 / (0.03 / sqrt(2) / sqrt(2))
    assert three.p == pytest.approx(1 - 2 * np.arctan(t) / np.pi, rel=1e-6)  # and with one: the seeds 0 and 1 are common
    assert (gn.pairs, three.pairs, no.pairs) == (3, 2, 1)


def test_numbers_that_are_not_finite_are_not_tested(make_run, tmp_path):
    make(make_run, "a", {seed: {"test_loss": float("inf")} for seed in range(2)})
    make(make_run, "b", {seed: {"test_loss": 0.1 * seed} for seed in range(2)}, arch={"args": {"norm_layer_type": "gn"}})
    table = compare(group_runs(find_runs([tmp_path]), [KEY]), ["test_loss"], baseline="bn")
    assert table.rows[1].cells[0].p is None
    assert np.isnan(table.rows[0].cells[0].std)
    assert best_rows(table, 0) == set()


def test_equal_differences_say_nothing_of_their_spread(make_run, tmp_path):
    make(make_run, "a", {seed: {"test_top1": 0.5 + seed / 10} for seed in range(3)})
    make(make_run, "b", {seed: {"test_top1": 0.6 + seed / 10} for seed in range(3)}, arch={"args": {"norm_layer_type": "gn"}})
    table = compare(group_runs(find_runs([tmp_path]), [KEY]), baseline="bn")
    assert (table.rows[1].cells[0].p, table.rows[1].cells[0].pairs) == (None, 3)


def test_the_best_is_the_highest_accuracy_and_the_lowest_loss_as_printed(norms, make_run, tmp_path):
    table = compare(norms, ["test_top1", "last_test_top1", "test_loss"])
    assert [best_rows(table, column) for column in range(3)] == [{1}, {0, 1}, {1}]
    assert best_rows(compare(norms[:1]), 0) == set(), "nothing to compare with"
    make_run("x", {"val_top1": [0.5]}, {"test_loss": float("nan"), "parameters": 23538}, arch={"type": "vgg11"})
    groups = group_runs(find_runs([tmp_path]), ["arch.type", KEY])
    table = compare(groups, ["test_loss", "parameters"])
    assert [best_rows(table, column) for column in range(2)] == [{1}, set()]


def test_last_stands_beside_best():
    names = ["last_test_robust_top1", "test_top1", "test_robust_top1", "last_test_top1", "test_top1"]
    assert last_beside_best(names) == ["test_robust_top1", "last_test_robust_top1", "test_top1", "last_test_top1"]


def test_markdown(norms, tmp_path):
    write_table(tmp_path / "new" / "table.md", compare(norms, ["last_test_top1", "test_top1"], baseline="bn"))
    text = (tmp_path / "new" / "table.md").read_text()
    p = compare(norms, baseline="bn").rows[1].cells[0].p
    assert text.splitlines()[:5] == [
        "| runs | n | test_top1 (%) | p | last_test_top1 (%) | p |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| bn | 3 | 52.00 ± 2.00 |  | **50.00 ± 0.00** |  |",
        f"| gn | 2 | **58.50 ± 0.71** | {p:.3f} | **50.00 ± 0.00** |  |",
        "| no | 1 | 10.00 |  | – |  |",
    ]
    assert "paired t test over common seeds against bn, two-sided, uncorrected" in text


def test_latex_escapes_what_latex_would_not_print(make_run, tmp_path):
    make_run("a", {"val_top1": [0.5]}, {"test_top1": 0.5}, trainer={"label_dir": "50%_of $x^2$ #1 & {b} ~ \\"})
    make_run("b", {"val_top1": [0.5]}, {"test_top1": 0.25, "test_loss": 3.0}, trainer={"label_dir": "[c]"})
    write_table(tmp_path / "table.tex", compare(group_runs(find_runs([tmp_path]), ["trainer.label_dir"]), ["test_top1"]))
    lines = (tmp_path / "table.tex").read_text().splitlines()
    body = [line for line in lines if not line.startswith("%")]
    assert body == [
        r"\begin{tabular}{lrr}",
        r"\toprule",
        r"runs & n & test\_top1 (\%) \\",
        r"\midrule",
        r"50\%\_of \$x\textasciicircum{}2\$ \#1 \& \{b\} \textasciitilde{} \textbackslash{} & 1 & \textbf{50.00} \\",
        r"{[}c] & 1 & 25.00 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]
    assert any("booktabs" in line for line in lines)


def test_latex_writes_signs_as_formulas(norms, tmp_path):
    write_table(tmp_path / "table.tex", compare(norms, ["test_top1"], baseline="no"))
    assert r"bn & 3 & 52.00 $\pm$ 2.00 &  \\" in (tmp_path / "table.tex").read_text()


def test_csv_has_a_column_for_every_number(norms, tmp_path):
    write_table(tmp_path / "table.csv", compare(norms, ["test_top1", "test_loss"], baseline="bn"))
    with (tmp_path / "table.csv").open(newline="") as file:
        bn, gn, no = csv.DictReader(file)
    names = ["test_top1_mean", "test_top1_std", "test_loss_mean", "test_loss_std"]
    assert [float(gn[name]) for name in names] == pytest.approx([0.585, 0.01 / sqrt(2), 1, 0], rel=1e-12)
    assert (bn["runs"], bn["n"], bn["test_top1_n"], bn["test_top1_p"]) == ("bn", "3", "3", "")
    assert float(gn["test_top1_p"]) == compare(norms, baseline="bn").rows[1].cells[0].p
    assert (no["test_top1_mean"], no["test_top1_std"]) == ("0.1", "")


def test_rows_of_other_rates_are_neither_tested_nor_beaten(make_run, tmp_path):
    accuracies = {("bn", 0.2): (0.7, 0.8), ("gn", 0.2): (0.75, 0.9), ("bn", 0.4): (0.5, 0.6), ("gn", 0.4): (0.4, 0.3)}
    for (norm, rate), values in accuracies.items():
        runs = {seed: {"test_top1": value} for seed, value in enumerate(values)}
        make(make_run, f"{norm}{rate}", runs, arch={"args": {"norm_layer_type": norm}}, trainer={"percent": rate, "sym": True})
    table = compare(group_runs(find_runs([tmp_path]), [KEY, "trainer.percent"]), baseline="bn", by_last_key=True)
    assert [(row.name.partition("=")[2], row.cells[0].p is None) for row in table.rows] == [
        ("bn, percent=0.2", True), ("bn, percent=0.4", True), ("gn, percent=0.2", False), ("gn, percent=0.4", False),
    ]  # fmt: skip
    t = 0.075 / 0.025  # of the differences 0.05 and 0.1
    assert table.rows[2].cells[0].p == pytest.approx(1 - 2 * np.arctan(t) / np.pi, rel=1e-6)
    assert best_rows(table, 0) == {1, 2}


def test_markdown_keeps_names_and_says_where_seeds_are_missing(make_run, tmp_path):
    make(make_run, "a", {0: {"test_top1": 0.5, "val_top1": 0.3}, 1: {"test_top1": 0.5, "val_top1": None}}, name="a|b*_c_")
    write_table(tmp_path / "table.md", compare(group_runs(find_runs([tmp_path]), ["name"]), ["test_top1", "val_top1"]))
    assert (tmp_path / "table.md").read_text().splitlines()[2] == r"| a\|b\*\_c\_ | 2 | 50.00 ± 0.00 | 30.00 (n = 1) |"


def test_errors(norms, tmp_path):
    with pytest.raises(
        ConfigError, match=r"^--result test_top5: no result.json has it; there are: test_top1, last_test_top1, test_loss"
    ):
        compare(norms, ["test_top5"])
    with pytest.raises(ConfigError, match=r"^--baseline bnn: no such row; there are: bn, gn, no; did you mean 'bn'\?$"):
        compare(norms, baseline="bnn")
    with pytest.raises(ConfigError, match=r"table.txt: '.txt' is no format of tables; expected one of: md, tex, csv$"):
        write_table(tmp_path / "table.txt", compare(norms))


def test_results_without_accuracies_are_named(make_run, tmp_path):
    make_run("a", {"val_top1": [0.5]}, {"parameters": 5})
    with pytest.raises(ConfigError, match=r"^--result: the runs have none of test_top1, .*; name others of: parameters$"):
        compare(group_runs(find_runs([tmp_path]), []))
