"""Puts the parts together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightd.top.application import TopApp
from weightd.top.lines import ASCII, UNICODE
from weightd.top.reader import DaemonReader

if TYPE_CHECKING:
    from weightd.client import Client


def run(client: Client, *, plain: bool) -> int:
    """Show the daemon until the user quits, close the client, and return the exit code.

    `plain` draws with ASCII alone.
    """
    app = TopApp(client, lambda publish: DaemonReader(client, publish), ASCII if plain else UNICODE)
    app.run()
    return app.return_code or 0
