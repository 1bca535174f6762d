"""The client's end of the handle socket: identity, descriptors, offers. No grpc: an attach must not import it."""

from __future__ import annotations

import mmap
import os
import select
import socket
import threading
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from google.protobuf.message import DecodeError

from weightd import _failpoints
from weightd._limits import limit_error, out_of_descriptors
from weightd._proto.v1 import handles_pb2
from weightd.errors import DaemonBusyError, LeaseLostError, ProtocolMismatchError, ServerError, WeightdError, from_wire

from .address import check_peer, handles_path
from .protocol import IPC_HANDLE_BYTES, MAX_DESCRIPTORS, MAX_FRAME, MAX_MANIFEST_BYTES, PROTOCOL, receive_fds
from .unreachable import unreachable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

_FEED_BATCH = 32
"""Files in one message of an intake: a loader with few descriptors must have room for it."""
_ENDED, _ENDED_BYTES = 256, 4096
"""Leases that one frame says have ended, and room for them."""
_BACKLOG_PAUSE_SECONDS = 0.01


class ReceivedDescriptors(NamedTuple):
    """Answer to an attach as received from the socket: descriptors of manifest and lease, and each segment's handle.

    The lease is the manifest's descriptor where the daemon or its user has no lease file.
    """

    reply: handles_pb2.AttachReply
    manifest: int
    lease: int
    handles: list[int | bytes]

    @property
    def descriptors(self) -> list[int]:
        """All that are the caller's to close."""
        return [*{self.manifest, self.lease}, *(handle for handle in self.handles if isinstance(handle, int))]

    def read_manifest(self) -> bytes:
        """The encoded manifest. Errors: OSError, ServerError (it is shorter than the daemon says)."""
        size, parts = self._manifest_bytes, bytearray()
        while len(parts) < size:
            part = os.pread(self.manifest, size - len(parts), len(parts))
            if not part:
                raise ServerError(f"the daemon sent a manifest of {len(parts)} bytes, and said {size}")
            parts += part
        return bytes(parts)

    @property
    def lease_bytes(self) -> int:
        """Length of the mapping that is to hold the lease; nobody reads it where that is a file of its own.

        Errors: OSError, ServerError (it is the manifest's, which is shorter than the daemon says).
        """
        return mmap.PAGESIZE if self.reply.lease_file else self._manifest_bytes

    @property
    def _manifest_bytes(self) -> int:
        size = self.reply.manifest_bytes
        if not 0 < size <= min(os.fstat(self.manifest).st_size, MAX_MANIFEST_BYTES):
            raise ServerError(f"the daemon sent a manifest that cannot have the {size} bytes that it says")
        return size


