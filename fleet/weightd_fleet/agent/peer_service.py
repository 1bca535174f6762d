"""PeerService: what other nodes may ask this one, translated to and from the wire."""

from __future__ import annotations

import logging
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

import grpc

from weightd.errors import InvalidReferenceError, ServerError, WeightdError
from weightd_fleet._proto.v1 import peer_pb2, peer_pb2_grpc

from .addresses import AgentAddress, parse_address
from .inventory import encode
from .peer import OPTIONS
from .peer_errors import MAX_SOURCES, trailers_of
from .requests import FetchOrder
from .tls import check_role, require_loopback

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .inventory import NodeInventory
    from .requests import Fetched
    from .serving import ReadAdmission, ServedBlobs
    from .tls import TlsFolder

log = logging.getLogger(__name__)

_PIECE: Final = 2 << 20
_READERS: Final = ("agent", "client")
_CLIENTS: Final = ("client",)
_WATCH_SECONDS: Final = 1.0
READ_SECONDS: Final = 600.0
"""How long a read may take: a call asks for 256 MiB, or for one row."""
_THREADS: Final = 48
"""At most 16 readers, 8 followers of the inventory and 16 fetches for clients, and some for calls that end at once."""
_SINKS: Final = {peer_pb2.SINK_FILES: "files", peer_pb2.SINK_MEMORY: "memory"}


class PeerService(peer_pb2_grpc.PeerServiceServicer):
    """Serves blobs, and fetches where a client asks for it. `secure` is whether callers must have roles."""

    def __init__(
        self,
        blobs: ServedBlobs,
        reads: ReadAdmission,
        fetch: Callable[[FetchOrder, Callable[[int, int], None]], Fetched],
        *,
        secure: bool,
    ) -> None:
        self._blobs = blobs
        self._reads = reads
        self._fetch = fetch
        self._secure = secure
        self.stopping = threading.Event()
        self.read_seconds = READ_SECONDS

    def WatchInventory(self, request: Any, context: grpc.ServicerContext) -> Iterator[peer_pb2.Inventory]:  # noqa: N802
        """List what can be fetched, and follow it."""
        return self._answer(_READERS, context, self._followed(context) if request.follow else self._inventories())

    def GetManifest(self, request: Any, context: grpc.ServicerContext) -> Iterator[peer_pb2.ManifestPiece]:  # noqa: N802
        """Send a manifest."""
        return self._answer(_READERS, context, self._manifest(request))

    def ReadRows(self, request: Any, context: grpc.ServicerContext) -> Iterator[peer_pb2.RowPiece]:  # noqa: N802
        """Send rows."""
        return self._answer(_READERS, context, self._timed(context, self._rows(request)))

    def Fetch(self, request: Any, context: grpc.ServicerContext) -> Iterator[peer_pb2.FetchEvent]:  # noqa: N802
        """Fetch from others."""
        return self._answer(_CLIENTS, context, self._fetched(request))

    def Drain(self, request: Any, context: grpc.ServicerContext) -> peer_pb2.DrainResponse:  # noqa: N802
        """Refuse to serve further rows."""
        answer: peer_pb2.DrainResponse = next(self._answer(_CLIENTS, context, self._drained()))
        return answer

    def _answer(self, roles: tuple[str, ...], context: grpc.ServicerContext, answers: Iterator[Any]) -> Iterator[Any]:
        """Check the caller's role, then give the answers; errors as gRPC has them."""
        try:
            if self._secure:
                check_role(context.auth_context(), roles)  # type: ignore[arg-type]  # the stubs have the wrong type
            yield from answers
        except Exception as error:  # the boundary of the call: mapped, never swallowed
            if not isinstance(error, WeightdError):
                log.exception("a call of PeerService failed")
                error = ServerError("the agent failed; its log says how")
            context.set_trailing_metadata(trailers_of(error))
            context.abort(grpc.StatusCode[error.grpc_code], error.message)

    def _followed(self, context: grpc.ServicerContext) -> Iterator[peer_pb2.Inventory]:
        sent: NodeInventory | None = None
        with self._reads.watching():
            while context.is_active() and not self.stopping.is_set():
                now = self._blobs.inventory(draining=self._reads.draining)
                if now != sent:
                    yield encode(now)
                    sent = now
                self.stopping.wait(_WATCH_SECONDS)

    def _inventories(self) -> Iterator[peer_pb2.Inventory]:
        yield encode(self._blobs.inventory(draining=self._reads.draining))

    def _timed(self, context: grpc.ServicerContext, pieces: Iterator[Any]) -> Iterator[Any]:
        """Cancel a read if its reader does not take all of it in time: it keeps others from reading."""
        timer = threading.Timer(self.read_seconds, context.cancel)
        timer.daemon = True
        timer.start()
        try:
            yield from pieces
        finally:
            timer.cancel()

    def _manifest(self, request: Any) -> Iterator[peer_pb2.ManifestPiece]:
        encoded = self._blobs.manifest(request.name).encoded
        for offset in range(0, len(encoded), _PIECE):
            yield peer_pb2.ManifestPiece(data=encoded[offset : offset + _PIECE])

    def _rows(self, request: Any) -> Iterator[peer_pb2.RowPiece]:
        reader = parse_address(request.serves_at) if request.serves_at else None
        with (
            self._reads.admitted(request.name, reader),
            self._blobs.rows(request.name, request.digests) as found,
        ):
            total = 0
            for row, digest in enumerate(request.digests):
                offset = 0
                for piece in found.pieces(digest) if digest in found else ():
                    yield peer_pb2.RowPiece(row=row, offset=offset, data=bytes(piece))
                    offset += len(piece)
                total += offset
            log.info(
                "%s: sent %d bytes of %d rows to %s", request.name, total, len(request.digests), reader or "a client"
            )

    def _fetched(self, request: Any) -> Iterator[peer_pb2.FetchEvent]:
        """Fetch in a thread of its own, which goes on if the caller leaves."""
        order = _order(request)
        events: queue.SimpleQueue[peer_pb2.FetchEvent | Exception] = queue.SimpleQueue()

        def advance(done: int, total: int) -> None:
            progress = peer_pb2.FetchProgress(done_bytes=done, total_bytes=total)
            events.put(peer_pb2.FetchEvent(progress=progress))

        def work() -> None:
            try:
                with self._reads.fetching():  # here: who leaves does not end it
                    result = self._fetch(order, advance)
                events.put(peer_pb2.FetchEvent(result=peer_pb2.FetchResult(**result._asdict())))
            except Exception as error:  # noqa: BLE001  # raised in the call's thread
                events.put(error)

        threading.Thread(target=work, name="fetch", daemon=True).start()
        while True:
            event = events.get()
            if isinstance(event, Exception):
                raise event
            yield event
            if event.HasField("result"):
                return

    def _drained(self) -> Iterator[peer_pb2.DrainResponse]:
        self._reads.draining = True
        yield peer_pb2.DrainResponse()


