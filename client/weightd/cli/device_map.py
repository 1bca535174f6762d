"""The command `map`: what lies where on a device. The keys of its JSON are a contract."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from weightd._sizes import size
from weightd.cli.context import (
    FormatOption,
    OutputFormat,
    QuietOption,
    SocketOption,
    WideOption,
    device_names,
    open_client,
)
from weightd.cli.output import device as short_device
from weightd.cli.output import digest, emit, emit_json, plural
from weightd.cli.tables import Column, emit_table, emit_text, terminal_width
from weightd.inspection import DeviceMap, MapExtent

_USES = {
    "alone": ("█", "#", "green", "used by one checkpoint"),
    "shared": ("▓", "=", "cyan", "shared by several checkpoints"),
    "unlisted": ("▌", "+", "yellow", "of a checkpoint that has gone: freed soon"),
    "in_flight": ("▒", ">", "magenta", "granted to loads under way"),
    "hole": ("░", ".", "", "free, for the next load"),
    "leaving": ("~", "~", "yellow", "free, being given back"),
    "hollow": ("·", "-", "", "free, without memory"),
    "set_aside": ("x", "x", "red", "set aside: others may still use it"),
    "others": ("?", "?", "", "of other users"),
}
"""What bytes are used for: its mark, that mark in ASCII, its colour, and what it means."""

_BAR, _LEAST_BAR, _WIDE_BAR = 40, 16, 96
_BESIDE_BAR = 40
"""Columns of a terminal that the other cells of a row have."""


def device_map(
    context: typer.Context,
    device: Annotated[
        str | None,
        typer.Argument(
            metavar="DEVICE",
            autocompletion=device_names,
            help="host, cuda, cuda:N, or a GPU's UUID or a prefix of it [default: the only GPU, or host].",
        ),
    ] = None,
    output: FormatOption = OutputFormat.TABLE,
    quiet: QuietOption = False,
    wide: WideOption = False,
    socket: SocketOption = None,
) -> None:
    """Show what lies where in the memory of a device.

    A segment is one piece of shared memory; its bar is as long as it is large. A mark shows what most of its part of
    the segment is used for. JSON has every extent.

    \b
    Examples:
      weightd map
      weightd map cuda:0 --wide
      weightd map --format json | jq '.extents[] | select(.kind == "hole")'
    """
    with open_client(context, socket) as client:
        found = client.device_map(device)
    if output is OutputFormat.JSON:
        emit_json(_json(found))
    elif quiet:
        for segment in found.segments:
            emit(str(segment.segment))
    else:
        _print(found, wide=wide)


def _print(found: DeviceMap, *, wide: bool) -> None:
    width = terminal_width(wide=wide)
    bar = _WIDE_BAR if wide else _BAR if width is None else max(_LEAST_BAR, min(width - _BESIDE_BAR, _WIDE_BAR))
    marks = _marks()
    inside: dict[int, list[MapExtent]] = {segment.segment: [] for segment in found.segments}
    totals: Counter[str] = Counter()
    for extent in found.extents:
        inside[extent.segment].append(extent)
        totals[_use(extent)] += extent.length
    scale = max((segment.size_bytes for segment in found.segments), default=1)
    rows = [
        (
            str(segment.segment),
            size(segment.size_bytes),
            _bar(inside[segment.segment], segment.size_bytes, -(-segment.size_bytes * bar // scale), marks),
            ", ".join(_checkpoints(found, inside[segment.segment])) or "-",
        )
        for segment in found.segments
    ]
    colours = {marks[use]: colour for use, (*_, colour, _) in _USES.items()}
    emit_text(
        f"{short_device(found.device, full=wide)}: {size(sum(totals.values()) - totals['hollow'])} in "
        f"{plural(len(found.segments), 'segment')}, {plural(len(found.names), 'checkpoint')}",
        width,
    )
    if not found.segments:
        return
    emit("")
    columns = (
        Column("SEGMENT", right=True),
        Column("SIZE", right=True),
        Column("MAP", marks=colours),
        Column("CHECKPOINTS", listed=True),
    )
    emit_table(columns, rows, width)
    emit("")
    legend = [(marks[use], size(totals[use]), meaning) for use, (*_, meaning) in _USES.items() if totals[use]]
    emit_table((Column("MARK", marks=colours), Column("SIZE", right=True), Column("IS", elided=True)), legend, width)
    if found.revision is None:
        emit_text("the daemon changed meanwhile: parts of this map are of different moments", width)


def _marks() -> dict[str, str]:
    """The mark of each use, as far as the terminal can show it."""
    blocks = "".join(block for block, *_ in _USES.values())
    try:
        blocks.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return {use: plain for use, (_, plain, *_) in _USES.items()}
    return {use: block for use, (block, *_) in _USES.items()}


def _use(extent: MapExtent) -> str:
    """What the bytes of an extent are used for."""
    if extent.kind != "blobs":
        return extent.kind if extent.kind in _USES else "others"  # a later daemon's
    users = 0 if extent.users is None else len(extent.users.checkpoints) + extent.users.others
    return ("unlisted", "alone")[users] if users < 2 else "shared"


def _bar(extents: Sequence[MapExtent], length: int, columns: int, marks: dict[str, str]) -> str:
    """A mark for each of so many equal parts of a segment: that of the use that most of it has."""
    parts: list[Counter[str]] = [Counter() for _ in range(columns)]
    for extent in extents:
        use, end = _use(extent), extent.offset + extent.length
        for at in range(extent.offset * columns // length, -(-end * columns // length)):
            low, high = max(extent.offset * columns, at * length), min(end * columns, (at + 1) * length)
            parts[at][use] += high - low
    return "".join(marks[part.most_common(1)[0][0]] for part in parts)


def _checkpoints(found: DeviceMap, extents: Sequence[MapExtent]) -> list[str]:
    """The checkpoints in a segment by name, those with most bytes first."""
    counted: Counter[str] = Counter()
    for extent in extents:
        for content_digest in extent.users.checkpoints if extent.users is not None else ():
            counted[content_digest] += extent.length
    return [found.names.get(one) or digest(one) for one, _ in counted.most_common()]


def _json(found: DeviceMap) -> dict[str, Any]:
    return {
        "device": found.device,
        "revision": found.revision,
        "segments": [segment._asdict() for segment in found.segments],
        "extents": [
            {
                "segment": extent.segment,
                "offset": extent.offset,
                "length": extent.length,
                "kind": extent.kind,
                "blobs": extent.blobs,
                "checkpoints": [] if extent.users is None else list(extent.users.checkpoints),
                "others": 0 if extent.users is None else extent.users.others,
                "load": extent.load,
            }
            for extent in found.extents
        ],
        "names": dict(found.names),
    }
