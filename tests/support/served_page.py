"""The server of `weightd web` in a thread of this process, on whatever client a test gives it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from weightd.web.server import serving


@contextmanager
def served(client: Any, port: int = 0) -> Iterator[str]:
    """Serve until the block ends; the value is the address with the token."""
    ready = threading.Event()
    said: list[str] = []
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        async with serving(client, port) as address:
            said.append(address)
            ready.set()
            await stop.wait()

    def run() -> None:
        try:
            loop.run_until_complete(serve())
        finally:
            ready.set()
            loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait()
    assert said, "the server did not start"
    try:
        yield said[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
