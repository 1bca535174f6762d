"""Tables as lines of styled text, in columns chosen and shortened as the commands' tables are. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len

from weightd.cli.tables import Column, fit
from weightd.top.lines import Line, padded


def aligned(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int) -> list[Line]:
    """Return the head and the rows of a table that fits `width`; cells are printable already."""
    if not rows:
        return [((columns[0].title, "head"),)]
    fitted = fit(list(columns), [list(row) for row in rows], width)
    widths = [
        max(cell_len(text) for text in (column.title, *(row[at] for row in fitted.cells)))
        for at, column in enumerate(fitted.heads)
    ]
    gap = " " * fitted.gap

    def line(cells: Sequence[str], styles: Sequence[str]) -> Line:
        spans = [
            (padded(text, most, right=column.right), style)
            for text, style, most, column in zip(cells, styles, widths, fitted.heads, strict=True)
        ]
        return tuple(span for each in spans for span in (each, (gap, "")))[:-1]

    titles = [column.title for column in fitted.heads]
    return [
        line(titles, ["head"] * len(titles)),
        *(line(row, [each.colours.get(text, "") for each, text in zip(fitted.heads, row, strict=True)])
          for row in fitted.cells),
    ]  # fmt: skip
