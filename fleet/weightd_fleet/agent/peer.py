"""A peer, as an agent that fetches sees it: whatever comes is checked for its size and order before it is used."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Final, Self

import grpc

from weightd.errors import FormatError, ProtocolMismatchError
from weightd_fleet._proto.v1 import peer_pb2, peer_pb2_grpc
from weightd_fleet.core.digests import fleet_name
from weightd_fleet.core.encoding import MAX_MANIFEST_BYTES
from weightd_fleet.core.manifest import FleetManifest

from .blobs import PIECE
from .inventory import MAX_ENTRIES, decode
from .peer_errors import error_from
from .tls import require_loopback

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    from .addresses import AgentAddress
    from .inventory import NodeInventory
    from .tls import TlsFolder

MESSAGE_BYTES: Final = 8 << 20
"""Most bytes of a message in either direction."""
_SLOWEST: Final = 4 << 20
"""Bytes a second that a peer must send on average."""
_LONGEST: Final = 365 * 86_400.0
"""Seconds of patience; gRPC takes an infinity for a deadline that is over."""
_OVER: Final = (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)

OPTIONS: Final = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.enable_http_proxy", 0),
)
_CHANNEL: Final = (*OPTIONS, ("grpc.use_local_subchannel_pool", 1))
"""A new channel connects at once, whatever became of those before it to the same address."""


class Peer:
    """A connection to an agent. Every call has a deadline: `patience` seconds, and what its bytes may take.

    All methods raise DaemonUnreachableError (nobody answers, TLS fails, too slow), PermissionDeniedError (our role),
    what the peer says, and FormatError or ProtocolMismatchError for an answer that cannot be.
    """

    def __init__(self, address: AgentAddress, tls: TlsFolder | None, patience: float = 30.0) -> None:
        require_loopback(address, tls)
        self.address = address
        self._patience = min(patience, _LONGEST)
        if tls is None:
            self._channel = grpc.insecure_channel(str(address), options=_CHANNEL)
        else:
            self._channel = grpc.secure_channel(str(address), tls.channel(), options=_CHANNEL)
        self._stub = peer_pb2_grpc.PeerServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all calls, which may run in other threads."""
        self._channel.close()

    def inventory(self) -> list[peer_pb2.InventoryEntry]:
        """What can be fetched from the peer."""
        with self._errors():
            call = self._stub.WatchInventory(peer_pb2.WatchInventoryRequest(), timeout=self._patience)
            entries = [entry for inventory in call for entry in inventory.entries]
        if len(entries) > MAX_ENTRIES:
            raise FormatError(f"peer {self.address}: lists {len(entries)} checkpoints, over the limit of {MAX_ENTRIES}")
        return entries

    def follow(self) -> Iterator[NodeInventory]:
        """What the peer holds, now and after each change, for at most `patience` seconds: so a silent one is noticed.

        Then it ends without an error, as it does when another thread closes the connection.
        """
        told = False
        with self._errors():
            call = self._stub.WatchInventory(peer_pb2.WatchInventoryRequest(follow=True), timeout=self._patience)
            try:
                for message in call:
                    told = True
                    yield decode(message, self.address)
            except grpc.RpcError:
                if call.code() not in _OVER or (call.code() is grpc.StatusCode.DEADLINE_EXCEEDED and not told):
                    raise
            finally:
                call.cancel()

    def manifest(self, name: str) -> FleetManifest:
        """The manifest that a name stands for. Its bytes are proven by the name."""
        encoded = bytearray()
        with self._errors():
            call = self._stub.GetManifest(
                peer_pb2.GetManifestRequest(name=name), timeout=self._patience + MAX_MANIFEST_BYTES / _SLOWEST
            )
            for piece in call:
                encoded += piece.data
                if len(encoded) > MAX_MANIFEST_BYTES:
                    call.cancel()
                    raise FormatError(f"peer {self.address}: sends a manifest of more than {MAX_MANIFEST_BYTES} bytes")
        if fleet_name(bytes(encoded)) != name:
            raise FormatError(f"peer {self.address}: sends a manifest that is not the one of {name}")
        return FleetManifest.decode(bytes(encoded))

    def rows(
        self, name: str, wanted: Sequence[tuple[bytes, int]], serves_at: str
    ) -> Generator[tuple[int, bytes], None, None]:
        """The bytes of blobs, given as digest and length, in pieces with the blob's index. They are not verified.

        Each blob comes whole, in the order of `wanted`; one without bytes does not come.
        """
        request = peer_pb2.ReadRowsRequest(name=name, digests=[digest for digest, _ in wanted], serves_at=serves_at)
        total = sum(length for _, length in wanted)
        row = done = 0
        with self._errors():
            call = self._stub.ReadRows(request, timeout=self._patience + total / _SLOWEST)
            try:
                for piece in call:
                    while row < len(wanted) and done == wanted[row][1]:
                        row, done = row + 1, 0
                    size = len(piece.data)
                    if piece.row != row or piece.offset != done or not 0 < size <= PIECE or row >= len(wanted):
                        raise FormatError(f"peer {self.address}: sends rows that were not asked for, or out of order")
                    done += size
                    if done > wanted[row][1]:
                        raise FormatError(f"peer {self.address}: sends more of a row than the manifest says")
                    yield row, piece.data
            finally:
                call.cancel()
        if row < len(wanted) and done == wanted[row][1]:
            row += 1
        if any(length for _, length in wanted[row:]):
            raise FormatError(f"peer {self.address}: ends before all rows have come")

    def fetch(self, request: peer_pb2.FetchRequest, seconds: float) -> Iterator[peer_pb2.FetchEvent]:
        """Have the peer fetch; its events, the last with the result. It may take `seconds`."""
        with self._errors(of_read=False):
            yield from self._stub.Fetch(request, timeout=seconds)

    def drain(self) -> None:
        """Have the peer refuse to serve further rows."""
        with self._errors():
            self._stub.Drain(peer_pb2.DrainRequest(), timeout=self._patience)

    @contextlib.contextmanager
    def _errors(self, *, of_read: bool = True) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            failed: Any = error  # a call that failed is an error and a call
            if failed.code() is grpc.StatusCode.UNIMPLEMENTED:
                raise ProtocolMismatchError(f"peer {self.address}: is no agent of this version") from None
            trailers = failed.trailing_metadata() or ()
            raise error_from(
                self.address, failed.code().name, failed.details() or "", trailers, of_read=of_read
            ) from None
