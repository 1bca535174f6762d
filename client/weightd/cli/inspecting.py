"""The command `inspect`. The keys of its JSON are a contract."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weightd import remembered
from weightd._sizes import size
from weightd.cli.context import (
    DeviceOption,
    FormatOption,
    OutputFormat,
    QuietOption,
    ReferenceArgument,
    SocketOption,
    VariantOption,
    WideOption,
    meant,
    open_client,
    saying_what_is_chosen,
)
from weightd.cli.listing import LS_KEYS, pick
from weightd.cli.output import ago, digest, emit, emit_json, plural, printable
from weightd.cli.output import device as short_device
from weightd.cli.partners import ask, print_partners
from weightd.cli.rows import print_rows, rows_json, summary
from weightd.cli.tables import Column, elided, emit_table, terminal_width
from weightd.errors import WeightdError
from weightd.inspection import SharedPair, StoredTensor
from weightd.remembered import Row
from weightd.types import CheckpointDetails, CheckpointInfo

if TYPE_CHECKING:
    from weightd.client import Client

_LABEL = 10
_LEAST_VALUE = 20
_COMPONENT_COLUMNS = (
    Column("COMPONENT", elided=True),
    Column("TENSORS", right=True, spare=1),
    Column("SIZE", right=True),
    Column("SHARED", right=True),
)
_FILE_COLUMNS = (
    Column("FILE", elided=True),
    Column("COMPONENT", elided=True, common=True),
    Column("SIZE", right=True),
    Column("MODIFIED", spare=1),
)
_TENSOR_COLUMNS = (
    Column("TENSOR", elided=True),
    Column("COMPONENT", elided=True, common=True),
    Column("DTYPE", common=True),
    Column("SHAPE"),
    Column("BYTES", right=True),
    Column("USED BY", right=True, common=True, spare=4),
    Column("SEGMENT", right=True, spare=2),
    Column("OFFSET", right=True, spare=1),
    Column("DIGEST", spare=3),
)


def inspect(
    context: typer.Context,
    reference: ReferenceArgument,
    device: DeviceOption = None,
    variant: VariantOption = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    output: FormatOption = OutputFormat.TABLE,
    quiet: QuietOption = False,
    wide: WideOption = False,
    socket: SocketOption = None,
) -> None:
    """Show one checkpoint: components, files, who shares with it.

    What ONLY THEY have, nobody else uses: it is freed when both have gone, beside what each has alone.
    Groups are tensors that frameworks fuse into one; if they lie in a row, the fused tensor needs no copy.

    \b
    Examples:
      weightd inspect base
      weightd inspect base --tensors --wide
      weightd inspect org/name --format json
    """
    listed: list[StoredTensor] = []
    with open_client(context, socket) as client:
        details = client.inspect(meant(reference, variant), device)
        found = details.checkpoint  # on whatever device: the reference alone might be loaded on another
        if tensors or (found.content_digest and (output is OutputFormat.JSON or not quiet)):
            try:
                listed = client.tensors(found.content_digest, found.device)
            except WeightdError:  # it went meanwhile, or the daemon is older
                if tensors:
                    raise
        asked = output is OutputFormat.JSON or not quiet
        partners = _partners(client, found, every=wide or output is OutputFormat.JSON) if asked else None
    with saying_what_is_chosen(quiet=quiet):
        rows = remembered.rows(listed)
    if output is OutputFormat.JSON:
        more = {"tensors": [_tensor_json(tensor) for tensor in listed]} if tensors else {}
        shared = {"partners": None if partners is None else [_partner_json(pair) for pair in partners]}
        emit_json(_details_json(details) | shared | {"groups": rows_json(rows, members=tensors)} | more)
    elif quiet:
        emit(printable(details.checkpoint.content_digest))
    else:
        _print_checkpoint(details, rows, wide=wide)
        _print_parts(details, wide=wide)
        print_partners(partners or (), terminal_width(wide=wide), wide=wide)
        print_rows(rows, full=wide)
        if tensors:
            _print_tensors(listed, wide=wide)


def _partners(client: Client, found: CheckpointInfo, *, every: bool) -> list[SharedPair] | None:
    """What a checkpoint shares with which others; None where that is not known."""
    if not found.content_digest or not found.shared_bytes:  # one that is being loaded has none yet
        return []
    try:
        return ask(client, found.content_digest, found.device, every=every)
    except WeightdError:  # it went meanwhile
        return None


def _partner_json(pair: SharedPair) -> dict[str, Any]:
    return {
        "name": pair.other_name,
        "content_digest": pair.other,
        "shared_bytes": pair.shared_bytes,
        "only_bytes": pair.only_bytes,
        "components": [
            {"component": part.one, "partner_component": part.other, "shared_bytes": part.shared_bytes}
            for part in pair.components
        ],
    }


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
        "checkpoint": pick(info, LS_KEYS),
        "components": [asdict(component) for component in details.components],
        "segments": details.segments,
        "kind": details.kind,
        "note": details.note,
        "reference": details.reference,
        "sources": sources,
    }


def _modified(mtime_ns: int) -> datetime:
    return datetime.fromtimestamp(mtime_ns / 1e9, UTC)


def _print_checkpoint(details: CheckpointDetails, rows: Sequence[Row], *, wide: bool) -> None:
    info = details.checkpoint
    kind = f" ({details.kind})" if details.kind != info.device else ""
    lines = {
        "name": ", ".join(info.names) or "-",
        "digest": digest(info.content_digest, full=wide) or "-",
        "device": f"{short_device(info.device, full=wide)}{kind}",
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
    if not details.sources:
        lines["files"] = "none: it was composed of resident tensors"
    if details.note:
        lines["note"] = details.note
    width = terminal_width(wide=wide)
    for label, value in lines.items():
        shown = printable(value)
        if width is not None and label in ("name", "from"):
            shown = elided(shown, max(width - _LABEL - 1, _LEAST_VALUE))
        emit(f"{label:<{_LABEL}} {shown}")


def _print_parts(details: CheckpointDetails, *, wide: bool) -> None:
    width = terminal_width(wide=wide)
    if any(component.name for component in details.components):
        emit("")
        emit_table(
            _COMPONENT_COLUMNS,
            [
                (
                    component.name or "-",
                    str(component.tensors),
                    size(component.total_bytes),
                    size(component.shared_bytes),
                )
                for component in details.components
            ],
            width,
        )
    if details.sources:
        emit("")
        emit_table(
            _FILE_COLUMNS,
            [
                (
                    source.file,
                    source.component or "-",
                    size(source.identity.size),
                    ago(_modified(source.identity.mtime_ns)),
                )
                for source in details.sources
            ],
            width,
        )


def _tensor_json(tensor: StoredTensor) -> dict[str, Any]:
    table = asdict(tensor)
    users = table.pop("users")
    return table | {"checkpoints": users["checkpoints"], "others": users["others"]}


def _print_tensors(tensors: Sequence[StoredTensor], *, wide: bool) -> None:
    emit("")
    emit_table(
        _TENSOR_COLUMNS,
        [
            (
                tensor.name,
                tensor.component or "-",
                tensor.dtype,
                "x".join(map(str, tensor.shape)) or "scalar",
                str(tensor.length),
                str(len(tensor.users.checkpoints) + tensor.users.others),
                str(tensor.segment),
                str(tensor.offset),
                tensor.digest.hex()[: None if wide else 12],
            )
            for tensor in tensors
        ],
        terminal_width(wide=wide),
    )
