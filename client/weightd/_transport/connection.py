"""A client's connection to its daemon, and the leases taken on it. Both outlive a daemon.

A lease is a kernel lock, so nothing is lost with a daemon. But the next one does not know who holds what. When a
connection ends on which leases were taken that still live, a thread of this process waits for the next daemon and tells
it. There is one such thread, from the first attach on; it sleeps in the kernel. It is a daemon thread, and a forked
child has none, until it attaches itself.
"""

from __future__ import annotations

import atexit
import os
import select
import threading
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from weightd import _failpoints
from weightd._proto.v1 import handles_pb2
from weightd.errors import InvalidReferenceError, LeaseLostError, WeightdError

from .handle_socket import SocketClient

if TYPE_CHECKING:
    from pathlib import Path

_MOST_ENDED = 4096
"""Leases whose end is to be told; the daemon finds the others itself."""

_LONGEST = 365 * 86_400.0
"""Seconds for an answer; neither Python's sockets nor gRPC can wait for an infinity of them."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0


class _Held(NamedTuple):
    """A lease by what it is taken on; it lives as long as its mapping."""

    content_digest: str
    device: str
    mapping: weakref.ref[object]


class DaemonConnection:
    """A client's connection to the daemon at a path, renewed after its end. `timeout` is seconds for each answer."""

    def __init__(self, path: Path, timeout: float, *, read_only: bool = False) -> None:
        """Errors: DaemonUnreachableError, PermissionDeniedError, ProtocolMismatchError, InvalidReferenceError."""
        if not timeout > 0:
            raise InvalidReferenceError(f"timeout {timeout}: must be more than 0 seconds")
        timeout = min(timeout, _LONGEST)
        self.path = path
        self.timeout = timeout
        self.read_only = read_only
        self.handles = SocketClient(path, timeout, read_only=read_only)
        self._lock = threading.RLock()
        self._held: dict[int, _Held] = {}
        self._ended: deque[int] = deque(maxlen=_MOST_ENDED)
        self.handles.ended = self._ended
        self._watched: SocketClient | None = None
        self.closed = False

    def hold(self, lease: int, content_digest: str, device: str, mapping: object) -> None:
        """A lease was taken; it lasts as long as the mapping does. The daemon hears of its end with the next frame."""
        held, ended = self._held, self._ended

        def end(_: object) -> None:  # wherever the last tensor goes: no lock may be taken, and nothing be sent
            held.pop(lease, None)
            ended.append(lease)

        held[lease] = _Held(content_digest, device, weakref.ref(mapping, end))
        if self._watched is not self.handles and not self.closed:
            self._watched = self.handles
            _watch(self)

    def detach(self, lease: int) -> bool:
        """Say that a lease may have ended; True when it has. Errors: WeightdError."""
        return self.handles.detach(lease)

    def renew(self) -> None:
        """Connect anew where the connection has ended, and say which leases are ours. Errors: as of a new one.

        What the daemon does not know is not spoken of again.
        """
        with self._lock:
            if self.handles.alive():
                return
            self.handles.close()
            try:
                handles = self._connect()
            except BaseException:
                self.handles.on_broken()  # a socket that is closed tells nobody of its end
                raise
            self.handles = handles
            if self.closed:
                handles.close()
            elif self._held:
                self._watched = handles
                _watch(self)

    def _connect(self) -> SocketClient:
        handles = SocketClient(self.path, self.timeout, read_only=self.read_only)
        try:
            self._claim(handles)
        except LeaseLostError:  # it hung up: it is older than this, and does not speak of that
            handles.close()
            handles = SocketClient(self.path, self.timeout)
            self._held.clear()
        except BaseException:
            handles.close()
            raise
        handles.ended = self._ended
        return handles

    def _claim(self, handles: SocketClient) -> None:
        for number, held in self.live().items():
            request = handles_pb2.ReclaimRequest(lease=number, content_digest=held.content_digest, device=held.device)
            _failpoints.reach("client.claim")
            if not handles.reclaim(request):
                self._held.pop(number, None)

    def live(self) -> dict[int, _Held]:
        """The leases whose mapping is there."""
        return {number: held for number, held in self._held.copy().items() if held.mapping() is not None}

    def close(self) -> None:
        """Hang up for good. Leases that are still mapped stay."""
        self.closed = True
        self.handles.close()


