"""Tables of results: means and spreads over seeds, the best in bold, and tests against a baseline
row."""

import csv
import io
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from base.errors import ConfigError
from base.meters import is_accuracy
from base.output import format_of, write_output, writing
from base.run_folder.environment import PROVENANCE
from base.text import csv_text, one_line
from reports.groups import Group, mean_and_std
from reports.runs import LAST_EPOCH, REPORT, refuse_unknown

FORMATS = ("md", "tex", "csv")
RESULTS = ("test_top1", "last_test_top1", "test_robust_top1", "last_test_robust_top1")
"""What a table shows unless it is told otherwise, of what the runs have: test accuracies of the
best and of the last model."""
P_HEAD, P_COLUMN = "p (Holm)", "p_holm"
NO_SPREAD = 1e-12
"""Numbers that lie closer together are equal: they say nothing of their spread."""
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
        values: seed -> value, as it stands in the run's files.
        p: two-sided p value of the test against the baseline row, corrected for the other rows of
            the table (see `holm`); None where there is none.
        compared: how many seeds of this cell that test uses.
    """

    values: dict[int, float]
    p: float | None = None
    compared: int = 0

    @property
    def mean(self) -> float:
        """Over seeds; NaN where there are none."""
        return mean_and_std([*self.values.values()])[0]

    @property
    def std(self) -> float | None:
        """Sample standard deviation over seeds; None where there are fewer than two."""
        return mean_and_std([*self.values.values()])[1] if len(self.values) > 1 else None

    @property
    def error(self) -> float | None:
        """The standard error of the mean; None where there are fewer than two seeds."""
        return None if self.std is None else self.std / sqrt(len(self.values))


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
        metrics: names as `Run.outcome` knows them.
        rows: in the order of the groups.
        baseline: name of the row that all others are tested against; None for no tests.
        paired: whether these tests pair the runs of equal seeds.
    """

    metrics: tuple[str, ...]
    rows: tuple[Row, ...]
    baseline: str | None = None
    paired: bool = False


def write_table(path: str | Path, table: Table) -> None:
    """Write a table of means ± sample standard deviations over seeds, and their number.

    Args:
        path: the suffix decides the format: `.md`, `.tex` (a `tabular` with booktabs) or `.csv`
            (values as in the run's files, in full precision); `base.output` says what else it may
            be.
        table: of `compare`.

    Raises:
        ConfigError: another suffix, or a path that cannot be written.
    """
    layout = {"md": _markdown, "tex": _latex, "csv": _csv}[format_of(path, FORMATS)]
    with writing(path):
        write_output(path, layout(table).encode())


def compare(
    groups: Sequence[Group],
    metrics: Sequence[str] | None = None,
    baseline: str | None = None,
    by_last_key: bool = False,
    paired: bool = False,
) -> Table:
    """Groups beside each other, and tested against one of them.

    The test is Welch's (`scipy.stats.ttest_ind_from_stats` with unequal variances), or the paired t
    test (`ttest_rel`) over common seeds. Two runs of one seed begin with equal weights and data,
    but part within a few epochs, so pairing gains nothing unless the runs are short or nearly
    alike. All p values are two-sided, and corrected over the rows of the table by `holm`, each
    metric by itself. There is none with fewer than two seeds on either side, or where no number
    shows a spread.

    Args:
        groups: of finished runs.
        metrics: names as `Run.outcome` knows them; that of the last model is put beside that of the
            best. None for `RESULTS`.
        baseline: name of the group that every other one is tested against.
        by_last_key: compare only groups with equal values of the last key they are grouped by, such
            as a rate of noise; the baseline is then named by the other keys.
        paired: pair the runs of equal seeds.

    Raises:
        ConfigError: a metric that no run has, or an unknown baseline.
    """
    runs = [run for group in groups for run in group.runs]
    known = list(
        dict.fromkeys(name for run in runs for name in run.result or {} if name not in PROVENANCE)
    )
    if metrics is None:
        metrics = [name for name in RESULTS if name in known]
        if not metrics:
            raise ConfigError(
                f"--result: the runs have none of {', '.join(RESULTS)}; name others of: {', '.join(known)}"
            )
    for metric in metrics:
        if not metric.startswith((LAST_EPOCH, REPORT)):
            refuse_unknown("--result", [metric], known, "no result.json has it")
        elif all(run.outcome(metric) is None for run in runs):
            raise ConfigError(f"--result {metric}: no run has it")
    names = [group.line if by_last_key else group.name for group in groups]
    blocks = [group.values[-1] if by_last_key else None for group in groups]
    if baseline is not None:
        refuse_unknown("--baseline", [baseline], names, "no such row")
    metrics = last_beside_best(metrics)
    values = [[_values(group, metric) for metric in metrics] for group in groups]
    baselines = {
        block: row
        for name, block, row in zip(names, blocks, values, strict=True)
        if name == baseline
    }
    test = _paired_test if paired else _welch_test
    columns = []
    for column in range(len(metrics)):
        tests: list[tuple[Hashable, float | None, int]] = []
        for name, block, row in zip(names, blocks, values, strict=True):
            own = row[column]
            other = baselines[block][column] if name != baseline and block in baselines else {}
            tests.append(((_as_key(own), _as_key(other)), *test(own, other)))
        corrected = holm({key: p for key, p, _ in tests if p is not None})
        columns.append(
            [
                Cell(row[column], None if p is None else corrected[key], compared)
                for row, (key, p, compared) in zip(values, tests, strict=True)
            ]
        )
    rows = [
        Row(group.name, len(group.runs), cells, block)
        for group, cells, block in zip(groups, zip(*columns, strict=True), blocks, strict=True)
    ]
    return Table(tuple(metrics), tuple(rows), baseline, paired)


