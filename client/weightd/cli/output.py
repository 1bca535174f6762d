"""Format values: times and digests for people, and JSON for programs."""

from __future__ import annotations

import json
import re
import sys
from datetime import UTC, datetime
from typing import Any

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
