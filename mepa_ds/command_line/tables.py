"""Tables that commands print."""

from __future__ import annotations

from collections.abc import Sequence

from mepa_ds.safety.text import printable


def aligned(rows: Sequence[Sequence[str]], left: int = 0) -> list[str]:
    """Returns a line for each row of cells, in columns as wide as their widest cell.

    The first `left` columns are flush left, the others flush right.

    All rows have as many cells as the first, which is the heading. What would not be seen in a cell is an escape.
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