def holm(p_values: Mapping[Hashable, float]) -> dict[Hashable, float]:
    """Each p value corrected for the number of them (Holm, 1979): the probability that a true null
    hypothesis is rejected anywhere among them stays below the level.

    Args:
        p_values: comparison -> its own p value. A comparison that a table shows twice is one here.
    """
    corrected: dict[Hashable, float] = {}
    largest = 0.0
    for rank, (key, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        corrected[key] = largest
    return corrected


def last_beside_best(metrics: Sequence[str]) -> list[str]:
    """Metrics in the order given, but that of the last model right behind that of the best."""
    bases = list(dict.fromkeys(metric.removeprefix("last_") for metric in metrics))
    return sorted(
        dict.fromkeys(metrics),
        key=lambda name: (bases.index(name.removeprefix("last_")), name.startswith("last_")),
    )


def best_rows(table: Table, column: int) -> set[int]:
    """The row with the best mean of a column in its block, the highest accuracy or the lowest loss,
    where it leads every other one by more than a standard error of their difference; a row that
    stands twice may be two of them.

    None of a column that is neither, and none where a lead cannot be judged, as both rows have one
    seed only.
    """
    metric, found = table.metrics[column], set()
    if not (is_accuracy(metric) or "loss" in metric):
        return found
    sign = 1 if is_accuracy(metric) else -1
    for block in dict.fromkeys(row.block for row in table.rows):
        cells = {
            index: row.cells[column] for index, row in enumerate(table.rows) if row.block == block
        }
        cells = {index: cell for index, cell in cells.items() if np.isfinite(cell.mean)}
        if len(cells) < 2:
            continue
        best = max(cells.values(), key=lambda cell: sign * cell.mean)
        others = [cell for cell in cells.values() if cell.values != best.values]
        if others and all(
            sign * (best.mean - cell.mean) > _error_of_difference(best, cell) for cell in others
        ):
            found |= {index for index, cell in cells.items() if cell.values == best.values}
    return found


def _error_of_difference(first: Cell, second: Cell) -> float:
    """The standard error of the difference of two means, as far as it is known; infinite where
    neither cell shows a spread."""
    known = [cell.error for cell in (first, second) if cell.error is not None]
    return sqrt(sum(error**2 for error in known)) if known else inf


def _values(group: Group, metric: str) -> dict[int, float]:
    return {run.seed: value for run in group.runs if (value := run.outcome(metric)) is not None}


def _as_key(values: dict[int, float]) -> Hashable:
    return tuple(sorted(values.items()))


def _welch_test(own: dict[int, float], other: dict[int, float]) -> tuple[float | None, int]:
    """p value and number of own seeds."""
    first, second = (np.array([*values.values()]) for values in (own, other))
    if min(len(first), len(second)) < 2 or not np.isfinite([*first, *second]).all():
        return None, len(first)
    if max(np.ptp(first), np.ptp(second)) < NO_SPREAD:
        return None, len(first)
    from scipy.stats import ttest_ind_from_stats

    moments = [
        number for side in (first, second) for number in (side.mean(), side.std(ddof=1), len(side))
    ]
    return float(ttest_ind_from_stats(*moments, equal_var=False).pvalue), len(first)


def _paired_test(own: dict[int, float], other: dict[int, float]) -> tuple[float | None, int]:
    """p value and number of pairs."""
    seeds = sorted(own.keys() & other.keys())
    first, second = (np.array([values[seed] for seed in seeds]) for values in (own, other))
    differences = first - second
    if len(seeds) < 2 or not np.isfinite(differences).all() or np.ptp(differences) < NO_SPREAD:
        return None, len(seeds)
    from scipy.stats import ttest_rel

    return float(ttest_rel(first, second).pvalue), len(seeds)


def _markdown(table: Table) -> str:
    lines = [
        [_in_markdown(head) for head in _header(table)],
        ["---", *["---:"] * (len(_header(table)) - 1)],
    ]
    lines += _body(table, bold="**{}**".format, text=_in_markdown)
    return (
        "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n{_note(table, _in_markdown)}\n"
    )


def _latex(table: Table) -> str:
    lines = [[_escaped(head) for head in _header(table)]]
    lines += _body(table, bold=r"\textbf{{{}}}".format, text=_escaped)
    first, *others = (" & ".join(line) + r" \\" for line in lines)
    columns = "l" + "r" * (len(lines[0]) - 1)
    parts = [r"\toprule", first, r"\midrule", *others, r"\bottomrule"]
    comment = f"% {_note(table, one_line)}\n% needs \\usepackage{{booktabs}}\n"
    return (
        comment + "\n".join([rf"\begin{{tabular}}{{{columns}}}", *parts, r"\end{tabular}"]) + "\n"
    )


def _csv(table: Table) -> str:
    """Numbers only, as they are in the runs' files, in columns of their own, with an empty one for
    what there is not."""
    columns = [
        f"{name}_{what}"
        for name in table.metrics
        for what in ("mean", "std", "n", *[P_COLUMN] * bool(table.baseline))
    ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["runs", "n", *map(csv_text, columns)])
    for row in table.rows:
        line = [csv_text(row.name), str(row.n)]
        for cell in row.cells:
            numbers = (cell.mean if cell.values else None, cell.std)
            line += ["" if number is None else repr(number) for number in numbers] + [
                str(len(cell.values))
            ]
            line += ["" if cell.p is None else repr(cell.p)] if table.baseline else []
        writer.writerow(line)
    return text.getvalue()


def _header(table: Table) -> list[str]:
    heads = [f"{metric} (%)" if is_accuracy(metric) else metric for metric in table.metrics]
    return [
        "runs",
        "n",
        *(head for name in heads for head in (name, *[P_HEAD] * bool(table.baseline))),
    ]


def _body(table: Table, bold: Callable[[str], str], text: Callable[[str], str]) -> list[list[str]]:
    """The rows of a table that is read; `bold` and `text` say how the format writes bold and plain
    text."""
    best = [best_rows(table, column) for column in range(len(table.metrics))]
    lines = []
    for index, row in enumerate(table.rows):
        line = [text(row.name), str(row.n)]
        for column, (metric, cell) in enumerate(zip(table.metrics, row.cells, strict=True)):
            shown = text(
                _shown(cell, metric) + _count(len(cell.values), row.n if cell.values else 0)
            )
            line.append(bold(shown) if index in best[column] else shown)
            if table.baseline:
                line.append(
                    "" if cell.p is None else text(_p_value(cell.p) + _count(cell.compared, row.n))
                )
        lines.append(line)
    return lines


def _shown(cell: Cell, metric: str) -> str:
    """Mean ± standard deviation, or the mean alone of one seed."""
    if not cell.values:
        return "–"
    return _number(cell.mean, metric) + (
        "" if cell.std is None else f" ± {_number(cell.std, metric)}"
    )


def _number(value: float, metric: str) -> str:
    """Accuracies in per cent with two decimals, the rest in four significant digits, or more before
    the point."""
    if is_accuracy(metric):
        return f"{100 * value:.2f}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def _p_value(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _count(count: int, usual: int) -> str:
    """How many seeds a number is of, where they are fewer than the row's."""
    return "" if count == usual else f" (n = {count})"


def _note(table: Table, text: Callable[[str], str]) -> str:
    """What the numbers are."""
    blocks = len({row.block for row in table.rows}) > 1
    best = (
        "the best of its column among rows of the same value"
        if blocks
        else "the best of its column"
    )
    parts = [
        "Mean ± sample standard deviation over n seeds, no spread for one;"
        f" bold: {best}, by more than one standard error of the difference."
    ]
    if any(name.startswith("last_") and not name.startswith(LAST_EPOCH) for name in table.metrics):
        parts.append("`last_`: the last model, otherwise the best by validation.")
    if any(name.startswith(LAST_EPOCH) for name in table.metrics):
        parts.append(f"`{LAST_EPOCH}`: as logged in the last epoch.")
    if any(name.startswith(REPORT) for name in table.metrics):
        parts.append(f"`{REPORT}`: top-1 accuracy under attack in that report of `eval/`.")
    if table.baseline:
        test = "paired t test over common seeds" if table.paired else "Welch's t test"
        parts.append(
            f"p: {test} against {text(table.baseline)}, two-sided,"
            " Holm-corrected over the table's rows."
        )
    return " ".join(parts)


def _in_markdown(text: str) -> str:
    """Text without what Markdown would read as its own signs; underscores inside of words are
    none."""
    return re.sub(r"([\\`*|<\[\]~]|(?<!\w)_|_(?!\w))", r"\\\1", one_line(text))


def _escaped(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in one_line(text))
