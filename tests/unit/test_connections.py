"""Who a peer is, from what the kernel says of it."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import cast

import pytest

from support.daemon import eventually
from weightd_daemon.handles import connections as module
from weightd_daemon.handles.connections import HandleSocketConnections

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
    connections = HandleSocketConnections(isolated=False, admins=frozenset({3_000_000_000}))
    connection = connections.add(cast("socket.socket", Peer(uid)))
    assert connection.uid == known
    assert connection.peer.uid == known
    assert connections.who(connection).admin == (known in (0, 3_000_000_000))


def test_the_command_line_is_read_after_hello_and_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """To read it may take for ever; a peer is called by its process's name until then."""
    gate = threading.Event()

    def hang(pid: int) -> str:
        gate.wait(60)
        return f"command of {pid}"

    monkeypatch.setattr(module, "command_of", hang)
    connections = HandleSocketConnections(isolated=False, admins=frozenset())
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection = connections.add(ours)
        named = module.comm_of(os.getpid())
        assert named
        connections.greeted(connection)
        peer = connection.peer
        assert (connection.pid, peer.command) == (os.getpid(), named)
        gate.set()
        eventually(lambda: peer.command == f"command of {os.getpid()}", what="the command line")
    finally:
        gate.set()
        ours.close()
        theirs.close()


def test_a_command_line_of_any_length_is_read_in_part() -> None:
    words = [sys.executable, "-c", "input()", "\x1b[31m", *["x" * 100_000] * 15]
    process = subprocess.Popen(words, stdin=subprocess.PIPE)
    try:
        eventually(lambda: module.command_of(process.pid).startswith(sys.executable))
        shown = module.command_of(process.pid)
        assert (len(shown), shown.isprintable()) == (120, True)
        assert f"-c input() ?[31m {'x' * 20}" in shown
        with open(f"/proc/{process.pid}/cmdline", "rb") as file:
            assert len(file.read()) > 1_000_000
        assert len(module._read(f"/proc/{process.pid}/cmdline")) == 4096
    finally:
        process.communicate(b"\n", 60)
    assert module.command_of(process.pid) == "", "it has gone"
