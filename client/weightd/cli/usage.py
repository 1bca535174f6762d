"""The command `stats`. The keys of its JSON are a contract."""

from __future__ import annotations

from dataclasses import asdict

import typer

from weightd._sizes import size
from weightd.cli.context import FormatOption, OutputFormat, QuietOption, SocketOption, WideOption, open_client
from weightd.cli.listing import say_state
from weightd.cli.output import device as short_device
from weightd.cli.output import emit, emit_json, plural, printable
from weightd.cli.tables import Column, emit_table, emit_text, terminal_width

_COLUMNS = (
    Column("DEVICE"),
    Column("KIND", common=True),
    Column("NAME", elided=True, spare=5),
    Column("BUDGET", right=True),
    Column("USED", right=True),
    Column("LIVE", right=True),
    Column("REUSABLE", right=True, spare=2),
    Column("IN FLIGHT", right=True, spare=3),
    Column("FREE", right=True),
    Column("SEGMENTS", right=True, spare=4),
)


def stats(
    context: typer.Context,
    output: FormatOption = OutputFormat.TABLE,
    quiet: QuietOption = False,
    wide: WideOption = False,
    socket: SocketOption = None,
) -> None:
    """Show memory use and savings."""
    with open_client(context, socket) as client:
        found = client.stats()
    if output is OutputFormat.JSON:
        emit_json(asdict(found))
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
            *map(size, (device.reusable_bytes, device.in_flight_bytes, device.free_bytes)),
            str(device.segments),
        )
        for device in found.devices
    ]
    width = terminal_width(wide=wide)
    emit_table(_COLUMNS, rows, width)
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
    say_state(found.state)
