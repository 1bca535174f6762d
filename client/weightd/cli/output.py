"""Format values: sizes, times and digests for people, JSON for programs, and tables without borders."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

_WIDTH = 1 << 14  # columns: wide enough that no cell is cut or folded; a terminal folds the line, as docker's does
_DIGEST = re.compile(r"(?:sha256:)?([0-9a-f]{64})")
_GPU = re.compile(r"(GPU-[0-9a-f]{8})-[0-9a-f-]+")
_UNITS = ((86400 * 365, "year"), (86400 * 30, "month"), (86400, "day"), (3600, "hour"), (60, "minute"), (1, "second"))


class StdoutClosedError(Exception):
    """The reader of the command's standard output went away."""


def printable(text: str) -> str:
    """`text` on one line, with every character that could steer a terminal or cannot be encoded escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def plural(count: int, word: str) -> str:
    """`3 checkpoints`, `1 checkpoint`."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def ago(moment: datetime | None, now: datetime | None = None) -> str:
    """`3 minutes ago`; a dash where there is no time, and `just now` for the last second or a clock that is ahead."""
    if moment is None:
        return "-"
    seconds = int(((now or datetime.now(UTC)) - moment).total_seconds())
    for length, unit in _UNITS:
        if seconds >= length:
            return f"{plural(seconds // length, unit)} ago"
    return "just now"


def digest(value: str, *, full: bool = False) -> str:
    """The first 12 hex digits of a content digest; anything that is not one, and everything if `full`, as it is."""
    match = _DIGEST.fullmatch(value)
    return value if full or match is None else match[1][:12]


def device(value: str, *, full: bool = False) -> str:
    """A GPU's UUID up to its first group; every other name as it is."""
    match = _GPU.fullmatch(value)
    return value if full or match is None else match[1]


def timestamp(moment: datetime | None) -> str | None:
    """ISO 8601 in UTC with milliseconds and Z."""
    if moment is None:
        return None
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _encode(value: object) -> str | None:
    if isinstance(value, datetime):
        return timestamp(value)
    if isinstance(value, bytes):
        return value.hex()
    raise TypeError(f"cannot write {type(value).__name__} as JSON")


def emit(text: str) -> None:
    """Write a line to stdout; raises StdoutClosedError when its reader has gone."""
    try:
        sys.stdout.write(f"{text}\n")
    except BrokenPipeError as error:
        raise StdoutClosedError from error


def flush() -> None:
    """Write out what is buffered; raises StdoutClosedError when the reader of stdout has gone."""
    try:
        sys.stdout.flush()
    except BrokenPipeError as error:
        raise StdoutClosedError from error


def emit_json_line(value: Any) -> None:
    """Write `value` to stdout as one line of JSON, at once: whoever reads it may wait for it."""
    emit(json.dumps(value, default=_encode))
    flush()


def emit_json(value: Any) -> None:
    """Write `value` to stdout as indented JSON; datetimes by `timestamp`, bytes in hex."""
    emit(json.dumps(value, indent=2, default=_encode))


def emit_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write aligned columns to stdout; a name that begins with `>` is aligned right.

    Every row is one line, uncut; where no terminal reads it, without colour.
    """
    console = Console(file=sys.stdout, width=_WIDTH, highlight=False, emoji=False, markup=False)
    if not console.is_terminal:
        console = Console(file=sys.stdout, width=_WIDTH, color_system=None)
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(
            Text(column.removeprefix(">")), justify="right" if column.startswith(">") else "left", overflow="fold"
        )
    for row in rows:
        # Text, not str: a name may hold brackets, which rich would take for markup.
        table.add_row(*(Text(printable(cell)) for cell in row))
    with console.capture() as capture:
        console.print(table)
    emit("\n".join(line.rstrip() for line in capture.get().splitlines()))
