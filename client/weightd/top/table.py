"""The table of checkpoints and their processes, and the sentences about the selected row. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from rich.cells import cell_len

from weightd._sizes import size
from weightd.cli.output import device as short_device
from weightd.cli.output import plural
from weightd.cli.tables import STATES, Column
from weightd.top.checkpoint_rows import CheckpointRow, Partner, ProcessRow, TableRow, TableView, short_command
from weightd.top.columns import aligned
from weightd.top.lines import Glyphs, Line, clean, padded, plain, shortened
from weightd.top.panels import age

_COLUMNS = {
    "name": Column("CHECKPOINT", elided=True),
    "state": Column("STATE", common=True, colours=STATES),
    "device": Column("DEVICE", common=True, spare=2),
    "owner": Column("OWNER", common=True, spare=7),
    "size": Column("SIZE", right=True),
    "alone": Column("ALONE", right=True),
    "shared": Column("SHARED", right=True, spare=1),
    "with": Column("SHARES WITH", elided=True, spare=5),
    "leases": Column("LEASES", right=True, spare=4),
    "pinned": Column("PIN", spare=3),
    "used": Column("USED", right=True, spare=6),
}
_MOST_HOLDERS = 3
_NAME = 36
"""Columns that names keep in sentences."""
_MOST_PARTNERS = 3


def table(
    rows: Sequence[TableRow], view: TableView, first: int, height: int, width: int, now: datetime, glyphs: Glyphs
) -> list[Line]:
    """The head and the rows from index `first` on that fit `height` lines of `width` columns."""
    window = rows[first : first + max(height - 1, 0)]
    shown = [row.checkpoint for row in window if row.process is None]
    cells = [[clean(cell, glyphs) for cell in _cells(row, now)] for row in shown]
    columns = [column._replace(title=_title(key, column, view, glyphs)) for key, column in _COLUMNS.items()]
    title, *drawn = aligned(columns, cells, width)
    lines: list[Line] = [title]
    processes = [row.process for row in window if row.process is not None]
    widest = _process_widths(processes, glyphs)
    checkpoints = iter(drawn)
    for row in window:
        process = row.process
        line = next(checkpoints) if process is None else _process(process, widest, width, now, glyphs)
        lines.append(_marked(line, width) if row.key == view.selected else line)
    return lines


def _title(key: str, column: Column, view: TableView, glyphs: Glyphs) -> str:
    return f"{column.title}{glyphs.sorted}" if key == view.sort else column.title


def _cells(row: CheckpointRow, now: datetime) -> list[str]:
    info = row.info
    return [
        ", ".join([row.name, *info.names[1:]]),
        info.state,
        short_device(info.device),
        info.owner,
        size(info.total_bytes),
        size(info.exclusive_bytes),
        size(info.shared_bytes),
        _with(row.partners),
        str(info.leases or ""),
        "yes" if info.pinned else "",
        age(info.last_used_at, now),
    ]


def _with(partners: tuple[Partner, ...] | None) -> str:
    if partners is None:
        return "unknown"
    if len(partners) > 1:
        return f"{partners[0].name} +{len(partners) - 1}"
    return partners[0].name if partners else ""


def _marked(line: Line, width: int) -> Line:
    """The selected row, as wide as the table."""
    return ((padded(plain(line), width), "selected"),)


def _private(process: ProcessRow) -> str:
    return "private unknown" if process.private is None else f"private {size(process.private)}"


def _process_widths(processes: Sequence[ProcessRow], glyphs: Glyphs) -> tuple[int, int, int]:
    return (
        max((len(_pid(each)) for each in processes), default=0),
        max((cell_len(clean(each.user, glyphs)) for each in processes), default=0),
        max((len(_private(each)) for each in processes), default=0),
    )


def _pid(process: ProcessRow) -> str:
    return "pid ?" if process.pid is None else str(process.pid)


def _process(process: ProcessRow, widths: tuple[int, int, int], width: int, now: datetime, glyphs: Glyphs) -> Line:
    pid, user, private = widths
    start = (
        f"  {glyphs.branch} {padded(_pid(process), pid, right=True)}  {padded(clean(process.user, glyphs), user)}  "
        f"{padded(_private(process), private)}  {padded(age(process.since, now), 4, right=True)}  "
    )
    command = "loaded it, and has not attached" if process.waiting else clean(short_command(process.command), glyphs)
    return (start, "dim" if process.waiting else ""), (shortened(command, width - cell_len(start)), "dim")


def _short(name: str) -> str:
    return shortened(name, _NAME)


def about(row: TableRow | None, everything: Sequence[CheckpointRow], glyphs: Glyphs) -> str:
    """What a removal of the selected checkpoint gives back, who shares with it, and who holds it."""
    if row is None:
        return "nothing is loaded"
    text = _about_checkpoint(row.checkpoint) if row.process is None else _about_process(row.process, everything)
    return clean(text, glyphs)


def _about_checkpoint(row: CheckpointRow) -> str:
    info = row.info
    if info.state != "resident":
        return f"{_short(row.name)} is {info.state}."
    back = f"{_short(row.name)}: removing it gives back {size(info.exclusive_bytes)} of {size(info.total_bytes)}."
    return f"{back} {_about_sharing(row)} {_about_holders(row)}"


def _about_sharing(row: CheckpointRow) -> str:
    partners = row.partners
    if partners is None:
        return f"{size(row.info.shared_bytes)} are shared."
    if not partners:
        return "It shares with nobody that you may see." if row.info.shared_bytes else "It shares nothing."
    named = [f"{size(each.shared_bytes)} with {_short(each.name)}" for each in partners[:_MOST_PARTNERS]]
    more = [f"with {plural(len(partners) - len(named), 'other')}"] if len(partners) > len(named) else []
    return f"It shares {listed([*named, *more])}."


def _about_holders(row: CheckpointRow) -> str:
    pinned = "It is pinned" if row.info.pinned else ""
    held = "held by " + listed(holders(row)) if row.processes else ""
    if not pinned and not held:
        return "Nobody holds it: it may be evicted."
    return (f"{pinned} and {held}" if pinned and held else pinned or f"It is {held}") + "."


def holders(row: CheckpointRow) -> list[str]:
    """Name the first few processes that hold a checkpoint, as `pid 4242 (ada)`."""
    named = [
        f"{'an unknown process' if each.pid is None else f'pid {each.pid}'} ({each.user or '?'})"
        for each in row.processes
    ]
    shown = named[:_MOST_HOLDERS]
    return [*shown, plural(len(named) - len(shown), "other")] if len(named) > len(shown) else shown


def _about_process(process: ProcessRow, everything: Sequence[CheckpointRow]) -> str:
    held = [_short(row.name) for row in everything if any(_same(process, each) for each in row.processes)]
    copies = (
        "How much it has copied by writing to weights is not known"
        if process.private is None
        else f"It has {size(process.private)} of private copies, made by writing to weights"
    )
    who = "A process with an unknown id" if process.pid is None else f"pid {process.pid}"
    return f"{who} ({process.user or '?'}) holds {listed(held)}. {copies}. {short_command(process.command)}"


def _same(one: ProcessRow, other: ProcessRow) -> bool:
    return (one.pid is not None and (one.pid, one.user) == (other.pid, other.user)) or one.key == other.key


def listed(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else "nothing"
