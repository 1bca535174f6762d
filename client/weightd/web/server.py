"""Serve the page and its data over HTTP, on the loopback interface, to who knows the token."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from aiohttp import web

from weightd.errors import InvalidReferenceError, WeightdError
from weightd.page.document import read_assets, web_document

from .access import knows_token, refusal
from .answers import encoded, pair_rows, tensor_rows
from .sections import SectionReader

if TYPE_CHECKING:
    from weightd.client import Client

HOST = "127.0.0.1"
_FOLDER = "/assets/"
_WAIT = 20.0
"""Seconds after which a request for changes is answered although there are none."""
_PARTING = 0.2
"""Seconds that requests have to end when the server stops."""
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_STATUSES = {"NOT_FOUND": 404, "INVALID_REFERENCE": 400}

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def serving(client: Client, port: int) -> AsyncIterator[str]:
    """Serve on a port (0: any) until the block ends; the value is the address to open, with the token.

    The token stands behind `#`, a part of the address that browsers do not send. Errors: InvalidReferenceError (the
    port is taken, or not this user's to take).
    """
    token = secrets.token_urlsafe(24)
    server = PageServer(client, token)
    runner = web.AppRunner(server.application(), access_log=None, shutdown_timeout=_PARTING)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, HOST, port).start()
        except OSError as error:
            raise InvalidReferenceError(f"port {port} cannot be served: {os.strerror(error.errno or 0)}") from error
        server.reader.start()
        try:
            yield f"http://{HOST}:{runner.addresses[0][1]}/#token={token}"
        finally:
            server.close()
            await asyncio.to_thread(server.reader.stop)
    finally:
        await runner.cleanup()


class PageServer:
    """The routes. The page and its modules are public, for they are the same everywhere; data needs the token."""

    def __init__(self, client: Client, token: str) -> None:
        self._client = client
        self._token = token
        self._document = web_document(_FOLDER)
        self._assets = read_assets()
        self._news = asyncio.Event()
        self._closing = False
        self._loop = asyncio.get_running_loop()
        self.reader = SectionReader(client, self._told)

    def application(self) -> web.Application:
        """Return the application to serve."""
        application = web.Application(middlewares=[self._guard])
        application.router.add_get("/", self._page)
        application.router.add_get(_FOLDER + "{name}", self._asset)
        application.router.add_get("/api/state", self._state)
        application.router.add_get("/api/checkpoint", self._checkpoint)
        application.router.add_get("/api/tensors", self._tensors)
        return application

    def close(self) -> None:
        """Answer the requests that wait for changes."""
        self._closing = True
        self._tell()

    def _told(self) -> None:
        """Called from the reader's thread."""
        self._loop.call_soon_threadsafe(self._tell)

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    @web.middleware
    async def _guard(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        refused = refusal(request.method, request.headers)
        if refused is None and request.path.startswith("/api/") and not knows_token(request.headers, self._token):
            refused = 401, "the token is wrong: open the address that `weightd web` has printed"
        if refused is not None:
            response: web.StreamResponse = _message(*refused)
        else:
            try:
                response = await handler(request)
            except web.HTTPException as error:
                response = _message(error.status, error.reason)
            except WeightdError as error:
                response = _message(_STATUSES.get(error.reason, 503), str(error))
        response.headers.update(_HEADERS)
        response.headers["Content-Security-Policy"] = self._document.policy
        return response

    async def _page(self, _: web.Request) -> web.Response:
        return web.Response(body=self._document.content, content_type="text/html", charset="utf-8")

    async def _asset(self, request: web.Request) -> web.Response:
        asset = self._assets.get(request.match_info["name"])
        if asset is None:
            raise web.HTTPNotFound
        return web.Response(body=asset.content, content_type=asset.content_type, charset="utf-8")

    async def _state(self, request: web.Request) -> web.Response:
        """Return the sections whose versions differ from those in the query, as soon as there are any."""
        known = request.query
        deadline = asyncio.get_running_loop().time() + _WAIT
        while True:
            news = self._news
            self.reader.look()
            sections = self.reader.sections
            changed = {name: each for name, each in sections.items() if known.get(name) != str(each.version)}
            left = deadline - asyncio.get_running_loop().time()
            if changed or left <= 0 or self._closing:
                break
            try:
                await asyncio.wait_for(news.wait(), left)
            except TimeoutError:
                continue
        rows = (
            encoded(name) + b':{"version":%d,"value":' % each.version + each.content + b"}"
            for name, each in changed.items()
        )
        return _json(b"{" + b",".join(rows) + b"}")

    async def _checkpoint(self, request: web.Request) -> web.Response:
        """Return the details of a checkpoint, and its partners."""

        def ask(digest: str, device: str) -> dict[str, Any]:
            details = self._client.inspect(digest, device)
            try:
                partners: Any = pair_rows(self._client.sharing(digest, device))
            except WeightdError as error:
                partners = {"missing": str(error)}
            return asdict(details) | {"partners": partners}

        return _json(await asyncio.to_thread(lambda: encoded(ask(*_meant(request)))))

    async def _tensors(self, request: web.Request) -> web.Response:
        """Return the tensors of a checkpoint."""
        digest, device = _meant(request)
        return _json(await asyncio.to_thread(lambda: encoded(tensor_rows(self._client.tensors(digest, device)))))


def _meant(request: web.Request) -> tuple[str, str]:
    """The digest and device that a request names. Raises HTTPBadRequest."""
    try:
        return request.query["digest"], request.query["device"]
    except KeyError as error:
        raise web.HTTPBadRequest(reason=f"{error.args[0]} is missing") from None


def _json(content: bytes) -> web.Response:
    return web.Response(body=content, content_type="application/json", charset="utf-8")


def _message(status: int, text: str) -> web.Response:
    return web.Response(status=status, text=f"weightd web: {text}\n")