def _order(request: Any) -> FetchOrder:
    """What a request asks for. Errors: InvalidReferenceError."""
    sink = _SINKS.get(request.sink)
    if sink is None:
        raise InvalidReferenceError("the request names no sink that this agent has; ask for files or memory")
    if not 0 < len(request.sources) <= MAX_SOURCES:
        raise InvalidReferenceError(f"{len(request.sources)} sources; name 1 to {MAX_SOURCES}")
    sources = tuple(map(parse_address, request.sources))
    return FetchOrder(request.name, sources, sink, request.local_name, pin=request.pin)


def serve(service: PeerService, listen: AgentAddress, tls: TlsFolder | None) -> tuple[grpc.Server, AgentAddress]:
    """Start to serve. Returns the server and where it listens, for port 0 is any that is free.

    Errors: PermissionDeniedError (plain text beyond the loopback), InvalidReferenceError (the address cannot be had, or
    no certificates).
    """
    require_loopback(listen, tls)
    server = grpc.server(ThreadPoolExecutor(_THREADS), options=[*OPTIONS, ("grpc.so_reuseport", 0)])
    peer_pb2_grpc.add_PeerServiceServicer_to_server(service, server)
    try:
        if tls is None:
            port = server.add_insecure_port(str(listen))
        else:
            port = server.add_secure_port(str(listen), tls.server())
    except RuntimeError as error:
        raise InvalidReferenceError(f"{listen}: cannot be listened on; is it in use?") from error
    server.start()
    return server, AgentAddress(listen.host, port)
