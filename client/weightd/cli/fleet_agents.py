"""The commands of `fleet` that have to do with agents: `agent`, `fetch`, `ls`. They start the fleet's programs."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from typing import Annotated

import typer

from weightd._sizes import size
from weightd.cli.context import CommandOptions, FormatOption, OutputFormat, SocketOption, WideOption, require, say
from weightd.cli.fleet_cluster import AddressOption, print_checkpoints
from weightd.cli.fleet_group import ask_fleet, require_fleet
from weightd.cli.output import emit_json, flush
from weightd.cli.tables import Column, emit_table, emit_text, terminal_width

_PROGRAM = "weightd_fleet.agent.asking"
_COLUMNS = (
    Column("PEER"),
    Column("DIGEST"),
    Column("SIZE", right=True),
    Column("TENSORS", right=True),
    Column("FROM", elided=True, spare=1),
)

_FromOption = Annotated[
    list[str], typer.Option("--from", metavar="HOST:PORT", help="An agent that has it; repeatable.")
]
_TlsOption = Annotated[
    str | None,
    typer.Option(
        "--tls-dir",
        metavar="DIR",
        help="Directory with ca.pem, cert.pem and key.pem; without it only agents on the loopback are spoken to.",
    ),
]
_StateOption = Annotated[
    str | None,
    typer.Option(
        "--state-dir",
        metavar="DIR",
        help="Directory of what this node publishes [default: $WEIGHTD_FLEET_STATE_DIR, else the user's own].",
    ),
]
_PatienceOption = Annotated[
    float,
    typer.Option("--patience", metavar="SECONDS", min=0.1, help="How long a peer may be silent before it is dropped."),
]


class SinkChoice(StrEnum):
    """Where a fetch puts a checkpoint."""

    FILES = "files"
    MEMORY = "memory"


def _connection(
    context: typer.Context, tls_dir: str | None, state_dir: str | None, patience: float, socket: str | None = None
) -> list[str]:
    settings: CommandOptions = context.obj
    socket = socket or settings.socket
    said = (("tls-dir", tls_dir), ("state-dir", state_dir), ("socket", socket), ("patience", patience))
    return [f"--{name}={value}" for name, value in said if value is not None]


def agent(
    context: typer.Context,
    listen: Annotated[str, typer.Option("--listen", metavar="HOST:PORT", help="Where to serve other nodes.")],
    tls_dir: _TlsOption = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Serve without TLS and without roles; only on the loopback.")
    ] = False,
    advertise: Annotated[
        str | None,
        typer.Option(
            "--advertise",
            metavar="HOST:PORT",
            help="Its address for other nodes [default: --listen, unless that is all addresses: 0.0.0.0 or ::].",
        ),
    ] = None,
    state_dir: _StateOption = None,
    readers: Annotated[
        int, typer.Option("--readers", metavar="N", min=1, max=16, help="How many peers may read bytes at once.")
    ] = 2,
    patience: _PatienceOption = 30.0,
    node_labels: Annotated[
        str | None,
        typer.Option("--node-labels", metavar="NODE", help="Label this node of Kubernetes by what is pinned on it."),
    ] = None,
    socket: SocketOption = None,
) -> None:
    """Serve this node's checkpoints to others, in the foreground.

    An agent is a client of this node's daemon. It serves tensors that are resident in host memory, and published files
    that have not changed. Between nodes it needs TLS: a certificate of the fleet's own authority, with the URI
    weightd://agent (or weightd://client for who only asks) among its alternative names.

    \b
    Examples:
      weightd fleet agent --listen 127.0.0.1:7411 --insecure
      weightd fleet agent --listen 10.0.0.5:7411 --tls-dir /etc/weightd/fleet
    """
    if (tls_dir is None) is not insecure:
        raise typer.BadParameter("give either --tls-dir or --insecure")
    require_fleet("agent")
    if node_labels is not None:
        require("fleet agent --node-labels", ["kubernetes"], "fleet-k8s")
    arguments = _connection(context, tls_dir, state_dir, patience, socket)
    arguments += [f"--listen={listen}", f"--readers={readers}"]
    arguments += [] if advertise is None else [f"--advertise={advertise}"]
    arguments += [] if node_labels is None else [f"--node-labels={node_labels}"]
    flush()
    # -P: a weightd_fleet that lies in the current directory must not be what starts.
    command_line = [sys.executable, "-P", "-m", "weightd_fleet.agent", *arguments]
    os.execv(sys.executable, command_line)  # noqa: S606 - no shell is what is wanted


def fetch(
    context: typer.Context,
    digest: Annotated[str, typer.Argument(metavar="DIGEST", help="b3: and 64 hex digits, as `publish` prints it.")],
    peers: _FromOption,
    sink: Annotated[SinkChoice, typer.Option("--sink", help="Where the checkpoint goes.")] = SinkChoice.FILES,
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="NAME", help="Its name here [default: that on the hub, else the digest]."),
    ] = None,
    folder: Annotated[
        str | None,
        typer.Option(
            "--folder",
            metavar="DIR",
            help="Folder of the files [default: the Hugging Face cache if they are from one, else the state's].",
        ),
    ] = None,
    pin: Annotated[bool, typer.Option("--pin", help="Pin it in memory.")] = False,
    tls_dir: _TlsOption = None,
    state_dir: _StateOption = None,
    patience: _PatienceOption = 30.0,
    output: FormatOption = OutputFormat.TABLE,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    socket: SocketOption = None,
) -> None:
    """Fetch from other nodes what this one lacks of a checkpoint.

    Every byte is checked against the digest before it is used. With `--sink files` the checkpoint's files are written,
    byte for byte; with `--sink memory` the daemon gets the missing tensors and composes the checkpoint. A fetch that
    was interrupted goes on where it was.

    \b
    Examples:
      weightd fleet fetch b3:DIGEST --from 127.0.0.1:7411
      weightd fleet fetch b3:DIGEST --from 10.0.0.5:7411 --tls-dir tls
    """
    require_fleet("fetch")
    arguments = [*_connection(context, tls_dir, state_dir, patience, socket), *(f"--from={peer}" for peer in peers)]
    arguments += [f"--sink={sink.value}", f"--name={name or ''}", f"--folder={folder or ''}"]
    arguments += ["--pin"] if pin else []
    found = ask_fleet(context, _PROGRAM, [*arguments, "--", "fetch", digest], quiet=quiet)["fetched"]
    if output is OutputFormat.JSON:
        emit_json(found)
    elif not quiet:
        emit_text(
            f"{found['name']}: {size(found['moved_bytes'])} of tensors received, {size(found['local_bytes'])} were "
            f"here; " + (f"files in {found['folder']}" if found["folder"] else f"resident: {found['content_digest']}"),
            terminal_width(wide=False),
        )


def ls(
    context: typer.Context,
    peers: Annotated[
        list[str] | None, typer.Option("--from", metavar="HOST:PORT", help="An agent to ask; repeatable.")
    ] = None,
    address: AddressOption = None,
    tls_dir: _TlsOption = None,
    state_dir: _StateOption = None,
    patience: _PatienceOption = 30.0,
    output: FormatOption = OutputFormat.TABLE,
    wide: WideOption = False,
) -> None:
    """List checkpoints of a Ray cluster, or of agents.

    With `--from` it lists those that these agents can serve, without a cluster.

    \b
    Examples:
      weightd fleet ls
      weightd fleet ls --from 127.0.0.1:7411
    """
    if not peers:
        print_checkpoints(context, address, output, wide=wide)
        return
    require_fleet("ls")
    arguments = [*_connection(context, tls_dir, state_dir, patience), *(f"--from={peer}" for peer in peers)]
    found = ask_fleet(context, _PROGRAM, [*arguments, "--", "ls"], quiet=True)["peers"]
    if output is OutputFormat.JSON:
        emit_json(found)
    else:
        rows = [
            (peer["peer"], one["digest"], size(one["total_bytes"]), str(one["tensors"]), _origin(one))
            for peer in found
            for one in peer["checkpoints"]
        ]
        if rows:
            emit_table(_COLUMNS, rows, terminal_width(wide=wide))
        for peer in found:
            if peer["problem"]:
                say(peer["problem"])
    if any(peer["problem"] for peer in found):
        raise typer.Exit(1)


def _origin(checkpoint: dict[str, str]) -> str:
    return f"{checkpoint['repository']}@{checkpoint['commit'][:12]}" if checkpoint["repository"] else "-"
