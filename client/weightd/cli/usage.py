"""The command `stats`. The keys of its JSON are a contract."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import typer

from weightd._sizes import size
from weightd.cli.context import FormatOption, OutputFormat, QuietOption, SocketOption, WideOption, open_client
from weightd.cli.listing import say_state
from weightd.cli.output import device as short_device
from weightd.cli.output import emit, emit_json, plural, printable
from weightd.cli.partners import ask, pair_json, print_pairs
from weightd.cli.tables import Column, emit_table, emit_text, terminal_width
from weightd.inspection import SharedPair
from weightd.types import DeviceStats, Stats

_COLUMNS = (
    Column("DEVICE"),
    Column("KIND", spare=10),
    Column("NAME", elided=True, spare=9),
    Column("BUDGET", right=True),
    Column("USED", right=True),
    Column("LIVE", right=True, spare=5),
    Column("PINNED", right=True),
    Column("LEASED", right=True),
    Column("EVICTABLE", right=True),
    Column("HOLES", right=True, spare=6),
    Column("REUSABLE", right=True, spare=4),
    Column("IN FLIGHT", right=True, spare=7),
    Column("FREE", right=True, spare=1),
    Column("SEGMENTS", right=True, spare=8),
)

_FIGURES = ("pinned_bytes", "leased_bytes", "evictable_bytes", "hole_bytes")


def stats(
    context: typer.Context,
    output: FormatOption = OutputFormat.TABLE,
    quiet: QuietOption = False,
    wide: WideOption = False,
    socket: SocketOption = None,
) -> None:
    """Show memory use, savings, and who shares with whom.

    EVICTABLE is what an eviction of all checkpoints that are neither pinned nor leased would free now. REUSABLE is
    freed memory that the daemon keeps: HOLES in segments that are in use, and the pool. Of pairs, ONLY THEY is what
    nobody else uses: it is freed when both have gone, beside what each has alone.

    \b
    Examples:
      weightd stats
      weightd stats --wide           all figures and pairs
      weightd stats --wide --format json | jq '.devices[].evictable_bytes'
    """
    with open_client(context, socket) as client:
        found = client.stats()
        # There may be very many pairs: not for a program that polls.
        wanted = not quiet and (wide or output is not OutputFormat.JSON)
        pairs = ask(client, every=wide) if wanted else None
    if output is OutputFormat.JSON:
        emit_json(_json(found, pairs))
        return
    if quiet:
        for device in found.devices:
            emit(printable(device.uuid))
        return
    rows = [
        (
            short_device(device.uuid, full=wide),
            device.kind,
            device.name,
            *map(size, (device.budget_bytes, device.used_bytes, device.live_bytes)),
            *_held(found, device),
            *map(size, (device.reusable_bytes, device.in_flight_bytes, device.free_bytes)),
            str(device.segments),
        )
        for device in found.devices
    ]
    width = terminal_width(wide=wide)
    emit_table(_COLUMNS, rows, width)
    if pairs is None:
        emit_text("PINNED, LEASED, EVICTABLE, HOLES and pairs are not known: the daemon is too old to say", width)
    for device in found.devices:
        if device.absence:
            emit_text(f"{device.uuid} is absent: {device.absence}", width)
        if device.device_free_bytes is not None and device.device_free_bytes < device.free_bytes:
            emit_text(
                f"{device.name} itself has {size(device.device_free_bytes)} free: other processes use the rest", width
            )
    emit("")
    emit_text(
        f"{plural(found.checkpoints, 'checkpoint')}, logical {size(found.logical_bytes)}, "
        f"resident {size(found.resident_bytes)}, saved {size(found.saved_bytes)} ({found.saved_ratio * 100:.1f} %)",
        width,
    )
    emit_text(
        f"{plural(found.blobs, 'blob')}, {plural(found.leases, 'lease')}, {plural(found.evictions, 'eviction')}, "
        f"{plural(found.digest_collisions, 'digest collision')}",
        width,
    )
    books = found.books
    if books is not None:
        most = f" of {size(books.limit_bytes)}" if books.limit_bytes else ""
        emit_text(f"books {size(books.used_bytes)}{most}: the daemon's own memory for lists of tensors", width)
    index = found.digest_index
    if index is not None and (index.problem or index.failures):
        now = f"cannot be used: {index.problem}; loads read more" if index.problem else "can be used again"
        emit_text(f"digest index {index.path} {now}, {plural(index.failures, 'failure')} since the start", width)
    print_pairs(pairs or (), width, wide=wide)
    say_state(found.state)


def _json(found: Stats, pairs: Sequence[SharedPair] | None) -> dict[str, Any]:
    """The daemon's statistics; figures that it is too old to know, and pairs that were not asked for, are null."""
    table = asdict(found)
    if not found.revision:
        for device in table["devices"]:
            device.update(dict.fromkeys(_FIGURES))
    return table | {"pairs": None if pairs is None else [pair_json(pair) for pair in pairs]}


def _held(found: Stats, device: DeviceStats) -> list[str]:
    return [size(getattr(device, figure)) if found.revision else "-" for figure in _FIGURES]
