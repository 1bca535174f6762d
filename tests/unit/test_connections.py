"""Who a peer is, from what the kernel says of it."""

from __future__ import annotations

import socket
import struct
from pathlib import Path
from typing import cast

import pytest

from weightd_daemon.handles.peers import Connections

OVERFLOW = int(Path("/proc/sys/kernel/overflowuid").read_text())


class Peer:
    """A connected socket whose other end has this uid: `struct ucred` is a pid_t and two unsigned numbers."""

    def __init__(self, uid: int) -> None:
        self._credentials = struct.pack("=iII", 1 << 22, uid, uid)

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        assert (level, option, size) == (socket.SOL_SOCKET, socket.SO_PEERCRED, len(self._credentials))
        return self._credentials


@pytest.mark.parametrize(
    ("uid", "known"),
    [
        (0, 0),
        (1000, 1000),
        (2**31 - 1, 2**31 - 1),
        (2**31, 2**31),
        (3_000_000_000, 3_000_000_000),
        (2**32 - 2, 2**32 - 2),
        (2**32 - 1, None),  # (uid_t) -1: no user
        (OVERFLOW, None),
    ],
)
def test_uids_are_unsigned(uid: int, known: int | None) -> None:
    connections = Connections(isolated=False, admins=frozenset({3_000_000_000}))
    connection = connections.add(cast("socket.socket", Peer(uid)))
    assert connection.uid == known
    assert connection.holder.uid == known
    assert connections.who(connection).admin == (known in (0, 3_000_000_000))
