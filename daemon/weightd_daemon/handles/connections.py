"""Connected peers: identity by SO_PEERCRED, a token for the control socket, and the rights of each identity."""

from __future__ import annotations

import os
import secrets
import socket
import struct
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path

from weightd.errors import LeaseLostError, PermissionDeniedError
from weightd_daemon.core.lease import LeasePeer
from weightd_daemon.core.principal import Principal
from weightd_daemon.lookups import Lookups
from weightd_daemon.wire import user_name

NO_UID = 0xFFFFFFFF
"""(uid_t) -1, which is nobody's. All below it are uids: they are unsigned."""

_CREDENTIALS = struct.Struct("=iII")  # struct ucred: pid_t, uid_t, gid_t
_COMMAND_BYTES = 4096
"""Of a command line that are read: a process says itself how long its own is, be it gigabytes."""
_COMMAND_CHARACTERS = 120
_COMMAND_THREADS = 4


@dataclass(eq=False, slots=True)
class HandleSocketConnection:
    """The daemon's end of one client's connection on the handle socket.

    `uid` is None where the peer has no identity here, `pid` where its process is outside of our PID namespace.
    """

    peer: LeasePeer
    """As the books name it."""
    token: str
    read_only: bool = False
    """Whether it only looks, as it has said (read_only.py)."""
    offers: dict[int, int] = field(default_factory=dict)
    """The daemon's ends of intakes that no load has taken yet, by offer number."""

    @property
    def number(self) -> int:
        return self.peer.connection

    @property
    def pid(self) -> int | None:
        return self.peer.pid

    @property
    def uid(self) -> int | None:
        return self.peer.uid

    def pop_offer(self, number: int) -> int:
        """Hand over an intake's descriptor. Errors: LeaseLostError."""
        try:
            return self.offers.pop(number)
        except KeyError:
            raise LeaseLostError(f"offer {number} is not there; a load needs one of its own connection") from None

    def close(self) -> None:
        """Close what nobody took."""
        while self.offers:
            os.close(self.offers.popitem()[1])


class HandleSocketConnections:
    """All connections on the handle socket, and the rules of who may do what."""

    def __init__(self, *, isolated: bool, admins: frozenset[int]) -> None:
        self._isolated = isolated
        self.change_admins(admins)
        self._overflow = _overflow_uid()
        self._by_token: dict[str, HandleSocketConnection] = {}
        self._numbers = count(1)
        self._lookups = Lookups("commands", _COMMAND_THREADS)
        self._lookups.ask(None, lambda: None)  # has its first thread, before anybody is served
        for uid in (0, os.geteuid()):
            user_name(uid)  # asks: whoever connects first is mostly one of these

    def __len__(self) -> int:
        return len(self._by_token)

    def change_admins(self, admins: frozenset[int]) -> None:
        """Who may do what owners may, from now on; root and this process's user always may."""
        self._admins = admins | {0, os.geteuid()}

    def offers_of(self, uid: int | None) -> int:
        """Intakes without a load on all connections of a user."""
        return sum(len(connection.offers) for connection in self._by_token.values() if connection.uid == uid)

    def add(self, connected: socket.socket) -> HandleSocketConnection:
        """Enter the peer of a socket that has just been connected."""
        pid, uid = _credentials_of(connected)
        known = None if uid in (self._overflow, NO_UID) else uid
        peer = LeasePeer(next(self._numbers), pid or None, known, "")
        connection = HandleSocketConnection(peer, secrets.token_urlsafe(24))
        self._by_token[connection.token] = connection
        return connection

    def greeted(self, connection: HandleSocketConnection) -> None:
        """A peer has said hello: find out its command line and its user's name, which may take for ever.

        Until these are known, and if they never are, it is called by the name of its process, and by its uid.
        """
        user_name(connection.uid)
        if connection.pid is not None:
            connection.peer.command = comm_of(connection.pid)
            self._lookups.ask(connection.uid, partial(_read_command, connection.peer))

    def remove(self, connection: HandleSocketConnection) -> None:
        """The connection is closed: its token means nothing from now on."""
        self._by_token.pop(connection.token, None)
        connection.close()

    def by_token(self, token: str) -> HandleSocketConnection:
        """The connection of a token. Errors: PermissionDeniedError, which says so if the token is of no connection.

        It may have been good before: a client that had it from an earlier daemon, or has hung up, can connect anew.
        """
        try:
            return self._by_token[token]
        except KeyError:
            raise PermissionDeniedError(
                "the call carries no token of an open handle-socket connection",
                {"refused": "token"} if token else None,
            ) from None

    def who(self, connection: HandleSocketConnection) -> Principal:
        """What the store needs to know of a peer. Errors: PermissionDeniedError (isolated, and without an identity)."""
        if self._isolated and connection.uid is None:
            raise PermissionDeniedError("your user id is not known here, and this daemon keeps users apart")
        return self.user(connection.uid)

    def user(self, uid: int | None) -> Principal:
        """What the store needs to know of a user."""
        return Principal(uid, uid in self._admins, f"uid-{uid}" if self._isolated else "")


def uid_of(peer: socket.socket) -> int:
    """The uid of a peer, as the kernel has it: the overflow uid, too."""
    return _credentials_of(peer)[1]


def comm_of(pid: int) -> str:
    """The name of a process, at most 15 bytes that it chose; empty if it cannot be seen.

    The kernel has it itself. A read of it waits for nothing, unlike one of the command line, which is in the memory of
    the process: that takes a lock that the process may hold as long as it likes.
    """
    return _shown(_read(f"/proc/{pid}/comm").rstrip(b"\n"))


def command_of(pid: int) -> str:
    """The command line of a process, shortened; empty if it cannot be seen. It may take for ever."""
    return _shown(b" ".join(filter(None, _read(f"/proc/{pid}/cmdline").split(b"\0"))))


def _credentials_of(connected: socket.socket) -> tuple[int, int]:
    credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(credentials)
    return pid, uid


def _read_command(peer: LeasePeer) -> None:
    if peer.pid is not None and (command := command_of(peer.pid)):
        peer.command = command


def _read(path: str) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read(_COMMAND_BYTES)
    except OSError:
        return b""


def _shown(text: bytes) -> str:
    decoded = text.decode(errors="replace")[:_COMMAND_CHARACTERS]
    return "".join(char if char.isprintable() else "?" for char in decoded)


def _overflow_uid() -> int:
    try:
        return int(Path("/proc/sys/kernel/overflowuid").read_text())
    except (OSError, ValueError):
        return 65534