class SocketClient:
    """The client's end of one connection to the daemon's handle socket; calls on the control socket carry its token.

    One that is `read_only` has a token that changes nothing, and is of no other use. Errors: those of `unreachable`,
    ProtocolMismatchError (also where the daemon knows no read-only connections).
    """

    def __init__(self, path: Path, timeout: float, *, read_only: bool = False) -> None:
        self.path = path
        self._timeout = timeout
        self.on_broken: Callable[[], None] = lambda: None
        """Told when a question finds that the connection has ended."""
        self.ended: deque[int] = deque()
        """Leases whose end is told with the next frames."""
        self._pid = os.getpid()
        self._lock = threading.Lock()
        try:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            raise unreachable(path, error, timeout) from error
        try:
            self._socket.settimeout(timeout)
            self._connect(timeout)
            check_peer(self._socket, path)
            hello = handles_pb2.HelloRequest(protocol=PROTOCOL, read_only=read_only)
            reply = self._ask(handles_pb2.HandleRequest(hello=hello), "hello").hello
            if read_only and not reply.read_only:
                raise ProtocolMismatchError(
                    f"the weightd daemon at {path} is version {reply.version}, which has no read-only connections; "
                    "update the daemon"
                )
        except BaseException:
            self._socket.close()
            raise
        self.token: str = reply.token
        self.version: str = reply.version

    def _connect(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while True:
            try:
                self._socket.connect(str(handles_path(self.path)))
            except BlockingIOError as error:  # it has yet to accept those before us; the kernel does not wait for that
                if time.monotonic() > deadline:
                    raise unreachable(self.path, error, timeout) from error
                time.sleep(_BACKLOG_PAUSE_SECONDS)
            except OSError as error:
                raise unreachable(self.path, error, timeout) from error
            else:
                return

    def alive(self) -> bool:
        """Whether the daemon still has this connection: it never speaks first, so what can be read is its farewell.

        While another thread waits for an answer there is something to read, too; that thread finds out for itself.
        """
        if not self._lock.acquire(blocking=False):
            return True
        try:
            if self._socket.fileno() < 0:
                return False
            poll = select.poll()
            poll.register(self._socket, select.POLLIN)
            return not poll.poll(0)
        finally:
            self._lock.release()

    def fileno(self) -> int:
        """The socket's descriptor; -1 when it is closed."""
        return self._socket.fileno()

    def close(self) -> None:
        """Hang up. Leases that are still mapped stay."""
        self._socket.close()

    def attach(self, request: handles_pb2.AttachRequest) -> ReceivedDescriptors:
        """Take a lease. Errors: those of the daemon and of `unreachable`."""
        descriptors: list[int] = []
        handles: list[bytes] = []  # in their stead where memory is shared by CUDA IPC
        with self._lock:
            try:
                request.lease_file = True
                frame = handles_pb2.HandleRequest(attach=request)
                reply = self._ask(frame, "attach", descriptors).attach
                handles.extend(reply.handles)
                lent = 2 if reply.lease_file else 1
                while len(descriptors) + len(handles) < lent + len(reply.segments):
                    before = len(descriptors) + len(handles)
                    ack = handles_pb2.HandleRequest(ack=handles_pb2.BatchAck())
                    handles.extend(self._ask(ack, "batch", descriptors).batch.handles)
                    if len(descriptors) + len(handles) == before:
                        raise ServerError("the daemon sent a batch without descriptors or handles")
                if len(descriptors) < lent or any(len(handle) != IPC_HANDLE_BYTES for handle in handles):
                    raise ServerError("the daemon sent no descriptor of the lease, or a handle of a wrong length")
                if len(descriptors) + len(handles) > lent + len(reply.segments):
                    raise ServerError(f"the daemon sent more than the handles of {len(reply.segments)} segments")
            except BaseException:
                if descriptors:
                    self._socket.close()  # batches may be outstanding
                for descriptor in descriptors:
                    os.close(descriptor)
                raise
        return ReceivedDescriptors(reply, descriptors[0], descriptors[lent - 1], [*descriptors[lent:], *handles])

    def offer(self) -> tuple[int, socket.socket]:
        """An intake to send file descriptors through, and its number."""
        descriptors: list[int] = []
        try:
            with self._lock:
                request = handles_pb2.HandleRequest(offer=handles_pb2.OfferRequest())
                number = self._ask(request, "offer", descriptors).offer.offer_id
            if len(descriptors) == 1:
                with suppress(OSError):  # it is no socket
                    return number, socket.socket(fileno=descriptors[0])
            raise ServerError(f"the daemon's offer came with {len(descriptors)} descriptors, and not with its intake")
        except BaseException:
            for descriptor in descriptors:
                os.close(descriptor)
            raise

    def detach(self, lease: int) -> bool:
        """Say that a lease may have ended; True when it has. A forked child says nothing: it is not its socket.

        Nothing is said while a question is under way. The daemon sees the end of a lease by itself when it needs the
        memory, and it may be a finalizer that asks, in the midst of this thread's own question.
        """
        if self._pid != os.getpid() or not self._lock.acquire(blocking=False):
            return False
        try:
            request = handles_pb2.HandleRequest(detach=handles_pb2.DetachRequest(lease=lease))
            return self._ask(request, "detach").detach.ended
        finally:
            self._lock.release()

    def reclaim(self, request: handles_pb2.ReclaimRequest) -> bool:
        """Say that a lease is ours; False where the daemon does not know it. Errors: of the daemon, LeaseLostError."""
        with self._lock:
            try:
                return self._ask(handles_pb2.HandleRequest(reclaim=request), "reclaim").reclaim.held
            except DaemonBusyError:
                raise
            except ConnectionError as error:
                raise LeaseLostError("the daemon does not take leases up again") from error

    def _ask(
        self, request: handles_pb2.HandleRequest, expected: str, descriptors: list[int] | None = None
    ) -> handles_pb2.HandleReply:
        """One question and its answer. Errors: those of the daemon and of `unreachable`, ProtocolMismatchError.

        Whatever comes between the two ends the connection: the next question would get this one's answer.
        """
        if request.ByteSize() < MAX_FRAME - _ENDED_BYTES:
            while self.ended and len(request.ended) < _ENDED:
                request.ended.append(self.ended.popleft())
        try:
            with suppress(BrokenPipeError, ConnectionResetError):  # it has hung up, and may have said why
                self._socket.sendall(request.SerializeToString())
            data, received, flags = _receive(self._socket, MAX_DESCRIPTORS if descriptors is not None else 0)
            if descriptors is not None:
                descriptors.extend(received)
            if not data:
                raise ConnectionResetError("the daemon closed the connection")
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise out_of_descriptors(f"receiving descriptors from {self.path}") or ServerError(
                    f"a reply of the daemon at {self.path} was cut off; a security module may keep descriptors back"
                )
            try:
                reply = handles_pb2.HandleReply.FromString(data)
            except DecodeError:
                reply = handles_pb2.HandleReply()
            kind = reply.WhichOneof("body")
            if kind is None or (expected == "hello" and kind not in ("hello", "error")):
                raise ProtocolMismatchError(f"what answers at {self.path} does not speak weightd's protocol")
            if kind not in (expected, "error"):
                raise ServerError(f"the daemon answered {kind} to {expected}")
        except BaseException as error:
            self._socket.close()
            self.on_broken()
            if isinstance(error, OSError) and not isinstance(error, WeightdError):
                raise unreachable(self.path, error, self._timeout) from error
            raise
        if kind == "error":
            raise from_wire(reply.error.reason, reply.error.message, dict(reply.error.metadata))
        return reply


def _receive(source: socket.socket, most: int) -> tuple[bytes, list[int], int]:
    """A frame, its descriptors and the flags."""
    try:
        return receive_fds(source, MAX_FRAME, most)
    except ConnectionResetError:  # it hung up with our question unread; then comes what it had said before that
        return receive_fds(source, MAX_FRAME, most)


def feed(intake: socket.socket, descriptors: Sequence[int], timeout: float) -> None:
    """Send files through an intake, in batches that the loader confirms.

    Returns early, without an error, when the loader hangs up: the load's own answer says why.
    Errors: LeaseLostError (no loader takes them), WeightdError (they cannot be sent).
    """
    intake.settimeout(timeout)
    sent = 0
    try:
        while sent < len(descriptors):
            batch = descriptors[sent : sent + _FEED_BATCH]
            frame = handles_pb2.IntakeBatch(first=sent, descriptors=len(batch))
            _failpoints.reach("client.feed")
            socket.send_fds(intake, [frame.SerializeToString()], batch)
            answer = intake.recv(MAX_FRAME)
            if not answer:
                return
            sent += len(batch)
    except TimeoutError as error:
        raise LeaseLostError(
            f"no loader took the files within {timeout:.0f} s; the daemon may be overloaded"
        ) from error
    except ConnectionError:
        return
    except OSError as error:
        failed = WeightdError(f"the checkpoint's files could not be sent to the daemon: {error}")
        raise limit_error(error, "sending the checkpoint's files to the daemon") or failed from error


def fit(request: handles_pb2.AttachRequest) -> bool:
    """Whether a request goes into one frame. One that is too long names nothing: then every segment is mapped."""
    request.lease_file = True
    if _frame_bytes(request) > MAX_FRAME:
        request.ClearField("tensors")
        request.ClearField("components")
    return _frame_bytes(request) <= MAX_FRAME


def _frame_bytes(request: handles_pb2.AttachRequest) -> int:
    return handles_pb2.HandleRequest(attach=request).ByteSize()
