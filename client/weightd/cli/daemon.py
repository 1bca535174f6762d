"""The commands `ping` and `version`, which query the daemon, and the check that it is installed."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict

import typer

import weightd
from weightd._transport.address import find_socket
from weightd.cli.context import CommandOptions, FormatOption, OutputFormat, SocketOption, open_client, say
from weightd.cli.output import emit, emit_json, printable
from weightd.errors import WeightdError
from weightd.types import VersionInfo


def require_daemon(command: str) -> None:
    """Exit with an error if the daemon is not installed. Without the extra, xxhash is missing."""
    if any(importlib.util.find_spec(needed) is None for needed in ("weightd_daemon", "xxhash")):
        say(f"{command} needs the daemon, which is not installed: pip install '.[daemon]' in weightd's checkout")
        raise typer.Exit(1)


def ping(context: typer.Context, output: FormatOption = OutputFormat.TABLE, socket: SocketOption = None) -> None:
    """Ping the daemon and print the round-trip time.

    \b
    Examples:
      weightd ping
      weightd ping --socket /run/weightd/weightd.sock
    """
    with open_client(context, socket) as client:
        client.ping()  # sets up the channel
        seconds = client.ping()
        place = str(client.socket)
    if output is OutputFormat.JSON:
        emit_json({"socket": place, "seconds": seconds})
    else:
        emit(f"{seconds * 1e3:.2f} ms from {printable(place)}")


def version(context: typer.Context, output: FormatOption = OutputFormat.TABLE, socket: SocketOption = None) -> None:
    """Print the versions of the command and the daemon.

    \b
    Examples:
      weightd version
      weightd version --format json
    """
    settings: CommandOptions = context.obj
    daemon: VersionInfo | None = None
    failure: WeightdError | None = None
    place: str | None = None
    try:
        place = str(find_socket(socket or settings.socket))
        with open_client(context, socket) as client:
            place = str(client.socket)
            daemon = client.version()
    except WeightdError as error:
        failure = error
    if output is OutputFormat.JSON:
        known = None if daemon is None else asdict(daemon)
        emit_json({"client": weightd.__version__, "daemon": known, "socket": place})
    else:
        emit(f"client  {weightd.__version__}")
        if daemon is not None:
            emit(f"daemon  {printable(daemon.version)} (pid {daemon.pid}, up {daemon.uptime_seconds:.0f} s)")
        if place is not None:
            emit(f"socket  {printable(place)}")
    if failure is not None:
        raise failure
