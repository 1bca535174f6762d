"""Who a peer is, from what the kernel says of it."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from support.daemon import eventually
from weightd.errors import LeaseLostError, PermissionDeniedError
from weightd_daemon.handles import connections as module
from weightd_daemon.handles.connections import HandleSocketConnections

OVERFLOW = int(Path("/proc/sys/kernel/overflowuid").read_text())


class Peer:
    """A connected socket whose other end has this uid: `struct ucred` is a pid_t and two unsigned numbers."""

    def __init__(self, uid: int, pid: int = 1 << 22) -> None:
        self._credentials = struct.pack("=iII", pid, uid, uid)

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


@pytest.mark.parametrize(("isolated", "domain"), [(False, ""), (True, "uid-1000")])
def test_a_peer_without_an_identity_is_nobody_where_users_are_kept_apart(isolated: bool, domain: str) -> None:
    connections = HandleSocketConnections(isolated=isolated, admins=frozenset())
    assert connections.user(1000).domain == domain
    unknown = connections.add(cast("socket.socket", Peer(OVERFLOW)))
    if isolated:
        with pytest.raises(PermissionDeniedError, match="your user id is not known here"):
            connections.who(unknown)
    else:
        assert connections.who(unknown).uid is None


def test_a_token_and_an_offer_are_of_one_connection() -> None:
    connections = HandleSocketConnections(isolated=False, admins=frozenset())
    connection = connections.add(cast("socket.socket", Peer(1000)))
    assert connections.by_token(connection.token) is connection
    with pytest.raises(LeaseLostError, match="offer 7 is not there"):
        connection.pop_offer(7)
    connections.remove(connection)
    for token, metadata in ((connection.token, {"refused": "token"}), ("", {})):
        with pytest.raises(PermissionDeniedError, match="no token of an open handle-socket connection") as caught:
            connections.by_token(token)
        assert caught.value.metadata == metadata


def test_a_process_that_cannot_be_seen_has_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Because it is in another PID namespace, or has gone."""
    connections = HandleSocketConnections(isolated=False, admins=frozenset())
    asked: list[Callable[[], None]] = []
    monkeypatch.setattr(connections._lookups, "ask", lambda _, look: asked.append(look))
    for pid in (0, 1 << 22):
        connection = connections.add(cast("socket.socket", Peer(1000, pid)))
        connections.greeted(connection)
        assert (connection.pid, connection.peer.command) == (pid or None, "")
    (look,) = asked
    look()
    assert connection.peer.command == ""


def test_the_overflow_uid_is_65534_where_the_kernel_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path) -> str:
        raise PermissionError

    monkeypatch.setattr(Path, "read_text", fail)
    assert module._overflow_uid() == 65534
