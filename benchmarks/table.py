"""Rows and tables as text for a terminal and as Markdown for a file."""

from collections.abc import Mapping, Sequence

from base.text import text_table
from benchmarks.rows import BenchmarkRow, BenchmarkTable
from benchmarks.timing import Spread

HEADS = ("what", "ours", "median", "other", "median", "result (quartiles)", "goal", "met", "n")
Results = Mapping[str, Sequence[BenchmarkRow | BenchmarkTable]]
"""Comparison -> its rows and tables."""


def format_text(results: Results) -> str:
    """Every comparison under its name, rows first, then tables, then notes."""
    parts = []
    for name, found in results.items():
        rows = [item for item in found if isinstance(item, BenchmarkRow)]
        lines = [f"== {name}"]
        if rows:
            lines.append(text_table(HEADS, [_cells(row) for row in rows]))
        for table in (item for item in found if isinstance(item, BenchmarkTable)):
            lines += ["", table.title, text_table(table.heads, table.lines)]
            if table.note:
                lines.append(table.note)
        parts.append("\n".join([*lines, *_notes(rows)]))
    return "\n\n".join(parts)


def format_markdown(results: Results) -> str:
    """The same for a README: one table with the rows of all comparisons, then the other tables."""
    rows = [
        (name, row)
        for name, found in results.items()
        for row in found
        if isinstance(row, BenchmarkRow)
    ]
    tables = [
        item for found in results.values() for item in found if isinstance(item, BenchmarkTable)
    ]
    parts = []
    if rows:
        parts.append(_grid(("comparison", *HEADS), [(name, *_cells(row)) for name, row in rows]))
        parts.append("\n".join(f"- {line}" for line in _notes([row for _, row in rows])))
    for table in tables:
        parts += [f"**{table.title}**", _grid(table.heads, table.lines), table.note]
    return "\n\n".join(part for part in parts if part) + "\n"


def summary(results: Results) -> str:
    """How many goals are met, on one line."""
    verdicts = [
        row.met
        for found in results.values()
        for row in found
        if isinstance(row, BenchmarkRow) and row.met is not None
    ]
    return f"{sum(verdicts)} of {len(verdicts)} goals met"


def format_number(value: float) -> str:
    """Three significant digits; whole numbers from 100 on."""
    # From 99.95 on, three digits would round to 100.
    if abs(value) >= 99.95:
        return f"{value:.0f}"
    return f"{value:.3g}"


def _cells(row: BenchmarkRow) -> tuple[str, ...]:
    if row.result is None:
        return (row.setting, row.ours, "", "", "", f"skipped: {row.skipped}", "", "", "")
    goal, met = "", ""
    if row.goal is not None:
        goal = str(row.goal)
        met = "yes" if row.met else "NO"
    median, low, high = (
        format_number(value) for value in (row.result.median, row.result.low, row.result.high)
    )
    result = f"{median} {row.measure} ({low} to {high})"
    return (
        row.setting,
        row.ours,
        _value(row.ours_value, row.unit),
        row.other or "",
        _value(row.other_value, row.unit),
        result,
        goal,
        met,
        str(row.result.n),
    )


def _value(value: Spread | None, unit: str) -> str:
    if value is None:
        return ""
    if unit == "s" and value.median < 0.1:
        return f"{format_number(1000 * value.median)} ms"
    return f"{format_number(value.median)} {unit}"


def _notes(rows: Sequence[BenchmarkRow]) -> list[str]:
    return list(dict.fromkeys(row.note for row in rows if row.note))


def _grid(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *lines))
