"""The commands that list: `ls`, `ps`, `inspect` and `stats`. The keys of their JSON are a contract."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from weightd import remembered
from weightd._sizes import size
from weightd.cli.context import (
    DeviceOption,
    FormatOption,
    NoTruncOption,
    OutputFormat,
    QuietOption,
    ReferenceArgument,
    SocketOption,
    VariantOption,
    meant,
    open_client,
    saying_what_is_chosen,
)
from weightd.cli.output import ago, digest, emit, emit_json, emit_table, plural, printable
from weightd.cli.output import device as short_device
from weightd.cli.rows import print_rows, rows_json, summary
from weightd.errors import WeightdError
from weightd.remembered import Row
from weightd.types import CheckpointDetails, TensorInfo

_LS_KEYS = (
    "name",
    "content_digest",
    "device",
    "tensors",
    "total_bytes",
    "exclusive_bytes",
    "shared_bytes",
    "leases",
    "pinned",
    "loaded_at",
    "last_used_at",
    "state",
    "names",
    "owner",
    "owner_uid",
)
_NAME_KEYS = ("name", "content_digest", "state", "owner", "owner_uid", "is_default")
_PS_KEYS = ("lease", "pid", "uid", "user", "command", "checkpoint", "device", "bytes", "since", "waiting")


def _pick(value: object, keys: Sequence[str]) -> dict[str, Any]:
    return {key: getattr(value, key) for key in keys}


def ls(
    context: typer.Context,
    output: FormatOption = OutputFormat.TABLE,
    quiet: QuietOption = False,
    no_trunc: NoTruncOption = False,
    names: Annotated[
        bool, typer.Option("--names", help="List names instead, including names of evicted checkpoints.")
    ] = False,
    socket: SocketOption = None,
) -> None:
    """List checkpoints."""
    if names:
        _names(context, output, socket, quiet=quiet, no_trunc=no_trunc)
        return
    with open_client(context, socket) as client:
        found = client.checkpoints()
        state = client.stats().state if output is OutputFormat.TABLE and not quiet else "serving"
    if output is OutputFormat.JSON:
        emit_json([_pick(info, _LS_KEYS) for info in found])
    elif quiet:
        for info in found:
            for name in info.names or filter(None, [info.content_digest]):
                emit(printable(name))
    else:
        columns = ("NAME", "DIGEST", "DEVICE", "STATE", "OWNER", ">SIZE", ">SHARED", ">LEASES", "PINNED", "LAST USED")
        rows = [
            (
                ", ".join(info.names) or "-",
                digest(info.content_digest, full=no_trunc) or "-",
                short_device(info.device, full=no_trunc),
                info.state,
                info.owner,
                size(info.total_bytes),
                size(info.shared_bytes),
                str(info.leases),
                "yes" if info.pinned else "no",
                ago(info.last_used_at),
            )
            for info in found
        ]
        emit_table(columns, rows)
        _say_state(state)


def _names(context: typer.Context, output: OutputFormat, socket: str | None, *, quiet: bool, no_trunc: bool) -> None:
    with open_client(context, socket) as client:
        found = client.names()
    if output is OutputFormat.JSON:
        emit_json([_pick(info, _NAME_KEYS) for info in found])
    elif quiet:
        for info in found:
            emit(printable(info.name))
    else:
        rows = [(info.name, digest(info.content_digest, full=no_trunc), info.state, info.owner) for info in found]
        emit_table(("NAME", "DIGEST", "STATE", "OWNER"), rows)


def ps(
    context: typer.Context,
    output: FormatOption = OutputFormat.TABLE,
    quiet: QuietOption = False,
    no_trunc: NoTruncOption = False,
    socket: SocketOption = None,
) -> None:
    """List leases: which process holds which checkpoint."""
    with open_client(context, socket) as client:
        found = client.leases()
    if output is OutputFormat.JSON:
        emit_json([_pick(lease, _PS_KEYS) for lease in found])
    elif quiet:
        for lease in found:
            emit(str(lease.lease))
    else:
        rows = [
            (
                str(lease.lease),
                "unknown" if lease.pid is None else str(lease.pid),
                lease.user,
                digest(lease.checkpoint, full=no_trunc),
                short_device(lease.device, full=no_trunc),
                size(lease.bytes),
                f"{ago(lease.since)}{' (waiting)' if lease.waiting else ''}",
                lease.command,
            )
            for lease in found
        ]
        emit_table((">LEASE", ">PID", "USER", "CHECKPOINT", "DEVICE", ">SIZE", "SINCE", "COMMAND"), rows)


def stats(
    context: typer.Context,
    output: FormatOption = OutputFormat.TABLE,
    quiet: QuietOption = False,
    no_trunc: NoTruncOption = False,
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
            short_device(device.uuid, full=no_trunc),
            device.kind,
            device.name,
            *map(size, (device.budget_bytes, device.used_bytes, device.live_bytes)),
            *map(size, (device.reusable_bytes, device.in_flight_bytes, device.free_bytes)),
            str(device.segments),
        )
        for device in found.devices
    ]
    columns = ("DEVICE", "KIND", "NAME", ">BUDGET", ">USED", ">LIVE", ">REUSABLE", ">IN FLIGHT", ">FREE", ">SEGMENTS")
    emit_table(columns, rows)
    for device in found.devices:
        if device.absence:
            emit(printable(f"{device.uuid} is absent: {device.absence}"))
        if device.device_free_bytes is not None and device.device_free_bytes < device.free_bytes:
            emit(f"{device.name} itself has {size(device.device_free_bytes)} free: other processes use the rest")
    emit(
        f"\n{plural(found.checkpoints, 'checkpoint')}, logical {size(found.logical_bytes)}, "
        f"resident {size(found.resident_bytes)}, saved {size(found.saved_bytes)} ({found.saved_ratio * 100:.1f} %)"
    )
    emit(
        f"{plural(found.blobs, 'blob')}, {plural(found.leases, 'lease')}, {plural(found.evictions, 'eviction')}, "
        f"{plural(found.digest_collisions, 'digest collision')}"
    )
    books = found.books
    if books is not None:
        most = f" of {size(books.limit_bytes)}" if books.limit_bytes else ""
        emit(f"books {size(books.used_bytes)}{most}: the daemon's own memory for lists of tensors")
    index = found.digest_index
    if index is not None and (index.problem or index.failures):
        now = f"cannot be used: {index.problem}; loads read more" if index.problem else "can be used again"
        emit(printable(f"digest index {index.path} {now}, {plural(index.failures, 'failure')} since the start"))
    _say_state(found.state)


def _say_state(state: str) -> None:
    """Print a line below the table if the daemon accepts no attaches and loads."""
    if state != "serving":
        emit(f"\nthe daemon is {state}: it accepts no attaches or loads; `weightd drain --undo` ends the drain")


def inspect(
    context: typer.Context,
    reference: ReferenceArgument,
    device: DeviceOption = None,
    variant: VariantOption = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    output: FormatOption = OutputFormat.TABLE,
    quiet: QuietOption = False,
    no_trunc: NoTruncOption = False,
    socket: SocketOption = None,
) -> None:
    """Show one checkpoint with its components and files.

    Groups are tensors that frameworks fuse into one; if they lie in a row, the fused tensor needs no copy.
    """
    listed: list[TensorInfo] = []
    with open_client(context, socket) as client:
        details = client.inspect(meant(reference, variant), device)
        found = details.checkpoint  # on whatever device: the reference alone might be loaded on another
        if tensors or (found.content_digest and (output is OutputFormat.JSON or not quiet)):
            try:
                with client.attach(found.content_digest, device=found.device, manifest_only=True) as attachment:
                    listed = list(attachment.tensors.values())
            except WeightdError:  # its device is absent, the daemon drains, or it went meanwhile
                if tensors:
                    raise
    with saying_what_is_chosen(quiet=quiet):
        rows = remembered.rows(listed)
    if output is OutputFormat.JSON:
        more = {"tensors": [tensor._asdict() for tensor in listed]} if tensors else {}
        emit_json(_details_json(details) | {"groups": rows_json(rows, members=tensors)} | more)
    elif quiet:
        emit(printable(details.checkpoint.content_digest))
    else:
        _print_checkpoint(details, rows, full=no_trunc)
        _print_parts(details)
        print_rows(rows, full=no_trunc)
        if tensors:
            _print_tensors(listed, full=no_trunc)


def _details_json(details: CheckpointDetails) -> dict[str, Any]:
    sources = [
        {
            "component": source.component,
            "file": source.file,
            "bytes": source.identity.size,
            "modified_at": _modified(source.identity.mtime_ns),
        }
        for source in details.sources
    ]
    info = details.checkpoint
    return {
        "checkpoint": _pick(info, _LS_KEYS),
        "components": [asdict(component) for component in details.components],
        "segments": details.segments,
        "kind": details.kind,
        "note": details.note,
        "reference": details.reference,
        "sources": sources,
    }


def _modified(mtime_ns: int) -> datetime:
    return datetime.fromtimestamp(mtime_ns / 1e9, UTC)


def _print_checkpoint(details: CheckpointDetails, rows: Sequence[Row], *, full: bool) -> None:
    info = details.checkpoint
    kind = f" ({details.kind})" if details.kind != info.device else ""
    lines = {
        "name": ", ".join(info.names) or "-",
        "digest": digest(info.content_digest, full=full) or "-",
        "device": f"{short_device(info.device, full=full)}{kind}",
        "state": info.state,
        "owner": "unknown" if info.owner_uid is None else f"{info.owner} (uid {info.owner_uid})",
        "tensors": f"{info.tensors} in {plural(details.segments, 'segment')}",
        "size": f"{size(info.total_bytes)}, shared {size(info.shared_bytes)}, alone {size(info.exclusive_bytes)}",
        "leases": str(info.leases),
        "pinned": "yes" if info.pinned else "no",
        "loaded": ago(info.loaded_at),
        "last used": ago(info.last_used_at),
    }
    if rows:
        lines["groups"] = summary(rows)
    if details.reference and details.reference not in info.names:
        lines["from"] = details.reference
    if details.note:
        lines["note"] = details.note
    for label, value in lines.items():
        emit(f"{label:<10} {printable(value)}")


def _print_parts(details: CheckpointDetails) -> None:
    if any(component.name for component in details.components):
        emit("")
        emit_table(
            ("COMPONENT", ">TENSORS", ">SIZE", ">SHARED"),
            [
                (
                    component.name or "-",
                    str(component.tensors),
                    size(component.total_bytes),
                    size(component.shared_bytes),
                )
                for component in details.components
            ],
        )
    if details.sources:
        emit("")
        emit_table(
            ("FILE", "COMPONENT", ">SIZE", "MODIFIED"),
            [
                (
                    source.file,
                    source.component or "-",
                    size(source.identity.size),
                    ago(_modified(source.identity.mtime_ns)),
                )
                for source in details.sources
            ],
        )


def _print_tensors(tensors: Sequence[TensorInfo], *, full: bool) -> None:
    emit("")
    emit_table(
        ("TENSOR", "COMPONENT", "DTYPE", "SHAPE", ">BYTES", ">SEGMENT", ">OFFSET", "DIGEST"),
        [
            (
                tensor.name,
                tensor.component or "-",
                tensor.dtype,
                "x".join(map(str, tensor.shape)) or "scalar",
                str(tensor.length),
                str(tensor.segment),
                str(tensor.offset),
                tensor.digest.hex()[: None if full else 12],
            )
            for tensor in tensors
        ],
    )
