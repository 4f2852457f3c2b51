"""Tables for the terminal."""

from collections.abc import Sequence

from base.text import one_line


def text_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align columns, two blanks apart: the first one to the left, all others to the right."""
    lines = [[one_line(cell) for cell in line] for line in (heads, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    aligned = []
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        cells[0] = line[0].ljust(widths[0])
        aligned.append("  ".join(cells))
    return "\n".join(aligned)
