"""Admits calls before their requests are received: checks the caller, the number of calls and the request's size.

gRPC bounds one message and the connections, and counts neither calls nor users. So every handler reads its request
itself (error_mapping.py), after these checks: until then the kernel and HTTP/2's flow control hold the peer off, and a
call that is refused costs the daemon no memory. See docs/decisions/0031-books-are-paid-for.md.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from typing import TYPE_CHECKING

from weightd._limits import MAX_LOAD_REQUEST
from weightd.errors import DaemonBusyError, InvalidReferenceError, LeaseLostError, PermissionDeniedError
from weightd_daemon.handles.read_only import WITHOUT_TOKEN, check_allowed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from weightd_daemon.handles.connections import HandleSocketConnection, HandleSocketConnections

TOKEN = "weightd-token"  # noqa: S105  # the metadata key, not a secret
MAX_REQUEST = 64 << 10
"""Bytes of a request other than a load's or a composition's: as of a frame on the handle socket."""
MAX_CALLS_OF_CONNECTION = 128
"""Calls under way with one token, streams included."""
MAX_CALLS_OF_USER = 4096
"""Calls under way on all connections of one user."""
MAX_CALLS_WITHOUT_TOKEN = 64
"""Calls under way that carry no token: of health, reflection and the version."""
READERS = 2
"""Requests of one user that are received at a time; the others wait. Calls that stream requests, and so may be idle
between two, are counted apart."""
READ_SECONDS = 15.0
"""How long a request may take to arrive once it is its turn."""

_LOAD = "/weightd.v1.CheckpointService/Load"
_COMPOSE = "/weightd.v1.CompositionService/Compose"
_NOBODY = "nobody"
"""All who call without a token count as one."""


class AdmittedRpc:
    """One gRPC call that was admitted. `most` is how many bytes its request may have."""

    def __init__(self, method: str, most: int, readers: asyncio.Semaphore) -> None:
        self._method = method
        self._most = most
        self._readers = readers

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator[None]:
        """Around receiving the request. Errors: DaemonBusyError (it does not come)."""
        async with self._readers:
            try:
                async with asyncio.timeout(READ_SECONDS):
                    yield
            except TimeoutError:
                raise DaemonBusyError(f"the request of {self._method} did not arrive within {READ_SECONDS} s") from None

    def check(self, size: int) -> None:
        """Refuse a request of `size` bytes that is too large to be decoded. Errors: InvalidReferenceError."""
        if size > self._most:
            called = self._method.rpartition("/")[2]
            raise InvalidReferenceError(f"the request has {size} bytes; one of {called} may have {self._most}")


class RpcAdmission:
    """Admits gRPC calls: counts those under way, by connection and by user."""

    def __init__(self, connections: HandleSocketConnections) -> None:
        self._connections = connections
        self._calls: Counter[object] = Counter()
        self._readers: dict[object, asyncio.Semaphore] = {}

    @contextlib.contextmanager
    def enter(self, method: str, token: str, *, streams: bool = False) -> Iterator[AdmittedRpc]:
        """Let a call in until the block ends; one that `streams` may send more than one request.

        Errors: PermissionDeniedError (no such token, or one that is read-only), DaemonBusyError (too many calls),
        LeaseLostError (a load without an offer).
        """
        needs_token = not method.startswith(WITHOUT_TOKEN)
        connection: HandleSocketConnection | None = None
        if needs_token or token:
            try:
                connection = self._connections.by_token(token)
            except PermissionDeniedError:
                if needs_token:
                    raise
        if connection is None:
            bounds: dict[object, tuple[int, str]] = {_NOBODY: (MAX_CALLS_WITHOUT_TOKEN, "of callers without a token")}
        else:
            bounds = {
                connection.number: (MAX_CALLS_OF_CONNECTION, "of this connection"),
                ("uid", connection.uid): (MAX_CALLS_OF_USER, "of this user"),
            }
            if connection.read_only:
                check_allowed(method)
            if method == _LOAD and not connection.offers:
                raise LeaseLostError("an offer is not there; a load needs one of its own connection")
        for key, (most, whose) in bounds.items():
            if self._calls[key] >= most:
                raise DaemonBusyError(f"{most} calls {whose} are under way, and no more may be; wait until one ends")
        self._calls.update(bounds.keys())
        payer = next(reversed(bounds))
        readers = self._readers.setdefault((payer, streams), asyncio.Semaphore(READERS))
        try:
            most = MAX_LOAD_REQUEST if method in (_LOAD, _COMPOSE) else MAX_REQUEST
            yield AdmittedRpc(method, most, readers)
        finally:
            self._calls.subtract(bounds.keys())
            for key in bounds:
                if not self._calls[key]:
                    del self._calls[key]
            if payer not in self._calls:
                for either in (False, True):
                    self._readers.pop((payer, either), None)
