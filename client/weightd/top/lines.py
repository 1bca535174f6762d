"""Lines of styled text, the glyphs in them, and how they are cut, wrapped and drawn as bars. Pure."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from rich.cells import cell_len

from weightd.cli.output import printable
from weightd.cli.tables import elided

Span = tuple[str, str]
"""Text, and the name of its style: a key of `widgets.STYLES`, or "" for none."""
Line = tuple[Span, ...]

_SIZE = re.compile(r"(\d) ([KMGT]?i?B\b)")
_LEAST = 3
"""Columns that `elided` needs."""


class Glyphs(NamedTuple):
    """The characters that are not letters. `parts` has one for each kind of memory, different without colours, too."""

    parts: Mapping[str, str]
    done: str
    left: str
    branch: str
    selected: str
    sorted: str
    dash: str
    plain: bool


_PARTS = ("pinned", "leased", "idle", "in flight", "holes", "pool", "free", "others")
UNICODE = Glyphs(dict(zip(_PARTS, "█▓▒»░○·×", strict=True)), "█", "·", "└", "▸", "▾", "—", plain=False)
ASCII = Glyphs(dict(zip(_PARTS, "#=-~ou.x", strict=True)), "#", ".", "-", ">", "v", "-", plain=True)


def clean(text: str, glyphs: Glyphs) -> str:
    """Escape what steers terminals, and in a plain one all that is not ASCII."""
    text = printable(text)
    return text.encode("ascii", "backslashreplace").decode("ascii") if glyphs.plain else text


def plain(line: Line) -> str:
    """Return the text of a line."""
    return "".join(text for text, _ in line)


def width_of(line: Line) -> int:
    """Return the columns that a line takes."""
    return sum(cell_len(text) for text, _ in line)


def shortened(text: str, width: int) -> str:
    """Return `text` in at most `width` columns, with its middle left out."""
    return elided(text, width) if width >= _LEAST else text[: max(width, 0)]


def padded(text: str, width: int, *, right: bool = False) -> str:
    """Fill `text` with blanks up to `width` columns."""
    fill = " " * (width - cell_len(text))
    return fill + text if right else text + fill


def wrapped(text: str, width: int, most: int, style: str = "", indent: str = "") -> list[Line]:
    """Break a sentence into at most `most` lines; `indent` is put before all but the first."""
    if most <= 0:
        return []
    broken = textwrap.wrap(
        _SIZE.sub("\\1\u00a0\\2", text),
        max(width, _LEAST),
        max_lines=most,
        placeholder=" …",
        subsequent_indent=indent,
        break_on_hyphens=False,
    )
    return [((line.replace("\u00a0", " "), style),) for line in broken]


def flowed(items: Iterable[Line], width: int, indent: str = "", gap: str = "  ") -> list[Line]:
    """Put items one after the other into lines of `width` columns; no item is broken."""
    lines: list[Line] = []
    current: list[Span] = []
    used = 0
    for item in items:
        needed = width_of(item)
        if current and used + len(gap) + needed > width:
            lines.append(tuple(current))
            current = []
        before = (gap, "") if current else (indent, "")
        used = (used if current else 0) + len(before[0]) + needed
        current += [before, *item]
    return [*lines, tuple(current)] if current else lines


def ends(left: Line, right: Line, width: int) -> Line:
    """Put one line at the left and one at the right; the right one is left out if both do not fit."""
    room = width - width_of(left) - width_of(right)
    return (*left, (" " * room, ""), *right) if room > 0 else left


def shares(parts: Sequence[int], total: int, width: int) -> list[int]:
    """Share `width` columns out to parts of a total: what is not nothing has one at least, if all of them fit."""
    if total <= 0 or width <= 0:
        return [0] * len(parts)
    edges = [0.0]
    for part in parts:
        edges.append(edges[-1] + max(part, 0) / total * width)
    columns = [round(end) - round(begin) for begin, end in pairwise(edges)]
    columns = [max(got, 1) if part > 0 else 0 for got, part in zip(columns, parts, strict=True)]
    while sum(columns) > width:
        columns[columns.index(max(columns))] -= 1
    return columns


def progress_bar(done: float, width: int, glyphs: Glyphs) -> Line:
    """Draw a bar of which the part `done` (0 to 1) is filled."""
    filled = round(min(max(done, 0.0), 1.0) * width)
    return (glyphs.done * filled, "load"), (glyphs.left * (width - filled), "dim")
