"""The operator's command `drain`. The keys of its JSON are a contract."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Annotated

import typer

from weightd._sizes import size
from weightd.cli.context import (
    CommandInterruptedError,
    FormatOption,
    OutputFormat,
    SilentOption,
    SocketOption,
    open_client,
    say,
)
from weightd.cli.output import digest, emit, emit_json, plural
from weightd.types import LeaseInfo


def drain(
    context: typer.Context,
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout", metavar="SECONDS", min=0, help="How long to wait for leases to end [default: no limit]."
        ),
    ] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Accept attaches and loads again.")] = False,
    forget: Annotated[
        str | None,
        typer.Option(
            "--forget",
            metavar="DEVICE",
            help="Empty only this device (a UUID, or as `weightd stats` names it), and let go of what is kept of it.",
        ),
    ] = None,
    output: FormatOption = OutputFormat.TABLE,
    quiet: SilentOption = False,
    socket: SocketOption = None,
) -> None:
    """Empty the daemon: refuse new attaches and loads.

    Waits until no process holds a checkpoint, then removes all checkpoints, including pinned ones. The daemon stays
    drained until --undo.

    With --forget, only one device is emptied and let go of, even if it is absent; other devices continue to serve.

    \b
    Examples:
      weightd drain --timeout 60
      weightd drain --undo
      weightd drain --forget GPU-0123abcd
    """
    if forget is not None and undo:
        raise typer.BadParameter("--forget and --undo exclude each other")
    start = time.monotonic()

    def show(leases: list[LeaseInfo]) -> None:
        if not quiet:
            for lease in leases:
                process = "unknown" if lease.pid is None else f"{lease.pid} ({lease.command})"
                say(f"waiting for pid {process}, which holds {digest(lease.checkpoint)}")

    with open_client(context, socket) as client:
        if undo:
            client.undrain()
            if not quiet:
                emit("serving again")
            return
        try:
            if forget is not None:
                result = client.forget(forget, timeout=timeout, on_holders=show)
            else:
                result = client.drain(timeout=timeout, on_holders=show)
        except KeyboardInterrupt:
            goes_on = "the daemon continues to drain; `weightd drain --undo` ends the drain"
            raise CommandInterruptedError(
                f"interrupted: {goes_on if forget is None else 'the device serves on with what is left on it'}"
            ) from None
    done = "drained" if forget is None else "forgotten"
    if output is OutputFormat.JSON:
        emit_json({"state": done, **asdict(result), "seconds": time.monotonic() - start})
    elif not quiet:
        where = "" if forget is None else f"device {forget} is forgotten: "
        emit(f"{where}drained {plural(result.checkpoints, 'checkpoint')}, freed {size(result.freed_bytes)}")
