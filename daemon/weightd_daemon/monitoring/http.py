"""Serves a few pages over HTTP, for monitoring: one small GET per connection, within a time limit.

Everything runs on the daemon's loop, so a page sees the books at one moment, and an answer means that the loop turns.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import NamedTuple

log = logging.getLogger(__name__)

MAX_REQUEST = 8 << 10
"""Bytes of a request line with its headers."""
SECONDS = 5.0
"""For a request to come and its answer to go, in all."""
MOST_CONNECTIONS = 16
TEXT = "text/plain; charset=utf-8"


class MonitoringPage(NamedTuple):
    """HTTP answer to a monitor."""

    status: HTTPStatus
    body: bytes
    content_type: str = TEXT


class MonitoringServer:
    """HTTP server for monitors: serves pages by path, each made when it is requested."""

    def __init__(self, pages: Mapping[str, Callable[[], MonitoringPage | Awaitable[MonitoringPage]]]) -> None:
        self._pages = pages
        self._server: asyncio.Server | None = None
        self._answering: set[asyncio.Task[None]] = set()

    async def start(self, listener: socket.socket) -> None:
        """Serve a stream socket that is bound; it is closed in the end."""
        self._server = await asyncio.start_server(self._connected, sock=listener, limit=MAX_REQUEST)

    async def stop(self) -> None:
        """Close the listener and every connection."""
        if self._server is not None:
            self._server.close()
        for task in self._answering:
            task.cancel()
        if self._answering:
            await asyncio.wait(self._answering)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._answering) >= MOST_CONNECTIONS:
            writer.transport.abort()
            return
        task = asyncio.get_running_loop().create_task(self._answer(reader, writer))
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(SECONDS):
                writer.write(_encode(await self._page(reader)))
                writer.close()
                await writer.wait_closed()
        except (OSError, EOFError, TimeoutError) as error:
            log.debug("no page for somebody: %s", repr(error))
        finally:
            writer.transport.abort()  # what is still there of one who does not read

    async def _page(self, reader: asyncio.StreamReader) -> MonitoringPage:
        """The answer to what is asked. Errors: EOFError (the peer left)."""
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            return _refusal(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        method, _, rest = head.partition(b"\r\n")[0].partition(b" ")
        target, _, version = rest.partition(b" ")
        if not version.startswith(b"HTTP/1."):
            return _refusal(HTTPStatus.BAD_REQUEST)
        if method != b"GET":
            return _refusal(HTTPStatus.METHOD_NOT_ALLOWED)
        page = self._pages.get(target.partition(b"?")[0].decode("latin-1"))
        if page is None:
            return _refusal(HTTPStatus.NOT_FOUND)
        try:
            made = page()
            return await made if isinstance(made, Awaitable) else made
        except Exception:  # a bug in a page must not take the others down
            log.exception("no page by a bug")
            return _refusal(HTTPStatus.INTERNAL_SERVER_ERROR)


def _refusal(status: HTTPStatus) -> MonitoringPage:
    return MonitoringPage(status, f"{status.phrase}\n".encode())


def _encode(page: MonitoringPage) -> bytes:
    allow = "Allow: GET\r\n" if page.status is HTTPStatus.METHOD_NOT_ALLOWED else ""
    head = (
        f"HTTP/1.1 {page.status.value} {page.status.phrase}\r\n{allow}Content-Type: {page.content_type}\r\n"
        f"Content-Length: {len(page.body)}\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + page.body
