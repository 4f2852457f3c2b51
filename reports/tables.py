"""Tables of results: means and standard deviations over seeds, tests against a baseline row.

`compare` makes a `Table` from groups of runs, and `write_table` writes it in one of three formats.
"""

import csv
import io
import logging
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite, isnan, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from base.errors import ConfigError
from base.meters import is_accuracy, is_loss
from base.output import format_of, write_output, writing
from base.run_folder.environment import PROVENANCE
from base.text import csv_text, one_line
from reports.groups import Group, mean_and_std
from reports.runs import LAST_EPOCH, REPORT, Run, check_known

logger = logging.getLogger(__name__)

FORMATS = ("md", "tex", "csv")
RESULTS = ("test_top1", "last_test_top1", "test_robust_top1", "last_test_robust_top1")
"""The default columns: test accuracies of the best and of the last model. Columns that no run has
are left out."""

# Rounding alone can make a difference of 1e-16 between equal accuracies.
NO_SPREAD = 1e-12
"""Values that lie closer together count as equal, so that they have no spread."""

LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    # At the start of a row, LaTeX would take these for arguments of the line break before it
    "[": "{[}", "*": "{*}",
    "±": r"$\pm$",
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One metric of one group.

    Attributes:
        values: seed -> value, as it stands in the run's files; NaN if it was not finite. Without
            the seeds that have none.
        p: two-sided p value of the test against the baseline row, corrected for the other rows of
            the table (see `holm`); None without a test.
        compared: the number of this cell's seeds that the test uses.
    """

    values: dict[int, float]
    p: float | None = None
    compared: int = 0

    @property
    def mean(self) -> float:
        """The mean over seeds; NaN without any."""
        return mean_and_std([*self.values.values()])[0]

    @property
    def std(self) -> float | None:
        """The sample standard deviation over seeds; None for fewer than two."""
        if len(self.values) < 2:
            return None
        return mean_and_std([*self.values.values()])[1]

    @property
    def error(self) -> float | None:
        """The standard error of the mean, std / sqrt(n); None for fewer than two seeds."""
        if self.std is None:
            return None
        return self.std / sqrt(len(self.values))


@dataclass(frozen=True)
class Row:
    """One group.

    Attributes:
        name: the group's name.
        n: its number of seeds.
        cells: one for every metric.
        block: rows are compared only with rows of the same block.
    """

    name: str
    n: int
    cells: tuple[Cell, ...]
    block: Any = None


@dataclass(frozen=True)
class Table:
    """Groups as rows, metrics as columns.

    Attributes:
        metrics: names as `Run.outcome` takes them.
        rows: in the order of the groups.
        baseline: the name of the row that all others are tested against; None for no tests.
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
            (values as in the run's files, in full precision); `base.output` lists the other places
            to write to.
        table: from `compare`.

    Raises:
        ConfigError: the suffix is unknown or the path cannot be written.
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
    """Put groups side by side, and test them against one of them.

    The test is Welch's (`scipy.stats.ttest_ind_from_stats` with unequal variances), or the paired
    t test (`ttest_rel`) over common seeds. Two runs of one seed start with equal weights and data
    but diverge within a few epochs, so pairing gains nothing unless the runs are short or nearly
    alike. All p values are two-sided. `holm` corrects them over the rows of the table, separately
    for each metric. A p value needs at least two seeds on either side, none of them without a
    value, and a spread on at least one side. A warning names the runs without a value, and those
    whose value is not finite.

    Args:
        groups: groups of finished runs.
        metrics: names as `Run.outcome` takes them; `last_` columns are moved beside those of the
            best model. None for `RESULTS`.
        baseline: the name of the group that every other one is tested against.
        by_last_key: compare only groups with equal values of the last key, such as the rate of
            noise; the baseline is then named by the other keys.
        paired: pair the runs of equal seeds.

    Raises:
        ConfigError: no run has a metric, or the baseline is unknown.
    """
    runs = [run for group in groups for run in group.runs]
    metrics = last_beside_best(_known_metrics(runs, metrics))
    names = [group.name for group in groups]
    blocks: list[Any] = [None] * len(groups)
    if by_last_key:
        names = [group.line for group in groups]
        blocks = [group.values[-1] for group in groups]
    if baseline is not None:
        check_known("--baseline", [baseline], names, "no such row")
    # Without a baseline, no row has an opponent, and no cell gets a p value.
    baselines = {
        block: group
        for name, block, group in zip(names, blocks, groups, strict=True)
        if name == baseline
    }
    opponents = [
        None if name == baseline else baselines.get(block)
        for name, block in zip(names, blocks, strict=True)
    ]
    for metric in metrics:
        for group in groups:
            _warn_of_missing(group, metric)
    columns = [_column(groups, opponents, metric, paired) for metric in metrics]
    rows = [
        Row(group.name, len(group.runs), cells, block)
        for group, cells, block in zip(groups, zip(*columns, strict=True), blocks, strict=True)
    ]
    return Table(tuple(metrics), tuple(rows), baseline, paired)


def _known_metrics(runs: Sequence[Run], metrics: Sequence[str] | None) -> Sequence[str]:
    """Check the requested metrics, or choose those of `RESULTS` that a run has."""
    known = list(
        dict.fromkeys(name for run in runs for name in run.result or {} if name not in PROVENANCE)
    )
    if metrics is None:
        metrics = [name for name in RESULTS if name in known]
        if not metrics:
            raise ConfigError(
                f"--result: no run has any of {', '.join(RESULTS)};"
                f" choose from: {', '.join(known) or 'nothing, as every result.json is empty'}"
            )
    for metric in metrics:
        if not metric.startswith((LAST_EPOCH, REPORT)):
            check_known("--result", [metric], known, "no result.json has it")
        elif all(run.outcome(metric) is None for run in runs):
            raise ConfigError(f"--table: no run has {metric}")
    return metrics


def _warn_of_missing(group: Group, metric: str) -> None:
    outcomes = [(run.folder, run.outcome(metric)) for run in group.runs]
    missing = [str(folder) for folder, value in outcomes if value is None]
    # A row without any value says so by itself
    if 0 < len(missing) < len(outcomes):
        logger.warning(
            "%s: only %d of %d runs have %s, so it is neither bold nor tested; without it: %s",
            group.name, len(outcomes) - len(missing), len(outcomes), metric, ", ".join(missing),
        )  # fmt: skip
    for folder, value in outcomes:
        if value is not None and not isfinite(value):
            logger.warning("%s: %s is not finite: the run has diverged", folder, metric)


def _column(
    groups: Sequence[Group], opponents: Sequence[Group | None], metric: str, paired: bool
) -> list[Cell]:
    """Make the cells of one metric, each tested against the opponent of its group."""
    test = _paired_test if paired else _welch_test
    cells = []
    comparisons: list[Hashable] = []
    for group, opponent in zip(groups, opponents, strict=True):
        own = _values(group, metric)
        other = _values(opponent, metric)
        p, compared = test(own, other)
        # The seeds without a value may be those that went wrong
        if not (_is_complete(own, group) and _is_complete(other, opponent)):
            p = None
        cells.append(Cell(own, p, compared))
        comparisons.append((_as_key(own), _as_key(other)))
    # A run may stand in two rows. Equal comparisons are one test, so they count once.
    corrected = holm(
        {key: cell.p for key, cell in zip(comparisons, cells, strict=True) if cell.p is not None}
    )
    return [
        cell if cell.p is None else replace(cell, p=corrected[key])
        for key, cell in zip(comparisons, cells, strict=True)
    ]


def holm(p_values: Mapping[Hashable, float]) -> dict[Hashable, float]:
    """Correct p values for the number of tests (Holm, 1979).

    The i-th smallest of m p values becomes max over j <= i of min(1, (m - j + 1) p_j). With a
    level of 5 %, the probability that any true null hypothesis is rejected is then at most 5 %.

    Args:
        p_values: comparison -> its own p value.
    """
    corrected: dict[Hashable, float] = {}
    largest = 0.0
    for rank, (key, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        corrected[key] = largest
    return corrected


def last_beside_best(metrics: Sequence[str]) -> list[str]:
    """Move each metric of the last model behind that of the best model."""
    bases = list(dict.fromkeys(metric.removeprefix("last_") for metric in metrics))
    return sorted(
        dict.fromkeys(metrics),
        key=lambda name: (bases.index(name.removeprefix("last_")), name.startswith("last_")),
    )


def best_rows(table: Table, column: int) -> set[int]:
    """Return the indices of the rows that are printed in bold in a column.

    The best row of a block has the highest accuracy or the lowest loss, and leads every other row
    by more than a standard error of the difference of the means. Rows with equal values are bold
    together. A column that is neither an accuracy nor a loss has no best row. Neither has a block
    whose best row lacks the value of a seed, or in which the best row and another one have a single
    seed each, because the standard error of their difference is unknown.
    """
    metric = table.metrics[column]
    found: set[int] = set()
    if is_accuracy(metric):
        sign = 1
    elif is_loss(metric):
        sign = -1
    else:
        return found
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
            sign * (best.mean - cell.mean) > max(NO_SPREAD, _error_of_difference(best, cell))
            for cell in others
        ):
            found |= {
                index
                for index, cell in cells.items()
                if cell.values == best.values and len(cell.values) == table.rows[index].n
            }
    return found


def _error_of_difference(first: Cell, second: Cell) -> float:
    """Return the standard error of the difference of two means; infinite if both are unknown.

    The error of a single seed is unknown and counts as zero beside a known one.
    """
    known = [cell.error for cell in (first, second) if cell.error is not None]
    if not known:
        return inf
    return sqrt(sum(error**2 for error in known))


def _values(group: Group | None, metric: str) -> dict[int, float]:
    """Return seed -> value of the runs that have one."""
    if group is None:
        return {}
    outcomes = {run.seed: run.outcome(metric) for run in group.runs}
    return {seed: value for seed, value in outcomes.items() if value is not None}


def _is_complete(values: dict[int, float], group: Group | None) -> bool:
    return group is None or len(values) == len(group.runs)


def _as_key(values: dict[int, float]) -> Hashable:
    return tuple(sorted(values.items()))


def _welch_test(own: dict[int, float], other: dict[int, float]) -> tuple[float | None, int]:
    """Return the p value of Welch's t test and the number of own seeds."""
    first, second = (np.array([*values.values()]) for values in (own, other))
    if min(len(first), len(second)) < 2 or not np.isfinite([*first, *second]).all():
        return None, len(first)
    if max(np.ptp(first), np.ptp(second)) < NO_SPREAD:
        return None, len(first)
    # Importing scipy.stats takes about a second, and most tables need no test
    from scipy.stats import ttest_ind_from_stats

    # From moments, because `ttest_ind` warns if one side has no spread
    moments = [
        number for side in (first, second) for number in (side.mean(), side.std(ddof=1), len(side))
    ]
    return float(ttest_ind_from_stats(*moments, equal_var=False).pvalue), len(first)


def _paired_test(own: dict[int, float], other: dict[int, float]) -> tuple[float | None, int]:
    """Return the p value of the paired t test and the number of pairs."""
    seeds = sorted(own.keys() & other.keys())
    first, second = (np.array([values[seed] for seed in seeds]) for values in (own, other))
    differences = first - second
    if len(seeds) < 2 or not np.isfinite(differences).all() or np.ptp(differences) < NO_SPREAD:
        return None, len(seeds)
    from scipy.stats import ttest_rel

    return float(ttest_rel(first, second).pvalue), len(seeds)


def _markdown(table: Table) -> str:
    header = [_in_markdown(head) for head in _header(table)]
    alignment = ["---", *["---:"] * (len(header) - 1)]
    body = _body(table, bold="**{}**".format, text=_in_markdown)
    lines = [f"| {' | '.join(line)} |\n" for line in (header, alignment, *body)]
    return "".join(lines) + f"\n{_note(table, _in_markdown)}\n"


def _latex(table: Table) -> str:
    lines = [[_escaped(head) for head in _header(table)]]
    lines += _body(table, bold=r"\textbf{{{}}}".format, text=_escaped)
    first, *others = (" & ".join(line) + r" \\" for line in lines)
    columns = "l" + "r" * (len(lines[0]) - 1)
    parts = [
        f"% {_note(table, one_line)}",
        r"% needs \usepackage{booktabs}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        first,
        r"\midrule",
        *others,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(parts) + "\n"


def _csv(table: Table) -> str:
    """Write plain numbers, as in the runs' files, one per column; a missing one is left empty."""
    parts = ["mean", "std", "n"]
    if table.baseline:
        parts.append("p_holm")
    columns = [f"{name}_{part}" for name in table.metrics for part in parts]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["runs", "n", *map(csv_text, columns)])
    for row in table.rows:
        # The csv module writes None as an empty field, and a float with all its digits
        line: list[Any] = [csv_text(row.name), row.n]
        for cell in row.cells:
            if cell.values:
                line += [cell.mean, cell.std, len(cell.values)]
            else:
                line += [None, None, 0]
            if table.baseline:
                line.append(cell.p)
        writer.writerow(line)
    return text.getvalue()


def _header(table: Table) -> list[str]:
    heads = ["runs", "n"]
    for metric in table.metrics:
        if is_accuracy(metric):
            heads.append(f"{metric} (%)")
        else:
            heads.append(metric)
        if table.baseline:
            heads.append("p (Holm)")
    return heads


def _body(table: Table, bold: Callable[[str], str], text: Callable[[str], str]) -> list[list[str]]:
    """Format the rows of a table for readers.

    Args:
        table: from `compare`.
        bold: formats bold text.
        text: escapes plain text.
    """
    best = [best_rows(table, column) for column in range(len(table.metrics))]
    lines = []
    for index, row in enumerate(table.rows):
        line = [text(row.name), str(row.n)]
        for column, (metric, cell) in enumerate(zip(table.metrics, row.cells, strict=True)):
            shown = text(_format_cell(cell, metric, row.n))
            if index in best[column]:
                shown = bold(shown)
            line.append(shown)
            if table.baseline:
                line.append(text(_format_p_value(cell, row.n)))
        lines.append(line)
    return lines


def _format_cell(cell: Cell, metric: str, n: int) -> str:
    """Format mean ± standard deviation, without the latter for a single seed."""
    if not cell.values:
        return "–"
    shown = _format_number(cell.mean, metric)
    if cell.std is not None and not isnan(cell.std):
        shown += f" ± {_format_number(cell.std, metric)}"
    return shown + _format_count(len(cell.values), n)


def _format_number(value: float, metric: str) -> str:
    """Format accuracies in percent with two decimals, and other values with four significant
    digits."""
    if is_accuracy(metric):
        return f"{100 * value:.2f}"
    if abs(value) < 1000:
        return f"{value:.4g}"
    # `.4g` would write 12345 as 1.234e+04
    return f"{value:.0f}"


def _format_p_value(cell: Cell, n: int) -> str:
    if cell.p is None:
        return ""
    shown = "<0.001"
    if cell.p >= 0.001:
        shown = f"{cell.p:.3f}"
    return shown + _format_count(cell.compared, n)


def _format_count(count: int, n: int) -> str:
    """Format the number of seeds behind a value if it differs from the row's n."""
    if count == n:
        return ""
    return f" (n = {count})"


def _note(table: Table, text: Callable[[str], str]) -> str:
    """Explain the numbers of a table."""
    best = "the best accuracy or loss of its column"
    if len({row.block for row in table.rows}) > 1:
        best += " among rows of the same value"
    parts = [
        "Mean ± sample standard deviation over n seeds, no spread for one;"
        f" bold: {best}, by more than one standard error of the difference."
    ]
    if any(name.startswith("last_") and not name.startswith(LAST_EPOCH) for name in table.metrics):
        parts.append("`last_`: the last model, otherwise the best by validation.")
    if any(name.startswith(LAST_EPOCH) for name in table.metrics):
        parts.append(f"`{LAST_EPOCH}`: as logged in the last epoch.")
    reported = [name for name in table.metrics if name.startswith(REPORT)]
    if reported:
        parts.append(f"`{REPORT}`: from that report of `eval/`.")
    if any(name.rpartition(".")[2] == "robust_top1" for name in reported):
        parts.append("`robust_top1`: top-1 accuracy under attack.")
    if table.baseline:
        test = "paired t test over common seeds" if table.paired else "Welch's t test"
        parts.append(
            f"p: {test} against {text(table.baseline)}, two-sided,"
            " Holm-corrected over the table's rows."
        )
    return " ".join(parts)


def _in_markdown(text: str) -> str:
    """Escape what Markdown would read as markup."""
    # Underscores inside a word are not markup
    return re.sub(r"([\\`*|<\[\]~]|(?<!\w)_|_(?!\w))", r"\\\1", one_line(text))


def _escaped(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in one_line(text))
