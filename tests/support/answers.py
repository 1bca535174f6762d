"""A daemon's end of the handle socket that says what a test tells it: to one client, question by question."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterable
from pathlib import Path

from weightd._proto.v1 import handles_pb2
from weightd._transport.handle_socket import ReceivedDescriptors, SocketClient
from weightd._transport.protocol import MAX_FRAME

Frame = tuple[handles_pb2.HandleReply | bytes, int | list[int]]
"""A reply, or bytes in the place of one; and how many descriptors of /dev/null go with it, or which."""

HELLO = handles_pb2.HandleReply(hello=handles_pb2.HelloReply(protocol=1, token="t", version="9.9"))


class Answers:
    """Say hello, then a frame to each question. When there is none left, hang up at the next question."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "w.sock"
        self.asked: list[handles_pb2.HandleRequest] = []
        """All questions so far, those that it hung up at among them."""
        self._frames: list[Frame] = []
        self._client: SocketClient | None = None
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(f"{self.path}.handles")
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)

    def connect(
        self, *frames: Frame, hello: handles_pb2.HandleReply | bytes = HELLO, read_only: bool = False
    ) -> SocketClient:
        """A client that is answered with `hello`, then with `frames`."""
        self._frames = [(hello, 0), *frames]
        self._thread.start()
        self._client = SocketClient(self.path, timeout=60, read_only=read_only)
        return self._client

    def ask(self, *frames: Frame) -> ReceivedDescriptors:
        """Attach, and be answered with `frames`."""
        return self.connect(*frames).attach(handles_pb2.AttachRequest(reference="m"))

    def close(self) -> None:
        """Close the client, and wait until that was heard."""
        if self._client is not None:
            self._client.close()
        if self._thread.ident is not None:
            self._thread.join(60)
            assert not self._thread.is_alive(), "the client has not hung up"
        self._listener.close()

    def _serve(self) -> None:
        peer, _ = self._listener.accept()
        peer.settimeout(60)
        with peer, open(os.devnull) as null:
            for answer, descriptors in self._frames:
                if not self._hears(peer):
                    return
                lent = [null.fileno()] * descriptors if isinstance(descriptors, int) else descriptors
                data = answer if isinstance(answer, bytes) else answer.SerializeToString()
                try:
                    socket.send_fds(peer, [data], lent)
                except BrokenPipeError:  # it does not wait for the answer
                    return
            self._hears(peer)

    def _hears(self, peer: socket.socket) -> bool:
        try:
            data = peer.recv(MAX_FRAME)
        except ConnectionResetError:  # with an answer unread
            return False
        if data:
            self.asked.append(handles_pb2.HandleRequest.FromString(data))
        return bool(data)


def kinds(asked: Iterable[handles_pb2.HandleRequest]) -> list[str]:
    """Which questions these are."""
    return [str(request.WhichOneof("body")) for request in asked]


def failed(reason: str, message: str = "said so", **metadata: str) -> handles_pb2.HandleReply:
    """The answer that the question failed."""
    return handles_pb2.HandleReply(error=handles_pb2.HandleError(reason=reason, message=message, metadata=metadata))


def attached(segments: int, descriptors: int = 1, handles: Iterable[bytes] = (), *, lease_file: bool = False) -> Frame:
    """The answer to an attach of that many segments: descriptors, the lease's first, or handles, as one batch."""
    reply = handles_pb2.AttachReply(
        lease=7, segments=range(segments), descriptors=descriptors, handles=handles, lease_file=lease_file
    )
    return handles_pb2.HandleReply(attach=reply), descriptors


def batch(descriptors: int = 0, handles: Iterable[bytes] = ()) -> Frame:
    """A further batch."""
    reply = handles_pb2.DescriptorBatch(descriptors=descriptors, handles=handles)
    return handles_pb2.HandleReply(batch=reply), descriptors
