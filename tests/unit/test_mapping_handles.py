"""What a client receives on the handle socket for its segments: descriptors or CUDA IPC handles, over many batches."""

from __future__ import annotations

import os
import socket

import pytest

from support.answers import Answers, Frame, attached, batch, failed, kinds
from weightd._proto.v1 import handles_pb2
from weightd._transport.handle_socket import _receive
from weightd.errors import (
    CapacityError,
    DrainingError,
    PermissionDeniedError,
    ResourceLimitError,
    ServerError,
    WeightdError,
)

# Before the fixtures of a test, so that it looks when they have closed what is theirs.
pytestmark = pytest.mark.usefixtures("no_descriptor_is_left")


def test_ipc_handles_are_collected_over_batches_in_order(answers: Answers) -> None:
    handles = [number.to_bytes(64, "big") for number in range(600)]
    received = answers.ask(
        attached(600, handles=handles[:252]), batch(handles=handles[252:505]), batch(handles=handles[505:])
    )
    assert received.handles == handles
    assert received.descriptors == [received.lease]
    assert received.reply.lease == 7
    assert kinds(answers.asked).count("ack") == 2
    os.close(received.lease)


def test_descriptors_are_collected_over_batches(answers: Answers) -> None:
    received = answers.ask(attached(300, descriptors=253), batch(descriptors=48))
    assert len(received.handles) == 300
    assert kinds(answers.asked).count("ack") == 1
    for descriptor in received.descriptors:
        os.close(descriptor)


@pytest.mark.parametrize("length", [0, 63, 65])
def test_a_handle_of_a_wrong_length_is_refused(length: int, answers: Answers) -> None:
    with pytest.raises(ServerError, match="wrong length"):
        answers.ask(attached(2, handles=[bytes(64), bytes(length)]))


def test_a_batch_of_nothing_is_refused(answers: Answers) -> None:
    with pytest.raises(ServerError, match="without descriptors or handles"):
        answers.ask(attached(2, handles=[bytes(64)]), batch())


def test_a_batch_that_lacks_the_descriptors_it_counts_is_refused(answers: Answers) -> None:
    """Else such batches would be asked for without end."""
    counted = handles_pb2.HandleReply(batch=handles_pb2.DescriptorBatch(descriptors=1))
    with pytest.raises(ServerError, match="without descriptors or handles"):
        answers.ask(attached(2), (counted, 0))


def test_what_comes_with_a_refused_offer_is_closed(answers: Answers) -> None:
    client = answers.connect((failed(DrainingError.reason), 2))
    with pytest.raises(DrainingError, match="said so"):
        client.offer()


@pytest.mark.parametrize(
    "kind", [PermissionDeniedError, ResourceLimitError, DrainingError, CapacityError], ids=lambda kind: kind.__name__
)
def test_an_error_of_the_daemon_is_no_failed_connection(kind: type[WeightdError], answers: Answers) -> None:
    """Though some are OSErrors, too."""
    with pytest.raises(kind, match=r"^said so$") as caught:
        answers.ask((failed(kind.reason, limit="x"), 0))
    assert type(caught.value) is kind
    assert caught.value.__cause__ is None


def test_an_answer_without_a_lease_is_refused(answers: Answers) -> None:
    with pytest.raises(ServerError, match="no descriptor of the lease"):
        answers.ask(attached(1, descriptors=0, handles=[bytes(64), bytes(64)]))


@pytest.mark.parametrize("frames", [[attached(1, descriptors=3)], [attached(2, descriptors=2), batch(descriptors=2)]])
def test_more_descriptors_than_there_are_segments_are_refused(frames: list[Frame], answers: Answers) -> None:
    with pytest.raises(ServerError, match=r"more than the handles of \d segments"):
        answers.ask(*frames)


def test_the_lease_has_a_descriptor_of_its_own_where_the_daemon_says_so(answers: Answers) -> None:
    received = answers.ask(attached(2, descriptors=4, lease_file=True))
    assert [request.attach.lease_file for request in answers.asked[1:]] == [True]
    assert len({received.manifest, received.lease, *received.handles}) == len(received.descriptors) == 4
    for descriptor in received.descriptors:
        os.close(descriptor)


def test_what_the_daemon_said_before_it_hung_up_is_read() -> None:
    """It refuses and hangs up with our question unread: the kernel says that first, and then has the refusal."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        ours.send(b"question")
        theirs.send(b"refusal")
        theirs.close()
        assert _receive(ours, 1)[0] == b"refusal"
        assert _receive(ours, 1)[0] == b""
