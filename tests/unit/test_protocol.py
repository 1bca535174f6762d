"""Frames with descriptors, as both ends of the handle socket and the loader's channel receive them."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from support.descriptors import open_descriptors
from weightd._transport.protocol import receive_fds

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.settimeout(60)
        theirs.settimeout(60)
        yield ours, theirs


def test_descriptors_come_with_their_frame_and_no_exec_inherits_them(pair: Pair) -> None:
    ours, theirs = pair
    socket.send_fds(ours, [b"ab"], [0, 1, 2])
    data, received, flags = receive_fds(theirs, 2, 3)
    assert (data, len(received), flags & socket.MSG_CTRUNC) == (b"ab", 3, 0)
    assert not any(os.get_inheritable(descriptor) for descriptor in received)
    for descriptor in received:
        os.close(descriptor)


def test_without_room_for_descriptors_the_kernel_drops_them(pair: Pair) -> None:
    ours, theirs = pair
    before = open_descriptors()
    socket.send_fds(ours, [b"ab"], [0, 1, 2])
    data, received, flags = receive_fds(theirs, 2, 0)
    assert (data, received, flags & socket.MSG_CTRUNC) == (b"ab", [], socket.MSG_CTRUNC)
    assert open_descriptors() == before


def test_more_descriptors_than_there_is_room_for_are_told(pair: Pair) -> None:
    ours, theirs = pair
    socket.send_fds(ours, [b"ab"], [0] * 9)
    _, received, flags = receive_fds(theirs, 2, 1)
    assert flags & socket.MSG_CTRUNC
    for descriptor in received:
        os.close(descriptor)


def test_a_frame_that_is_too_long_is_told(pair: Pair) -> None:
    ours, theirs = pair
    ours.send(b"abc")
    data, received, flags = receive_fds(theirs, 2, 0)
    assert (data, received, flags & socket.MSG_TRUNC) == (b"ab", [], socket.MSG_TRUNC)


def test_what_else_the_kernel_tells_of_a_frame_is_no_descriptor(pair: Pair) -> None:
    ours, theirs = pair
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    socket.send_fds(ours, [b"ab"], [0])
    data, received, _ = receive_fds(theirs, 2, 253)
    assert (data, len(received)) == (b"ab", 1)
    os.close(*received)
