"""The command `web`, which serves a page about the daemon to the browser of the user who runs it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
import webbrowser
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weightd.cli.context import SocketOption, open_client, require
from weightd.cli.output import emit, flush

if TYPE_CHECKING:
    from weightd.client import Client


def web(
    context: typer.Context,
    port: Annotated[
        int, typer.Option("--port", "-p", metavar="PORT", min=0, max=65535, help="Port; 0 is any that is free.")
    ] = 0,
    browser: Annotated[
        bool | None,
        typer.Option(
            "--open/--no-open", help="Open the page in a browser [default: in a terminal of a graphical session]."
        ),
    ] = None,
    socket: SocketOption = None,
) -> None:
    """Show the daemon in a browser, live.

    The page has a memory map, who shares with whom, holders, loads and events, and what to remove to make room.

    The page is served until Ctrl-C, on this machine only, at an address with a token that only you know. It changes
    nothing. From another machine, forward the port: ssh -L PORT:127.0.0.1:PORT HOST.

    \b
    Examples:
      weightd web
      weightd web --no-open --port 8080
    """
    require("web", ["aiohttp"], "web")
    if browser is None:
        browser = sys.stdout.isatty() and any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))
    with open_client(context, socket, read_only=True) as client:
        client.version()  # fails now if nobody answers, and not on the page
        asyncio.run(_serve(client, port, browser))


async def _serve(client: Client, port: int, browser: bool) -> None:
    from weightd.web.server import serving  # aiohttp may be missing

    async with serving(client, port) as address:
        emit(f"Open {address}")
        emit("Ctrl-C ends it.")
        flush()
        with _opened(address) if browser else contextlib.nullcontext():
            await asyncio.Event().wait()


@contextlib.contextmanager
def _opened(address: str) -> Iterator[None]:
    """Open an address in a browser. Command lines can be read by every user, so the browser gets a private file."""
    with tempfile.TemporaryDirectory(prefix="weightd-web-") as folder:
        file = Path(folder) / "open.html"
        target = escape(address, quote=True)
        file.write_text(
            f'<!doctype html><meta http-equiv="refresh" content="0;url={target}"><a href="{target}">weightd</a>'
        )
        webbrowser.open(file.as_uri())
        yield
