"""Files on their way through an intake, from the client's end: batches, and loaders that take none."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator

import pytest

import weightd
from weightd._proto.v1 import handles_pb2
from weightd._transport.handle_socket import feed
from weightd._transport.protocol import MAX_FRAME
from weightd.errors import LeaseLostError

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


def batches(intake: socket.socket) -> list[tuple[int, int, int]]:
    """What waits at the loader's end: the number of the first, how many it says, how many came."""
    found = []
    intake.settimeout(0)
    while True:
        try:
            data, descriptors, _, _ = socket.recv_fds(intake, MAX_FRAME, 253)
        except BlockingIOError:
            return found
        for descriptor in descriptors:
            os.close(descriptor)
        batch = handles_pb2.IntakeBatch.FromString(data)
        found.append((batch.first, batch.descriptors, len(descriptors)))


def test_files_are_sent_in_batches_that_the_loader_confirms(pair: Pair) -> None:
    ours, theirs = pair
    for _ in range(3):
        theirs.send(b"confirmed")  # before they come: it is one thread here
    feed(ours, [0] * 70, 60.0)
    assert batches(theirs) == [(0, 32, 32), (32, 32, 32), (64, 6, 6)]


def test_a_loader_that_wants_no_more_files_gets_none(pair: Pair) -> None:
    ours, theirs = pair
    theirs.send(b"confirmed")
    theirs.shutdown(socket.SHUT_WR)
    feed(ours, [0] * 70, 60.0)
    assert batches(theirs) == [(0, 32, 32), (32, 32, 32)]


def test_a_loader_that_has_gone_says_why_elsewhere(pair: Pair) -> None:
    ours, theirs = pair
    theirs.close()
    feed(ours, [0], 60.0)


def test_files_that_no_loader_takes_are_given_up(pair: Pair) -> None:
    ours, _ = pair
    with pytest.raises(LeaseLostError, match="no loader took the files within 0 s"):
        feed(ours, [0], 0.01)


@pytest.mark.parametrize(
    ("number", "hint"), [(errno.ETOOMANYREFS, "raise `ulimit -n`"), (errno.ENOBUFS, "could not be sent to the daemon")]
)
def test_files_that_cannot_be_sent(number: int, hint: str, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(socket, "send_fds", refuse)
    with pytest.raises(weightd.WeightdError, match=hint):
        feed(pair[0], [0], 1.0)