class _Watcher:
    """The thread, and the lines that it watches."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._connections: weakref.WeakValueDictionary[int, DaemonConnection] = weakref.WeakValueDictionary()
        self._ended: set[weakref.ref[DaemonConnection]] = set()
        self._stopped = False
        try:
            threading.Thread(target=self._run, name="weightd-line", daemon=True).start()
        except BaseException:
            self.close()
            raise

    def watch(self, connection: DaemonConnection) -> None:
        """Wait for the end of a connection to the daemon."""
        handles, of_connection = connection.handles, weakref.ref(connection)
        hash(of_connection)  # it remembers that, and can be looked for when the connection is gone
        # The call that finds a connection ended closes it, and then the kernel has nothing more to tell.
        handles.on_broken = lambda: self._broken(of_connection)
        number = handles.fileno()
        self._connections[number] = connection
        # Once: where a forked child has the socket too, nobody can take it out again.
        once = select.EPOLLRDHUP | select.EPOLLONESHOT
        try:
            try:
                self._epoll.register(number, once)
            except FileExistsError:
                self._epoll.modify(number, once)
        except (OSError, ValueError):  # another thread has closed it
            self._broken(of_connection)

    def stop(self) -> None:
        """The interpreter ends."""
        self._stopped = True

    def close(self) -> None:
        """There is no such thread; in a forked child these descriptors are the parent's."""
        self._epoll.close()
        os.close(self._wake)

    def _broken(self, connection: weakref.ref[DaemonConnection]) -> None:
        self._ended.add(connection)
        os.eventfd_write(self._wake, 1)

    def _run(self) -> None:
        retries: dict[
            weakref.ref[DaemonConnection], tuple[float, float]
        ] = {}  # when, and how long the pause after that
        while not self._stopped:
            due = min((when for when, _ in retries.values()), default=None)
            for number, _ in self._epoll.poll(None if due is None else max(0.0, due - time.monotonic())):
                if number == self._wake:
                    os.eventfd_read(self._wake)
                elif connection := self._connections.get(number):
                    self._ended.add(weakref.ref(connection))
                connection = None  # keeps nothing while it sleeps
            while self._ended:
                retries.setdefault(self._ended.pop(), (0.0, _FIRST_PAUSE))
            for of_connection, (when, pause) in list(retries.items()):
                if when > time.monotonic() or self._stopped:
                    continue
                retries[of_connection] = (time.monotonic() + pause, min(2 * pause, _LONGEST_PAUSE))
                if _is_done(of_connection):
                    del retries[of_connection]


def _is_done(of_connection: weakref.ref[DaemonConnection]) -> bool:
    """Whether a connection that had ended is there again, or needed by nobody."""
    connection = of_connection()
    if connection is None or connection.closed or not connection.live():
        return True
    try:
        connection.renew()
    except (WeightdError, OSError):  # it is away, or of another protocol, or this process is out of descriptors
        return False
    return True


_lock = threading.Lock()
_watcher: _Watcher | None = None


def _watch(connection: DaemonConnection) -> None:
    global _watcher
    with _lock:
        if _watcher is None:
            try:
                _watcher = _Watcher()
            except (RuntimeError, OSError):  # no more threads or descriptors: only `weightd ps` will miss a name
                return
            atexit.register(_watcher.stop)
    _watcher.watch(connection)


def _after_fork() -> None:
    global _watcher, _lock
    _lock = threading.Lock()  # which another thread may have held
    if _watcher is not None:
        _watcher.close()
        _watcher = None


os.register_at_fork(after_in_child=_after_fork)
