"""Tables of results: means and spreads over seeds, the best in bold, and tests against a baseline row."""

import csv
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from base.errors import ConfigError
from reports.groups import Group, mean_and_std
from reports.output import check_output, writing
from reports.runs import refuse_unknown

FORMATS = ("md", "tex", "csv")
RESULTS = ("test_top1", "last_test_top1", "test_robust_top1", "last_test_robust_top1")
"""What a table shows unless it is told otherwise, of what the runs have: test accuracies of the best and of the last model."""
LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    "[": "{[}",  # one that begins a row would be taken for an argument of the line break before it
    "*": "{*}", "±": r"$\pm$",
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One metric of one group.

    Attributes:
        values: seed -> value as it is in `result.json`.
        p: two-sided p value of the paired t test against the baseline row; None where there is none.
        pairs: how many seeds that test compares.
    """

    values: dict[int, float]
    p: float | None = None
    pairs: int = 0

    @property
    def mean(self) -> float:
        """Over seeds; NaN where there are none."""
        return mean_and_std([*self.values.values()])[0]

    @property
    def std(self) -> float | None:
        """Sample standard deviation over seeds; None where there are fewer than two."""
        return mean_and_std([*self.values.values()])[1] if len(self.values) > 1 else None


@dataclass(frozen=True)
class Row:
    """One group.

    Attributes:
        name: of the group.
        n: how many seeds it has.
        cells: one for every metric.
        block: rows are compared with those of equal blocks only.
    """

    name: str
    n: int
    cells: tuple[Cell, ...]
    block: Any = None


@dataclass(frozen=True)
class Table:
    """Groups as rows, metrics as columns.

    Attributes:
        metrics: names in `result.json`.
        rows: in the order of the groups.
        baseline: name of the row that all others are tested against; None for no tests.
    """

    metrics: tuple[str, ...]
    rows: tuple[Row, ...]
    baseline: str | None = None


def write_table(path: str | Path, table: Table) -> None:
    """Write a table of means ± sample standard deviations over seeds, and their number.

    Args:
        path: the suffix decides the format: `.md`, `.tex` (a `tabular` with booktabs) or `.csv` (values as in `result.json`, in
            full precision); missing folders are made.
        table: of `compare`.

    Raises:
        ConfigError: another suffix, or a path that cannot be written.
    """
    check_output(path, FORMATS, "tables")
    layout = {"md": _markdown, "tex": _latex, "csv": _csv}[Path(path).suffix.lower().removeprefix(".")]
    with writing(path):
        Path(path).write_text(layout(table), encoding="utf-8", newline="")


def compare(
    groups: Sequence[Group], metrics: Sequence[str] | None = None, baseline: str | None = None, by_last_key: bool = False
) -> Table:
    """Groups beside each other, and tested against one of them.

    The p value is that of `scipy.stats.ttest_rel`, two-sided and not corrected for the number of rows. There is none with fewer
    than two common seeds, or where all differences are the same, so that they say nothing of their spread.

    Args:
        groups: of finished runs.
        metrics: names in `result.json`; that of the last model is put beside that of the best. None for `RESULTS`.
        baseline: name of the group that every other one is tested against, over their common seeds.
        by_last_key: compare only groups with equal values of the last key they are grouped by, such as a rate of noise; the
            baseline is then named by the other keys.

    Raises:
        ConfigError: a metric that no run has, or an unknown baseline.
    """
    known = dict.fromkeys(name for group in groups for run in group.runs for name in run.result or {})
    if metrics is None:
        metrics = [name for name in RESULTS if name in known]
        if not metrics:
            raise ConfigError(f"--result: the runs have none of {', '.join(RESULTS)}; name others of: {', '.join(known)}")
    refuse_unknown("--result", metrics, known, "no result.json has it")
    names = [group.line if by_last_key else group.name for group in groups]
    blocks = [group.values[-1] if by_last_key else None for group in groups]
    if baseline is not None:
        refuse_unknown("--baseline", [baseline], names, "no such row")
    metrics = last_beside_best(metrics)
    values = [[_values(group, metric) for metric in metrics] for group in groups]
    baselines = {block: row for name, block, row in zip(names, blocks, values, strict=True) if name == baseline}
    rows = []
    for group, name, block, row in zip(groups, names, blocks, values, strict=True):
        others = baselines.get(block) if name != baseline else None
        cells = [Cell(own, *_paired_test(own, other)) for own, other in zip(row, others or [{}] * len(metrics), strict=True)]
        rows.append(Row(group.name, len(group.runs), tuple(cells), block))
    return Table(tuple(metrics), tuple(rows), baseline)


def last_beside_best(metrics: Sequence[str]) -> list[str]:
    """Metrics in the order given, but that of the last model right behind that of the best."""
    bases = list(dict.fromkeys(metric.removeprefix("last_") for metric in metrics))
    return sorted(dict.fromkeys(metrics), key=lambda name: (bases.index(name.removeprefix("last_")), name.startswith("last_")))


def best_rows(table: Table, column: int) -> set[int]:
    """The rows with the best mean of a column in their block, as it is printed: the highest accuracy, the lowest loss.

    None of a column that is neither, and none where there is nothing to compare.
    """
    metric, found = table.metrics[column], set()
    if not ("top" in metric or "loss" in metric):
        return found
    for block in dict.fromkeys(row.block for row in table.rows):
        means = {index: row.cells[column].mean for index, row in enumerate(table.rows) if row.block == block}
        means = {index: mean for index, mean in means.items() if np.isfinite(mean)}
        if len(means) > 1:
            best = max(means.values()) if "top" in metric else min(means.values())
            found |= {index for index, mean in means.items() if _number(mean, metric) == _number(best, metric)}
    return found


def _values(group: Group, metric: str) -> dict[int, float]:
    return {run.seed: value for run in group.runs if (value := run.outcome(metric)) is not None}


def _paired_test(own: dict[int, float], other: dict[int, float]) -> tuple[float | None, int]:
    """p value and number of pairs."""
    seeds = sorted(own.keys() & other.keys())
    first, second = (np.array([values[seed] for seed in seeds]) for values in (own, other))
    differences = first - second
    if len(seeds) < 2 or not np.isfinite(differences).all() or np.ptp(differences) < 1e-12:
        return None, len(seeds)
    from scipy.stats import ttest_rel

    return float(ttest_rel(first, second).pvalue), len(seeds)


def _markdown(table: Table) -> str:
    lines = [_header(table), ["---", *["---:"] * (len(_header(table)) - 1)]]
    lines += _body(table, bold="**{}**".format, text=lambda text: re.sub(r"([\\`*|<]|(?<!\w)_|_(?!\w))", r"\\\1", text))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n{_note(table)}\n"


def _latex(table: Table) -> str:
    lines = [[_escaped(head) for head in _header(table)]]
    lines += _body(table, bold=r"\textbf{{{}}}".format, text=_escaped)
    first, *others = (" & ".join(line) + r" \\" for line in lines)
    columns = "l" + "r" * (len(lines[0]) - 1)
    parts = [r"\toprule", first, r"\midrule", *others, r"\bottomrule"]
    comment = f"% {_note(table)}\n% needs \\usepackage{{booktabs}}\n"
    return comment + "\n".join([rf"\begin{{tabular}}{{{columns}}}", *parts, r"\end{tabular}"]) + "\n"


def _csv(table: Table) -> str:
    """Numbers only, as they are in `result.json`, in columns of their own, with an empty one for what there is not."""
    columns = [f"{name}_{what}" for name in table.metrics for what in ("mean", "std", "n", *["p"] * bool(table.baseline))]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["runs", "n", *columns])
    for row in table.rows:
        line = [row.name, str(row.n)]
        for cell in row.cells:
            numbers = (cell.mean if cell.values else None, cell.std)
            line += ["" if number is None else repr(number) for number in numbers] + [str(len(cell.values))]
            line += ["" if cell.p is None else repr(cell.p)] if table.baseline else []
        writer.writerow(line)
    return text.getvalue()


def _header(table: Table) -> list[str]:
    heads = [f"{metric} (%)" if "top" in metric else metric for metric in table.metrics]
    return ["runs", "n", *(head for name in heads for head in (name, *["p"] * bool(table.baseline)))]


def _body(table: Table, bold: Callable[[str], str], text: Callable[[str], str]) -> list[list[str]]:
    """The rows of a table that is read; `bold` and `text` say how the format writes bold and plain text."""
    best = [best_rows(table, column) for column in range(len(table.metrics))]
    lines = []
    for index, row in enumerate(table.rows):
        line = [text(row.name), str(row.n)]
        for column, (metric, cell) in enumerate(zip(table.metrics, row.cells, strict=True)):
            shown = text(_shown(cell, metric) + _count(len(cell.values), row.n if cell.values else 0))
            line.append(bold(shown) if index in best[column] else shown)
            if table.baseline:
                line.append("" if cell.p is None else text(_p_value(cell.p) + _count(cell.pairs, row.n)))
        lines.append(line)
    return lines


def _shown(cell: Cell, metric: str) -> str:
    """Mean ± standard deviation, or the mean alone of one seed."""
    if not cell.values:
        return "–"
    return _number(cell.mean, metric) + ("" if cell.std is None else f" ± {_number(cell.std, metric)}")


def _number(value: float, metric: str) -> str:
    """Accuracies in per cent with two decimals, the rest in four significant digits, or more before the point."""
    if "top" in metric:
        return f"{100 * value:.2f}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def _p_value(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _count(count: int, usual: int) -> str:
    """How many seeds a number is of, where they are fewer than the row's."""
    return "" if count == usual else f" (n = {count})"


def _note(table: Table) -> str:
    """What the numbers are."""
    blocks = len({row.block for row in table.rows}) > 1
    best = "the best of its column among rows of the same value" if blocks else "the best of its column"
    parts = [f"Mean ± sample standard deviation over n seeds, no spread for one; bold: {best}."]
    if any(name.startswith("last_") for name in table.metrics):
        parts.append("`last_`: the last model, otherwise the best by validation.")
    if table.baseline:
        parts.append(f"p: paired t test over common seeds against {' '.join(table.baseline.split())}, two-sided, uncorrected.")
    return " ".join(parts)


def _escaped(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in text)
