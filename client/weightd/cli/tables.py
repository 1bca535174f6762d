"""Tables without borders that fit the terminal: columns left out or said once, names shortened, lists in lines."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from weightd.cli.output import emit, flush, printable

_CONSOLE_WIDTH = 1 << 14  # columns: wide enough that rich neither cuts nor folds a cell
_CONSOLE_HEIGHT = 25
_GAP, _NARROW_GAP = 3, 2
_LEAST = 12
"""Columns that a cell keeps when it is shortened."""
_BEFORE_UNIT = re.compile(r"(?<=\d) (?=[KMGT]?i?B\b|%)")
_NO_BREAK = "\N{NO-BREAK SPACE}"
STATES: Mapping[str, str] = {
    "resident": "green",
    "serving": "green",
    "loading": "cyan",
    "draining": "yellow",
    "drained": "yellow",
    "absent": "yellow",
    "evicted": "yellow",
    "lost": "red",
}
"""Colours of the states of checkpoints, names and the daemon."""


class Column(NamedTuple):
    """A column, and what may happen to it in a terminal.

    `elided` cells are shortened. `listed` cells are names with commas between them, and are broken into lines, so that
    none is lost. A `common` column is left out where all rows agree, and its value is
    said below the table. Columns with a `spare` number above 0 are left out if the table is still too wide, the highest
    number first. `marks` are colours of single characters.
    """

    title: str
    right: bool = False
    elided: bool = False
    common: bool = False
    spare: int = 0
    colours: Mapping[str, str] = {}
    marks: Mapping[str, str] = {}
    listed: bool = False


class Fitted(NamedTuple):
    """A table in a width: the columns that are left, their cells, the gap between two, and notes about the rest."""

    heads: list[Column]
    cells: list[list[str]]
    gap: int
    notes: list[str]


def terminal_width(*, wide: bool) -> int | None:
    """Return the columns that a table may have: those of the terminal. None for no limit: a pipe, or with `wide`."""
    return None if wide or not sys.stdout.isatty() else shutil.get_terminal_size().columns


def elided(text: str, width: int) -> str:
    """Return `text` in at most `width` columns (3 or more), with its middle left out; a path keeps its last part."""
    if cell_len(text) <= width:
        return text
    end = (width - 1) // 2
    last = text[text.rstrip("/").rfind("/") :]
    if (text.startswith("/") or text.count("/") > 1) and cell_len(last) > end:
        if cell_len(last) >= width:
            return elided(last[1:], width)
        end = cell_len(last)
    return f"{_start(text, width - 1 - end)}…{_start(text[::-1], end)[::-1]}"


def emit_table(columns: Sequence[str | Column], rows: Sequence[Sequence[str]], width: int | None = None) -> None:
    """Write aligned columns to stdout, a line for each row; the name of a column aligned right may begin with `>`.

    With a `width` in columns the table fits it, and the lines below it say what was left out. Without a terminal there
    are no colours.
    """
    heads = [column if isinstance(column, Column) else _plain(column) for column in columns]
    cells = [[printable(cell) for cell in row] for row in rows]
    gap = _GAP
    notes: list[str] = []
    if width is not None:
        heads, cells, gap, notes = fit(heads, cells, width)
    console = _console()
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold")
    for head in heads:
        table.add_column(Text(head.title), justify="right" if head.right else "left", overflow="fold")
    for row in cells:
        # Text, not str: a name may hold brackets, which rich would take for markup.
        table.add_row(*(_coloured(cell, head) for head, cell in zip(heads, row, strict=True)))
    with console.capture() as capture:
        console.print(table)
    emit("\n".join(line.rstrip() for line in capture.get().splitlines()))
    for note in notes:
        emit_text(note, width)


def emit_text(text: str, width: int | None, indent: str = "") -> None:
    """Write a sentence to stdout, in lines of at most `width` columns; in one line without a width.

    All lines but the first begin with `indent`. A number and its unit stay in one line.
    """
    text = printable(text)
    if width is not None:
        whole = _BEFORE_UNIT.sub(_NO_BREAK, text)
        lines = textwrap.fill(whole, max(width, _LEAST), break_on_hyphens=False, subsequent_indent=indent)
        text = lines.replace(_NO_BREAK, " ")
    emit(text)


def emit_line(parts: Sequence[tuple[str, str]], width: int | None) -> None:
    """Write one line at once: texts with their styles, cut at `width` columns if there is one."""
    console = _console()
    line = Text.assemble(*((printable(text), style) for text, style in parts))
    if width is not None:
        line.truncate(width, overflow="ellipsis")
    with console.capture() as capture:
        console.print(line, soft_wrap=True, end="")
    emit(capture.get().rstrip())
    flush()


def _coloured(cell: str, head: Column) -> Text:
    if head.marks:
        return Text.assemble(*(("".join(same), head.marks.get(mark, "")) for mark, same in groupby(cell)))
    return Text(cell, head.colours.get(cell, ""))


def _console() -> Console:
    # With a height as well, for rich takes a dumb terminal to have 80 columns otherwise.
    console = Console(
        file=sys.stdout, width=_CONSOLE_WIDTH, height=_CONSOLE_HEIGHT, highlight=False, emoji=False, markup=False
    )
    if console.is_terminal:
        return console
    return Console(file=sys.stdout, width=_CONSOLE_WIDTH, height=_CONSOLE_HEIGHT, color_system=None)


def _plain(title: str) -> Column:
    return Column(title.removeprefix(">"), right=title.startswith(">"))


def fit(heads: list[Column], cells: list[list[str]], width: int) -> Fitted:
    """Choose and shorten the columns of rows that are printable already, so that they fit `width` columns."""
    natural = [max(cell_len(text) for text in (head.title, *column)) for head, column in _columns(heads, cells)]
    kept = list(range(len(heads)))
    same, spared = [], []
    if len(cells) > 1 or sum(natural) + _GAP * (len(heads) - 1) > width:
        same = [at for at in kept if heads[at].common and len({row[at] for row in cells}) == 1]
        kept = [at for at in kept if at not in same]
    least = [
        min(most, max(_LEAST, len(head.title))) if head.elided or head.listed else most
        for most, head in zip(natural, heads, strict=True)
    ]
    while sum(least[at] for at in kept) + _NARROW_GAP * (len(kept) - 1) > width:
        candidates = [at for at in kept if heads[at].spare]
        if not candidates:
            break
        spared.append(max(candidates, key=lambda at: heads[at].spare))
        kept.remove(spared[-1])
    gap = _GAP if sum(natural[at] for at in kept) + _GAP * (len(kept) - 1) <= width else _NARROW_GAP
    widths = _shared_out([natural[at] for at in kept], [least[at] for at in kept], width - gap * (len(kept) - 1))
    columns = [
        _fitted_column(heads[at], [row[at] for row in cells], most) for at, most in zip(kept, widths, strict=True)
    ]
    fitted = [list(row) for row in zip(*columns, strict=True)]
    notes = []
    if said := [f"{heads[at].title} {cells[0][at]}" for at in same if cells[0][at] not in ("", "-")]:
        notes.append(f"in every row: {', '.join(said)}")
    if spared:
        notes.append(f"left out: {', '.join(heads[at].title for at in sorted(spared))}; --wide shows everything")
    return Fitted([heads[at] for at in kept], fitted, gap, notes)


def _columns(heads: list[Column], cells: list[list[str]]) -> list[tuple[Column, list[str]]]:
    return [(head, [row[at] for row in cells]) for at, head in enumerate(heads)]


def _fitted_column(head: Column, texts: list[str], width: int) -> list[str]:
    if head.listed:
        return [_lines(text.split(", "), width) for text in texts]
    return _elided_column(texts, width) if head.elided else texts


def _lines(names: list[str], width: int) -> str:
    """Return names in lines of at most `width` columns, with commas between them; only a longer name is shortened."""
    lines: list[str] = []
    for number, name in enumerate(names, start=1):
        comma = "," if number < len(names) else ""
        word = f"{elided(name, width - len(comma))}{comma}"
        if lines and cell_len(lines[-1]) + 1 + cell_len(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join(lines)


def _elided_column(texts: list[str], width: int) -> list[str]:
    """Return the cells of a column in at most `width` columns; what differs between long cells stays, if it fits."""
    whole = len(set(texts))
    found = [elided(text, width) for text in texts]
    long = [text for text in set(texts) if cell_len(text) > width]
    start = max(_common(long).rfind("/"), 0)
    end = max(_common([text[:start:-1] for text in long]).rfind("/") + 1, 0)
    for first, last in ((start, 0), (start, end)):
        if len(set(found)) == whole:
            break
        found = [
            elided(f"{'…' if first else ''}{text[first : len(text) - last]}{'…' if last else ''}", width)
            if text in long
            else text
            for text in texts
        ]
    return found


def _common(texts: list[str]) -> str:
    """Return the beginning that all texts share, by characters: they may be names, not paths."""
    return os.path.commonprefix(texts)  # noqa: RUF071 - characters are what is wanted


def _shared_out(natural: list[int], least: list[int], room: int) -> list[int]:
    """Return a width for each column: its least, and what room is left in turns, to those that need more."""
    widths = list(least)
    left = room - sum(widths)
    while left > 0 and (short := [at for at, most in enumerate(natural) if widths[at] < most]):
        widths[min(short, key=widths.__getitem__)] += 1
        left -= 1
    return widths


def _start(text: str, width: int) -> str:
    """Return as much of the beginning of `text` as fits."""
    used = 0
    for at, character in enumerate(text):
        used += cell_len(character)
        if used > width:
            return text[:at]
    return text
