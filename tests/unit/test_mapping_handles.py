"""What a client receives on the handle socket for its segments: descriptors or CUDA IPC handles, over many batches."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from support.descriptors import open_descriptors
from weightd._proto.v1 import handles_pb2
from weightd._transport.handle_socket import ReceivedDescriptors, SocketClient, _receive
from weightd._transport.protocol import MAX_FRAME
from weightd.errors import (
    CapacityError,
    DrainingError,
    PermissionDeniedError,
    ResourceLimitError,
    ServerError,
    WeightdError,
)

Frame = tuple[handles_pb2.HandleReply, int]
"""A reply and how many descriptors go with it."""


class Answers:
    """A daemon that says what it is told, frame by frame, to one client."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "w.sock"
        self.acks = 0
        self._frames: list[Frame] = [(handles_pb2.HandleReply(hello=handles_pb2.HelloReply(protocol=1)), 0)]
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(f"{self.path}.handles")
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)

    def ask(self, *frames: Frame) -> ReceivedDescriptors:
        """Attach, and be answered with `frames`."""
        with contextlib.closing(self._connect(frames)) as connection:
            return connection.attach(handles_pb2.AttachRequest(reference="m"))

    def offer(self, *frames: Frame) -> None:
        """Offer files, and be answered with `frames`."""
        with contextlib.closing(self._connect(frames)) as connection:
            connection.offer()

    def _connect(self, frames: Iterable[Frame]) -> SocketClient:
        self._frames += frames
        self._thread.start()
        return SocketClient(self.path, timeout=60)

    def close(self) -> None:
        self._thread.join(60)
        self._listener.close()

    def _serve(self) -> None:
        peer, _ = self._listener.accept()
        peer.settimeout(60)
        with peer, open(os.devnull) as null:
            for reply, descriptors in self._frames:
                request = handles_pb2.HandleRequest.FromString(peer.recv(MAX_FRAME))
                self.acks += request.WhichOneof("body") == "ack"
                socket.send_fds(peer, [reply.SerializeToString()], [null.fileno()] * descriptors)
            peer.recv(MAX_FRAME)  # until the client has hung up


@pytest.fixture
def answers(tmp_path: Path) -> Iterator[Answers]:
    made = Answers(tmp_path)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _no_descriptor_is_left() -> Iterator[None]:
    before = open_descriptors()
    yield
    assert open_descriptors() == before


def attach(segments: int, descriptors: int = 1, handles: list[bytes] | None = None) -> Frame:
    reply = handles_pb2.AttachReply(lease=7, segments=range(segments), descriptors=descriptors, handles=handles or [])
    return handles_pb2.HandleReply(attach=reply), descriptors


def batch(descriptors: int = 0, handles: list[bytes] | None = None) -> Frame:
    reply = handles_pb2.DescriptorBatch(descriptors=descriptors, handles=handles or [])
    return handles_pb2.HandleReply(batch=reply), descriptors


def test_ipc_handles_are_collected_over_batches_in_order(answers: Answers) -> None:
    handles = [number.to_bytes(64, "big") for number in range(600)]
    received = answers.ask(
        attach(600, handles=handles[:252]), batch(handles=handles[252:505]), batch(handles=handles[505:])
    )
    assert received.handles == handles
    assert received.descriptors == [received.lease]
    assert received.reply.lease == 7
    assert answers.acks == 2
    os.close(received.lease)


def test_descriptors_are_collected_over_batches(answers: Answers) -> None:
    received = answers.ask(attach(300, descriptors=253), batch(descriptors=48))
    assert len(received.handles) == 300
    assert answers.acks == 1
    for descriptor in received.descriptors:
        os.close(descriptor)


@pytest.mark.parametrize("length", [0, 63, 65])
def test_a_handle_of_a_wrong_length_is_refused(length: int, answers: Answers) -> None:
    with pytest.raises(ServerError, match="wrong length"):
        answers.ask(attach(2, handles=[bytes(64), bytes(length)]))


def test_a_batch_of_nothing_is_refused(answers: Answers) -> None:
    with pytest.raises(ServerError, match="without descriptors or handles"):
        answers.ask(attach(2, handles=[bytes(64)]), batch())


def test_a_batch_that_lacks_the_descriptors_it_counts_is_refused(answers: Answers) -> None:
    """Else such batches would be asked for without end."""
    counted = handles_pb2.HandleReply(batch=handles_pb2.DescriptorBatch(descriptors=1))
    with pytest.raises(ServerError, match="without descriptors or handles"):
        answers.ask(attach(2), (counted, 0))


def test_what_comes_with_a_refused_offer_is_closed(answers: Answers) -> None:
    error = handles_pb2.HandleError(reason=DrainingError.reason, message="said so")
    with pytest.raises(DrainingError, match="said so"):
        answers.offer((handles_pb2.HandleReply(error=error), 2))


@pytest.mark.parametrize(
    "kind", [PermissionDeniedError, ResourceLimitError, DrainingError, CapacityError], ids=lambda kind: kind.__name__
)
def test_an_error_of_the_daemon_is_no_failed_connection(kind: type[WeightdError], answers: Answers) -> None:
    """Though some are OSErrors, too."""
    error = handles_pb2.HandleError(reason=kind.reason, message="said so", metadata={"limit": "x"})
    with pytest.raises(kind, match=r"^said so$") as caught:
        answers.ask((handles_pb2.HandleReply(error=error), 0))
    assert type(caught.value) is kind
    assert caught.value.__cause__ is None


def test_an_answer_without_a_lease_is_refused(answers: Answers) -> None:
    with pytest.raises(ServerError, match="no descriptor of the lease"):
        answers.ask(attach(1, descriptors=0, handles=[bytes(64), bytes(64)]))


def test_what_the_daemon_said_before_it_hung_up_is_read() -> None:
    """It refuses and hangs up with our question unread: the kernel says that first, and then has the refusal."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        ours.send(b"question")
        theirs.send(b"refusal")
        theirs.close()
        assert _receive(ours, 1)[0] == b"refusal"
        assert _receive(ours, 1)[0] == b""
