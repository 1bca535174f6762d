"""The part of `weightd inspect` about tensors that frameworks fuse: which of them lie in a row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from weightd._group_names import layers_folded
from weightd._sizes import size
from weightd.cli.output import emit, plural
from weightd.cli.tables import Column, emit_table, emit_text, terminal_width
from weightd.remembered import Row

_COLUMNS = (
    Column("GROUP", elided=True),
    Column("COMPONENT", elided=True),
    Column("IN A ROW", right=True),
    Column("SIZE", right=True),
)


def rows_json(rows: Iterable[Row], *, members: bool) -> list[dict[str, Any]]:
    """One object for each group; `members` lists the names of its tensors, of which there may be thousands."""
    return [
        {
            "component": row.component,
            "name": row.name,
            "tensors": len(row.members),
            "bytes": row.nbytes,
            "in_a_row": row.in_a_row,
            "remembered": row.remembered,
            "reason": row.reason,
        }
        | ({"members": list(row.members)} if members else {})
        for row in rows
    ]


def summary(rows: Sequence[Row]) -> str:
    """`30 of 32 in a row`."""
    return f"{sum(row.in_a_row for row in rows)} of {len(rows)} in a row"


def print_rows(rows: Sequence[Row], *, full: bool) -> None:
    """A line for the groups of all layers that are named alike, in the width of the terminal unless `full`."""
    if not rows:
        return
    alike: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        alike.setdefault((row.component, layers_folded(row.name)), []).append(row)
    cells: list[tuple[str, ...]] = [
        (
            name,
            component or "-",
            _in_a_row(same),
            size(sum(row.nbytes for row in same)),
        )
        for (component, name), same in alike.items()
    ]
    columns: tuple[Column, ...] = _COLUMNS
    if not any(row.component for row in rows):
        columns = (columns[0], *columns[2:])
        cells = [(name, *others) for name, _, *others in cells]
    emit("")
    width = terminal_width(wide=full)
    emit_table(columns, cells, width)
    _advise(rows, width)


def _in_a_row(same: Sequence[Row]) -> str:
    if all(row.reason and not row.in_a_row for row in same):
        return "never"
    return f"{sum(row.in_a_row for row in same)} of {len(same)}"


def _advise(rows: Iterable[Row], width: int | None) -> None:
    """Say what would place the rest in a row, and what would not."""
    apart = [row for row in rows if not row.in_a_row]
    never = [row for row in apart if row.reason]
    if len(apart) > len(never):
        emit(f"{plural(len(apart) - len(never), 'group')} would lie in a row after `weightd rm` and `weightd load`,")
        emit("unless other checkpoints have some of their tensors")
    for reason in dict.fromkeys(row.reason for row in never):
        emit_text(f"{plural(sum(row.reason == reason for row in never), 'group')} never: {reason}", width)
