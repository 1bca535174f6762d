"""Commands that ask the catalogue of a Ray cluster: `ls`, `stats`, `place`, `load`, `drain`, `catalogue`.

They start the fleet's program, which asks the catalogue.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from weightd._sizes import size
from weightd.cli.context import FormatOption, OutputFormat, WideOption, require, say
from weightd.cli.fleet_group import NEEDED, ask_fleet
from weightd.cli.output import emit, emit_json, plural
from weightd.cli.tables import Column, emit_table, emit_text, terminal_width

_PROGRAM = "weightd_fleet.engines.ray_asking"
_SHORT_DIGEST = len("b3:") + 12

_CHECKPOINT_COLUMNS = (
    Column("NAME", elided=True),
    Column("DIGEST"),
    Column("SIZE", right=True),
    Column("IN MEMORY ON", listed=True),
    Column("PINNED ON", listed=True, spare=1),
    Column("SERVED BY", listed=True, spare=2),
)
_NODE_COLUMNS = (
    Column("NODE"),
    Column("STATE", colours={"live": "green", "draining": "yellow", "unknown": "red"}),
    Column("DEVICE"),
    Column("USED", right=True),
    Column("FIRM", right=True, spare=1),
    Column("BUDGET", right=True),
    Column("AGENT", spare=2),
)

AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="ADDRESS",
        help="Address of the Ray cluster [default: $RAY_ADDRESS, else the cluster of this machine].",
    ),
]
_ReferenceArgument = Annotated[
    str, typer.Argument(metavar="REF", help="What it was published as, or b3: and 64 hex digits.")
]
_ReplicasOption = Annotated[int, typer.Option("--replicas", metavar="N", min=1, max=10_000, help="On how many nodes.")]


def ask_catalogue(
    context: typer.Context, command: str, address: str | None, *options: str, subject: str = ""
) -> dict[str, Any]:
    """The catalogue's answer to a command. Raises the error that it answers with."""
    require(f"fleet {command}", (*NEEDED, "ray"), "fleet-ray")
    arguments = [*([] if address is None else [f"--address={address}"]), *options]
    answer = ask_fleet(context, _PROGRAM, [*arguments, "--", command, subject], quiet=True)
    found: dict[str, Any] = answer[command]
    return found


def print_checkpoints(context: typer.Context, address: str | None, output: OutputFormat, *, wide: bool) -> None:
    """List the checkpoints of a cluster."""
    found = ask_catalogue(context, "ls", address)
    if output is OutputFormat.JSON:
        emit_json(found)
        return
    names = {node["node"]: node["name"] for node in found["nodes"]}

    def listed(nodes: list[str]) -> str:
        return ", ".join(sorted(names.get(node, node) for node in nodes)) or "-"

    rows = [
        (
            one["names"][0] if one["names"] else "-",
            one["checkpoint"] if wide else one["checkpoint"][:_SHORT_DIGEST],
            size(one["size_bytes"]),
            listed(one["resident_on"]),
            listed(one["pinned_on"]),
            listed(one["served_by"]),
        )
        for one in found["checkpoints"]
    ]
    if rows:
        emit_table(_CHECKPOINT_COLUMNS, rows, terminal_width(wide=wide))
    _say_problems(found["nodes"])


def stats(
    context: typer.Context,
    address: AddressOption = None,
    output: FormatOption = OutputFormat.TABLE,
    wide: WideOption = False,
) -> None:
    """Show the nodes of a Ray cluster and their memory.

    FIRM is memory that cannot be evicted now: it is pinned or leased.

    \b
    Examples:
      weightd fleet stats --address 10.0.0.5:6379
    """
    found = ask_catalogue(context, "stats", address)
    if output is OutputFormat.JSON:
        emit_json(found)
        return
    width = terminal_width(wide=wide)
    rows = [
        (
            node["name"],
            node["state"],
            device["device"],
            size(device["used_bytes"]),
            size(device["firm_bytes"]),
            size(device["budget_bytes"]),
            node["address"],
        )
        for node in found["each"]
        for device in node["devices"] or [{"device": "-", "used_bytes": 0, "firm_bytes": 0, "budget_bytes": 0}]
    ]
    emit_table(_NODE_COLUMNS, rows, width)
    emit("")
    emit_text(
        f"{plural(found['checkpoints'], 'checkpoint')}, {plural(found['replicas'], 'replica')} in memory: "
        f"{size(found['resident_bytes'])} used, {size(found['logical_bytes'])} without sharing. "
        f"{plural(found['transfers'], 'transfer')} running, {size(found['moved_bytes'])} moved.",
        width,
    )
    _say_problems(found["each"])


def place(
    context: typer.Context,
    reference: _ReferenceArgument,
    replicas: _ReplicasOption = 1,
    address: AddressOption = None,
    output: FormatOption = OutputFormat.TABLE,
) -> None:
    """Say on which nodes replicas add the fewest bytes.

    Nothing is moved or reserved. The JSON has the options for Ray that let an actor run on these nodes alone.

    \b
    Examples:
      weightd fleet place org/tuned --replicas 2
    """
    found = ask_catalogue(context, "place", address, f"--replicas={replicas}", subject=reference)
    if output is OutputFormat.JSON:
        emit_json(found)
        return
    for target in found["targets"]:
        emit_text(target["why"], terminal_width(wide=False))
    if found["shortage"]:
        emit_text(found["shortage"], terminal_width(wide=False))


