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
from weightd.cli.pairs import DeviceHolds, SharedPair, SharingReport, sharing
from weightd.cli.tables import Column, emit_table, emit_text, terminal_width
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
    Column("REUSABLE", right=True, spare=4),
    Column("IN FLIGHT", right=True, spare=7),
    Column("FREE", right=True, spare=1),
    Column("SEGMENTS", right=True, spare=8),
)
_PAIR_COLUMNS = (
    Column("SHARED", right=True),
    Column("BETWEEN", elided=True),
    Column("AND", elided=True),
    Column("COMPONENTS", elided=True, common=True, spare=1),
    Column("DEVICE", common=True, spare=2),
)
_NOTHING = DeviceHolds(0, 0, 0)
_MOST_PAIRS = 10
"""Pairs that the table has; --wide prints all."""


def stats(
    context: typer.Context,
    output: FormatOption = OutputFormat.TABLE,
    quiet: QuietOption = False,
    wide: WideOption = False,
    socket: SocketOption = None,
) -> None:
    """Show memory use, savings, and who shares with whom.

    EVICTABLE is what an eviction of all checkpoints that are neither pinned nor leased would free; REUSABLE is freed
    memory that the daemon keeps: holes in segments, and the pool.

    \b
    Examples:
      weightd stats
      weightd stats --wide           all figures and pairs
      weightd stats --wide --format json | jq '.devices[].evictable_bytes'
    """
    with open_client(context, socket) as client:
        found = client.stats()
        # It asks for each checkpoint's list of tensors, which is an event each: not for whoever polls.
        wanted = not quiet and (wide or output is not OutputFormat.JSON)
        shares = sharing(client) if wanted else SharingReport({}, (), "not asked for: --wide")
    if output is OutputFormat.JSON:
        emit_json(_json(found, shares))
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
            *_held(device, shares),
            *map(size, (device.reusable_bytes, device.in_flight_bytes, device.free_bytes)),
            str(device.segments),
        )
        for device in found.devices
    ]
    width = terminal_width(wide=wide)
    emit_table(_COLUMNS, rows, width)
    if shares.missing:
        emit_text(f"PINNED, LEASED, EVICTABLE and pairs are not known: {shares.missing}", width)
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
    _print_pairs(shares.pairs, width, wide=wide)
    say_state(found.state)


def _json(found: Stats, shares: SharingReport) -> dict[str, Any]:
    """The daemon's statistics, with what was computed here; figures that are not known are null."""
    unknown = dict.fromkeys(("pinned_bytes", "leased_bytes", "evictable_bytes"))
    table = asdict(found)
    for device in table["devices"]:
        held = None if shares.missing else shares.devices.get(device["uuid"], _NOTHING)
        device.update(unknown if held is None or device["absence"] else asdict(held))
    return table | {"pairs": None if shares.missing else [asdict(pair) for pair in shares.pairs]}


def _held(device: DeviceStats, shares: SharingReport) -> tuple[str, str, str]:
    if shares.missing or device.absence:
        return "-", "-", "-"
    held = shares.devices.get(device.uuid, _NOTHING)
    return size(held.pinned_bytes), size(held.leased_bytes), size(held.evictable_bytes)


def _print_pairs(pairs: Sequence[SharedPair], width: int | None, *, wide: bool) -> None:
    if not pairs:
        return
    shown = pairs if wide else pairs[:_MOST_PAIRS]
    rows: list[tuple[str, ...]] = [
        (
            size(pair.shared_bytes),
            *pair.checkpoints,
            ", ".join(pair.components) or "-",
            short_device(pair.device, full=wide),
        )
        for pair in shown
    ]
    columns = list(_PAIR_COLUMNS)
    if all(pair.device == "host" for pair in pairs):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    if not any(pair.components for pair in pairs):
        columns, rows = [*columns[:3], *columns[4:]], [(*row[:3], *row[4:]) for row in rows]
    emit("")
    emit_table(columns, rows, width)
    if len(shown) < len(pairs):
        emit_text(f"and {plural(len(pairs) - len(shown), 'pair')} more; --wide lists all", width)
