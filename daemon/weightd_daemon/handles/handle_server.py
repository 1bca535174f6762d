"""The handle socket: sends descriptors and identifies peers, over SOCK_SEQPACKET. See docs/protocol.md.

asyncio's streams know no packets and no descriptors, so this is `add_reader` and `recvmsg`. What a peer does wrong
closes its connection and nothing else. A peer's descriptors are never received here: `recvmsg` is given no room for
them, so the kernel drops them. Otherwise closing one could hang the daemon (a FUSE file may hang even `close`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from itertools import count
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError

from weightd import _failpoints
from weightd._limits import DAEMON, limit_error
from weightd._proto.v1 import handles_pb2
from weightd._transport.protocol import MAX_DESCRIPTORS, MAX_FRAME, PROTOCOL, receive_fds
from weightd.errors import ProtocolMismatchError, ServerError, WeightdError
from weightd_daemon import __version__
from weightd_daemon.log_line import Line

from .entrance import HandleSocketEntrance, error_frame
from .log_rate import HandleLogRate
from .read_only import check_allowed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from weightd_daemon.devices.device import Handle

    from .attach import AttachHandler, IssuedHandles
    from .connections import HandleSocketConnections

log = logging.getLogger(__name__)

HELLO_SECONDS = 5.0
ACK_SECONDS = 10.0
MAX_OFFERS = 16
"""Intakes that a connection may have open without a load."""


class _ProtocolError(Exception):
    """The peer broke the protocol; its connection is closed."""


class HandleServer:
    """Serves the handle socket, one `_Conversation` per connection. Everything runs on the loop's thread.

    When an attach was answered, `on_attach` hears with what gRPC code, and the seconds that it took.
    """

    def __init__(
        self,
        *,
        connections: HandleSocketConnections,
        attacher: AttachHandler,
        max_connections: int,
        on_attach: Callable[[str, float], None],
    ) -> None:
        self._connections = connections
        self._attacher = attacher
        self._on_attach = on_attach
        self._offer_numbers = count(1)
        self._peers: set[_Conversation] = set()
        self.entrance = HandleSocketEntrance(self._enter, lambda: len(self._peers), max_connections)
        self._nonsense = HandleLogRate(lambda more: log.warning("protocol error: and %d more", more))

    def start(self, listener: socket.socket) -> None:
        """Serve a listening, non-blocking SOCK_SEQPACKET socket, in the place of the one before.

        It is closed in the end, and the one before now; connections that were made there go on.
        """
        self.entrance.open(listener)

    def stop(self) -> None:
        """Close the listener and every connection."""
        self.entrance.close()
        for peer in list(self._peers):
            peer.close("the daemon stops")

    def _enter(self, accepted: socket.socket) -> None:
        peer = _Conversation(self, accepted)
        self._peers.add(peer)
        peer.hear()  # its hello mostly comes with it, and then needs no further step of the loop


class _Conversation:
    """One connection: a state machine that is fed frames."""

    def __init__(self, server: HandleServer, accepted: socket.socket) -> None:
        self._server = server
        self._socket = accepted
        self._connection = server._connections.add(accepted)
        self._greeted = False
        self._unsent: list[Handle] = []
        self._waiting: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.call_later(HELLO_SECONDS, self.close, "no hello in time")
        self._loop.add_reader(accepted.fileno(), self.hear)

    def close(self, reason: str) -> None:
        """End the connection and what hangs on it."""
        if self not in self._server._peers:
            return
        self._server._peers.discard(self)
        self._deadline.cancel()
        if self._waiting is not None:
            self._waiting.cancel()
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        self._drop_unsent()
        connection = self._connection
        self._server._connections.remove(connection)
        self._server._attacher.disconnected(connection)
        who = {"number": connection.number, "pid": connection.pid}
        log.debug(Line("connection closed", who, because=reason))

    def hear(self) -> None:
        """Serve the next frame, if it is there."""
        self._guard(self._serve_frame)

    def _receive(self) -> handles_pb2.HandleRequest | None:
        """The next frame; None where the peer has left. Errors: _ProtocolError, DecodeError, OSError."""
        data, _, flags = receive_fds(self._socket, MAX_FRAME + 1, 0)
        if not data:
            return None
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(data) > MAX_FRAME:
            raise _ProtocolError("a frame is too long or carries descriptors")
        return handles_pb2.HandleRequest.FromString(data)

    def _guard(self, act: Callable[[], None]) -> None:
        """Do something for the peer; what it does wrong ends the connection."""
        try:
            act()
        except BlockingIOError:
            return
        except (_ProtocolError, DecodeError) as error:
            if self._server._nonsense.may_log():
                who = {"pid": self._connection.pid, "uid": self._connection.uid}
                log.warning(Line("protocol error", who, because=error))
            self.close("protocol error")
        except OSError as error:
            self.close(str(error))

    def _serve_frame(self) -> None:
        request = self._receive()
        if request is None:
            self.close("the peer left")
            return
        kind = request.WhichOneof("body")
        if self._unsent and kind != "ack":
            raise _ProtocolError(f"{kind} before the batch was acknowledged")
        if not self._greeted and kind != "hello":
            raise _ProtocolError(f"{kind} before hello")
        with self._reporting(kind):
            if self._connection.read_only and kind is not None:
                check_allowed(kind)
            self._server._attacher.ended(self._connection, request.ended)
            self._handle(kind, request)

    def _handle(self, kind: str | None, request: handles_pb2.HandleRequest) -> None:
        if kind == "hello":
            self._hello(request.hello)
        elif kind == "attach":
            start = time.perf_counter()
            self._timed(start, lambda: self._attach_or_wait(request.attach, start))
        elif kind == "ack":
            self._send_batch()
        elif kind == "offer":
            self._offer()
        elif kind == "detach":
            ended = self._server._attacher.detach(self._connection, request.detach.lease)
            self._send(handles_pb2.HandleReply(detach=handles_pb2.DetachReply(ended=ended)))
        elif kind == "reclaim":
            held = self._server._attacher.reclaim(self._connection, request.reclaim)
            self._send(handles_pb2.HandleReply(reclaim=handles_pb2.ReclaimReply(held=held)))
        else:
            raise _ProtocolError("a frame without a request")

    @contextlib.contextmanager
    def _reporting(self, kind: str | None) -> Iterator[None]:
        """Answer with the error that is raised here, unless it is the peer's."""
        try:
            yield
        except WeightdError as error:
            self._send_error(error)
        except (_ProtocolError, ConnectionError):
            raise
        except OSError as error:  # ours, not the peer's: no descriptor left, or too many in flight
            log.warning(Line("request failed", {"kind": kind, "pid": self._connection.pid}, because=error))
            self._drop_unsent()
            limit = limit_error(error, f"answering {kind}", DAEMON)
            why = error.strerror or type(error).__name__
            self._send_error(limit or ServerError(f"the daemon could not do it: {why}; its log has the details"))
        except Exception:  # a bug in answering one frame must not take the server down
            log.exception(Line("request failed by a bug", {"kind": kind}))
            self._send_error(ServerError("the request failed by a bug in the daemon; its log has the details"))

    def _hello(self, hello: handles_pb2.HelloRequest) -> None:
        if self._greeted:
            raise _ProtocolError("a second hello")
        if hello.protocol != PROTOCOL:
            message = f"this client speaks protocol {hello.protocol}, the daemon {PROTOCOL}; use versions that agree"
            self._send_error(ProtocolMismatchError(message))
            raise _ProtocolError(message)
        self._greeted = True
        self._deadline.cancel()
        self._connection.read_only = hello.read_only
        reply = handles_pb2.HelloReply(
            protocol=PROTOCOL, token=self._connection.token, version=__version__, read_only=hello.read_only
        )
        self._send(handles_pb2.HandleReply(hello=reply))
        # When the answer has gone: to find out who it is takes as long as to answer.
        self._loop.call_soon(self._server._connections.greeted, self._connection)

    def _timed(self, start: float, attach: Callable[[], bool]) -> None:
        """Count an attach whose frame came at `start`; not yet if `attach` returns that it is to be answered later."""
        code, answered = "INTERNAL", True
        try:
            answered = attach()
            code = "OK"
        except WeightdError as error:
            code = error.grpc_code
            raise
        except (ConnectionError, _ProtocolError):  # it has left, or takes no answer
            code = "CANCELLED"
            raise
        except OSError as error:  # `_reporting` answers it so
            if limit := limit_error(error, "answering attach", DAEMON):
                code = limit.grpc_code
            raise
        finally:
            if answered:
                self._server._on_attach(code, time.perf_counter() - start)

    def _attach_or_wait(self, request: handles_pb2.AttachRequest, start: float) -> bool:
        """Answer an attach, or wait for a file for its lease. Returns whether it is answered."""
        waiting = self._server._attacher.room(self._connection, request)
        if waiting is None:
            self._attach(request)
            return True
        self._loop.remove_reader(self._socket.fileno())  # until then the peer is not heard
        self._waiting = self._loop.create_task(self._attach_after(waiting, request, start))
        return False

    async def _attach_after(self, waiting: Awaitable[None], request: handles_pb2.AttachRequest, start: float) -> None:
        failure: Exception | None = None
        try:
            await waiting
        except Exception as error:  # noqa: BLE001  # reported below, as if it had been raised there
            failure = error
        self._waiting = None
        self._loop.add_reader(self._socket.fileno(), self.hear)

        def attach() -> bool:
            if failure is not None:
                raise failure
            return self._attach_or_wait(request, start)

        def answer() -> None:
            with self._reporting("attach"):
                self._timed(start, attach)

        self._guard(answer)

    def _attach(self, request: handles_pb2.AttachRequest) -> None:
        answer: IssuedHandles = self._server._attacher.attach(self._connection, request)
        try:
            lent = [one for one in answer.locked if one is not None]
            room = MAX_DESCRIPTORS - len(lent)
            first, later = answer.handles[:room], answer.handles[room:]
            # Duplicates: were the lease given up between two batches, a number could mean another file by then.
            for handle in later:  # one by one: what there is when this fails gets closed
                self._unsent.append(os.dup(handle) if isinstance(handle, int) else handle)
            descriptors = [handle for handle in first if isinstance(handle, int)]
            reply = handles_pb2.AttachReply(
                lease=answer.lease,
                lease_file=answer.locked.lease is not None,
                content_digest=answer.checkpoint.key.content_digest,
                manifest_bytes=answer.manifest_bytes,
                segments=answer.segments,
                descriptors=len(lent) + len(descriptors),
                handles=[handle for handle in first if isinstance(handle, bytes)],
            )
            _failpoints.reach("attach.send")
            self._send(handles_pb2.HandleReply(attach=reply), [*lent, *descriptors])
        except BaseException:
            answer.locked.close()
            self._server._attacher.detach(self._connection, answer.lease)  # it did not go out, so it ends here
            raise
        answer.locked.close()
        self._server._attacher.issued(answer)
        self._expect_ack()

    def _send_batch(self) -> None:
        if not self._unsent:
            raise _ProtocolError("an acknowledgement for nothing")
        batch, self._unsent = self._unsent[:MAX_DESCRIPTORS], self._unsent[MAX_DESCRIPTORS:]
        self._deadline.cancel()
        descriptors = [handle for handle in batch if isinstance(handle, int)]
        handles = [handle for handle in batch if isinstance(handle, bytes)]
        reply = handles_pb2.DescriptorBatch(descriptors=len(descriptors), handles=handles)
        try:
            self._send(handles_pb2.HandleReply(batch=reply), descriptors)
        finally:
            _close_all(batch)
        self._expect_ack()

    def _expect_ack(self) -> None:
        if self._unsent:
            self._deadline = self._loop.call_later(ACK_SECONDS, self.close, "no acknowledgement in time")

    def _drop_unsent(self) -> None:
        _close_all(self._unsent)
        self._unsent = []

    def _offer(self) -> None:
        if len(self._connection.offers) >= MAX_OFFERS:
            raise _ProtocolError(f"more than {MAX_OFFERS} offers without a load")
        self._server._attacher.check_offer(self._connection)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            number = next(self._server._offer_numbers)
            reply = handles_pb2.HandleReply(offer=handles_pb2.OfferReply(offer_id=number))
            self._send(reply, [theirs.fileno()])
            self._connection.offers[number] = ours.detach()

    def _send_error(self, error: WeightdError) -> None:
        self._send_frame(error_frame(error))

    def _send(self, reply: handles_pb2.HandleReply, descriptors: Sequence[int] = ()) -> None:
        self._send_frame(reply.SerializeToString(), descriptors)

    def _send_frame(self, frame: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send at once. A peer whose socket is full does not read its answers: it loses the connection."""
        try:
            socket.send_fds(self._socket, [frame], descriptors)
        except BlockingIOError:
            raise _ProtocolError("the peer does not read its answers") from None


def _close_all(handles: list[Handle]) -> None:
    for handle in handles:
        if isinstance(handle, int):
            os.close(handle)