def load(
    context: typer.Context,
    reference: _ReferenceArgument,
    on: Annotated[
        list[str] | None,
        typer.Option("--on", metavar="NODE", help="A node by id, name or address, and no other; repeatable."),
    ] = None,
    replicas: Annotated[
        int | None,
        typer.Option(
            "--replicas", metavar="N", min=1, max=10_000, help="On how many nodes, the best ones [default: 1]."
        ),
    ] = None,
    pin: Annotated[bool, typer.Option("--pin", help="Pin it in memory there.")] = False,
    address: AddressOption = None,
    output: FormatOption = OutputFormat.TABLE,
) -> None:
    """Make replicas resident in nodes' host memory.

    Each node fetches from others what it lacks, and nothing else. Without `--on` the nodes are those of
    `weightd fleet place`, and one that is full or does not answer is passed over.

    \b
    Examples:
      weightd fleet load org/tuned --replicas 2 --pin
      weightd fleet load org/tuned --on 10.0.0.7
    """
    options = [f"--on={node}" for node in on or ()]
    options += [] if replicas is None else [f"--replicas={replicas}"]
    options += ["--pin"] if pin else []
    _emit_load(ask_catalogue(context, "load", address, *options, subject=reference), output)


def drain(
    context: typer.Context,
    node: Annotated[str, typer.Argument(metavar="NODE", help="A node by id, name or address.")],
    keep_replicas: Annotated[
        int,
        typer.Option(
            "--keep-replicas",
            metavar="N",
            min=0,
            max=10_000,
            help="Copy what fewer other nodes than this hold in memory; 0 copies nothing.",
        ),
    ] = 1,
    address: AddressOption = None,
    output: FormatOption = OutputFormat.TABLE,
) -> None:
    """Copy what only a node has, and end its service.

    Checkpoints that too few other nodes hold in memory are copied before the agent ends its service. The node's daemon
    goes on, and so do the processes that use it. The agent serves again after a restart.

    \b
    Examples:
      weightd fleet drain 10.0.0.7
      weightd fleet drain 10.0.0.7 --keep-replicas 2
    """
    found = ask_catalogue(context, "drain", address, f"--keep-replicas={keep_replicas}", subject=node)
    if output is OutputFormat.JSON:
        emit_json(found)
        return
    for report in found["copied"]:
        for replica in report["replicas"]:
            emit_text(f"{report['reference']}: copied to {replica['name']}", terminal_width(wide=False))
    emit_text(
        f"{found['name']}: drained, {plural(len(found['copied']), 'checkpoint')} copied", terminal_width(wide=False)
    )
    for reference in found["only_here"]:
        say(f"{reference}: no other node serves it now")


def catalogue(
    context: typer.Context,
    port: Annotated[
        int | None,
        typer.Option(
            "--port",
            metavar="PORT",
            min=1,
            max=65535,
            help="Where agents listen [default: $WEIGHTD_FLEET_PORT, else 7411].",
        ),
    ] = None,
    tls_dir: Annotated[
        str | None,
        typer.Option(
            "--tls-dir",
            metavar="DIR",
            help="Absolute path of a directory on the head with ca.pem, cert.pem and key.pem "
            "[default: $WEIGHTD_FLEET_TLS_DIR; without it only agents on the loopback are spoken to].",
        ),
    ] = None,
    address: AddressOption = None,
) -> None:
    """Start or restart the catalogue of a Ray cluster.

    It runs on the cluster's head, and keeps nothing that the agents do not tell again: a restart interrupts who waits
    for a load, and no load. The certificate must give the role weightd://client.

    \b
    Examples:
      weightd fleet catalogue --address 10.0.0.5:6379 --tls-dir /etc/weightd/fleet
    """
    options = [] if port is None else [f"--port={port}"]
    options += [] if tls_dir is None else [f"--tls-dir={tls_dir}"]
    found = ask_catalogue(context, "catalogue", address, *options)
    answering = sum(node["state"] != "unknown" for node in found["each"])
    emit_text(f"catalogue runs: {answering} of {plural(found['nodes'], 'node')} answer", terminal_width(wide=False))
    _say_problems(found["each"])


def _emit_load(report: dict[str, Any], output: OutputFormat) -> None:
    if output is OutputFormat.JSON:
        emit_json(report)
        return
    for replica in report["replicas"]:
        emit_text(
            f"{report['reference']} on {replica['name']}: {size(replica['moved_bytes'])} received, "
            f"{size(replica['local_bytes'])} were there, {replica['seconds']:.1f} s",
            terminal_width(wide=False),
        )
    for skipped in report["skipped"]:
        say(f"{skipped['name']}: passed over: {skipped['why']}")


def _say_problems(nodes: list[dict[str, Any]]) -> None:
    for node in nodes:
        if node["problem"]:
            say(f"node {node['name']}: {node['problem']}")
