"""The command `top`. What it shows is in `weightd.top`, which is imported when it runs: it needs textual."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from weightd.cli.context import SocketOption, open_client, require, say


def top(
    context: typer.Context,
    ascii_only: Annotated[
        bool, typer.Option("--ascii", help="Draw with ASCII alone [default: if the locale or terminal has no more].")
    ] = False,
    socket: SocketOption = None,
) -> None:
    """Watch memory, checkpoints, processes and loads live.

    Press ? for the meaning of figures and keys. Pins and removals ask first.

    \b
    Examples:
      weightd top
      weightd top --ascii
      weightd top --socket /run/weightd/weightd.sock
    """
    require("top", ["textual"], "top")
    streams = (sys.stdin, sys.stdout, sys.stderr)  # textual writes to stderr
    if not all(stream.isatty() for stream in streams) or os.environ.get("TERM", "dumb") in ("", "dumb", "unknown"):
        say("top needs a terminal that can move its cursor; use `weightd stats`, `weightd ls` or `weightd ps`")
        raise typer.Exit(1)
    with open_client(context, socket) as client:
        client.stats()  # an error here is a line and an exit code, as of the other commands
        # Imported now, so that the other commands do not pay for textual, which takes a third of a second.
        from weightd.top.run import run

        code = run(client, plain=ascii_only or not _has_unicode())
    raise typer.Exit(code)


def _has_unicode() -> bool:
    """Whether locale and terminal show more than ASCII."""
    if os.environ.get("TERM") == "linux":
        return False  # its font has 256 or 512 characters
    said = os.environ.get("LC_ALL") or os.environ.get("LC_CTYPE") or os.environ.get("LANG") or ""
    if said == "C.UTF-8" and not os.environ.get("LC_ALL") and os.environ.get("LANG", "C") in ("", "C", "POSIX"):
        return False  # Python itself put LC_CTYPE there, for the locale C
    return "utf-8" in said.lower() or "utf8" in said.lower()
