"""The commands `ls` and `ps`. The keys of their JSON are a contract."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from weightd._sizes import size
from weightd.cli.context import FormatOption, OutputFormat, QuietOption, SocketOption, WideOption, open_client
from weightd.cli.output import ago, digest, emit, emit_json, printable
from weightd.cli.output import device as short_device
from weightd.cli.tables import STATES, Column, emit_table, terminal_width

LS_KEYS = (
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

_LS_COLUMNS = (
    Column("NAME", elided=True),
    Column("DIGEST", spare=6),
    Column("DEVICE", common=True),
    Column("STATE", common=True, colours=STATES),
    Column("OWNER", common=True, spare=4),
    Column("SIZE", right=True),
    Column("SHARED", right=True, spare=1),
    Column("LEASES", right=True, spare=2),
    Column("PINNED", common=True, spare=3),
    Column("LAST USED", spare=5),
)
_NAME_COLUMNS = (
    Column("NAME", elided=True),
    Column("DIGEST", spare=2),
    Column("STATE", common=True, colours=STATES),
    Column("OWNER", common=True, spare=1),
)
_PS_COLUMNS = (
    Column("LEASE", right=True, spare=2),
    Column("PID", right=True),
    Column("USER", common=True, spare=1),
    Column("CHECKPOINT", elided=True),
    Column("DEVICE", common=True),
    Column("SIZE", right=True),
    Column("SINCE", spare=3),
    Column("COMMAND", elided=True),
)


def pick(value: object, keys: Sequence[str]) -> dict[str, Any]:
    """Return these attributes of `value`, in this order."""
    return {key: getattr(value, key) for key in keys}


def ls(
    context: typer.Context,
    output: FormatOption = OutputFormat.TABLE,
    quiet: QuietOption = False,
    wide: WideOption = False,
    names: Annotated[
        bool, typer.Option("--names", help="List names instead, including names of evicted checkpoints.")
    ] = False,
    socket: SocketOption = None,
) -> None:
    """List checkpoints.

    \b
    Examples:
      weightd ls                     in the width of the terminal
      weightd ls --wide              in full
      weightd ls -q | xargs weightd pin
      weightd ls --names
    """
    if names:
        _names(context, output, socket, quiet=quiet, wide=wide)
        return
    with open_client(context, socket) as client:
        found = client.checkpoints()
        state = client.stats().state if output is OutputFormat.TABLE and not quiet else "serving"
    if output is OutputFormat.JSON:
        emit_json([pick(info, LS_KEYS) for info in found])
    elif quiet:
        for info in found:
            for name in info.names or filter(None, [info.content_digest]):
                emit(printable(name))
    else:
        rows = [
            (
                ", ".join(info.names) or "-",
                digest(info.content_digest, full=wide) or "-",
                short_device(info.device, full=wide),
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
        emit_table(_LS_COLUMNS, rows, terminal_width(wide=wide))
        say_state(state)


def _names(context: typer.Context, output: OutputFormat, socket: str | None, *, quiet: bool, wide: bool) -> None:
    with open_client(context, socket) as client:
        found = client.names()
    if output is OutputFormat.JSON:
        emit_json([pick(info, _NAME_KEYS) for info in found])
    elif quiet:
        for info in found:
            emit(printable(info.name))
    else:
        rows = [(info.name, digest(info.content_digest, full=wide), info.state, info.owner) for info in found]
        emit_table(_NAME_COLUMNS, rows, terminal_width(wide=wide))


def ps(
    context: typer.Context,
    output: FormatOption = OutputFormat.TABLE,
    quiet: QuietOption = False,
    wide: WideOption = False,
    socket: SocketOption = None,
) -> None:
    """List leases: which process holds which checkpoint.

    \b
    Examples:
      weightd ps
      weightd ps --format json | jq '.[].pid'
    """
    with open_client(context, socket) as client:
        found = client.leases()
    if output is OutputFormat.JSON:
        emit_json([pick(lease, _PS_KEYS) for lease in found])
    elif quiet:
        for lease in found:
            emit(str(lease.lease))
    else:
        rows = [
            (
                str(lease.lease),
                "unknown" if lease.pid is None else str(lease.pid),
                lease.user,
                digest(lease.checkpoint, full=wide),
                short_device(lease.device, full=wide),
                size(lease.bytes),
                f"{ago(lease.since)}{' (waiting)' if lease.waiting else ''}",
                lease.command,
            )
            for lease in found
        ]
        emit_table(_PS_COLUMNS, rows, terminal_width(wide=wide))


def say_state(state: str) -> None:
    """Print a line below the table if the daemon accepts no attaches and loads."""
    if state != "serving":
        emit(f"\nthe daemon is {state}: it accepts no attaches or loads; `weightd drain --undo` ends the drain")
