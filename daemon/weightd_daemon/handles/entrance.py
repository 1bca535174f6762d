"""The entrance of the handle socket: lets peers in, so many in all, and so many of one user in a time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING

from weightd._proto.v1 import handles_pb2
from weightd.errors import DaemonBusyError
from weightd_daemon.core.rate import UserRateLimit
from weightd_daemon.wire import clip

from .connections import uid_of
from .log_rate import HandleLogRate

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from weightd.errors import WeightdError

log = logging.getLogger(__name__)

CONNECTS, CONNECTS_PER_SECOND = 512, 250.0
"""Connections that a user may make at once, and in the long run: each takes the loop longer than a call."""
CONNECT_WAIT_SECONDS = 2.0
"""How long a connection that comes too soon may have to wait; one that would wait longer is refused."""
ACCEPTS_OF_STEP = 64
"""Connections of one step of the loop that are refused; it lets one in at most."""
ACCEPT_PAUSE_SECONDS = 0.2
"""After a connection could not be accepted."""
REFUSAL_PAUSE_SECONDS = 0.005
"""After a step that refused some: who connects without end then costs a step for many connections, not for each."""


class HandleSocketEntrance:
    """Accepts connections on the handle socket and passes admitted ones to `enter`. `opened` counts open ones."""

    def __init__(self, enter: Callable[[socket.socket], None], opened: Callable[[], int], max_connections: int) -> None:
        self.max_connections = max_connections
        """One more is told so, and closed at once."""
        self._enter = enter
        self._opened = opened
        self._listener: socket.socket | None = None
        self._connects = UserRateLimit(time.monotonic, burst=CONNECTS, per_second=CONNECTS_PER_SECOND)
        self._early: dict[socket.socket, asyncio.TimerHandle] = {}
        """Accepted, and not heard before their users' turn."""
        self._refusals = HandleLogRate(lambda more: log.warning("connection refused: and %d more", more))

    def open(self, listener: socket.socket) -> None:
        """Accept on a listening, non-blocking socket, and close the one before."""
        self._close_listener()
        self._listener = listener
        asyncio.get_running_loop().add_reader(listener.fileno(), self._accept, listener)

    def close(self) -> None:
        """Close the listener and the connections that wait for their turn."""
        self._close_listener()
        while self._early:
            accepted, timer = self._early.popitem()
            timer.cancel()
            accepted.close()

    def _close_listener(self) -> None:
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener.fileno())
            self._listener.close()
            self._listener = None

    def _accept(self, listener: socket.socket) -> None:
        for refused in range(ACCEPTS_OF_STEP):
            try:
                accepted, _ = listener.accept()
            except BlockingIOError:
                if not refused:
                    return
                break
            except OSError as error:  # out of descriptors: the peer waits in the backlog until one is free
                log.warning("accept failed: %s", error)
                self._pause(listener, ACCEPT_PAUSE_SECONDS)
                return
            accepted.setblocking(False)
            if self._let_in(accepted):
                return  # that is enough for a step
        self._pause(listener, REFUSAL_PAUSE_SECONDS)

    def _let_in(self, accepted: socket.socket) -> bool:
        """Hear a peer now or in its user's turn. Returns False if it is refused."""
        if self._opened() + len(self._early) >= self.max_connections:
            self._refuse(accepted, f"lets in no more: max_connections = {self.max_connections}")
            return False
        delay = self._connects.delay(uid_of(accepted), CONNECT_WAIT_SECONDS)
        if delay is None:
            many = f"{CONNECTS_PER_SECOND:.0f} connections a second"
            self._refuse(accepted, f"lets in {many} of one user, and no more")
            return False
        if delay:
            self._early[accepted] = asyncio.get_running_loop().call_later(delay, self._enter_late, accepted)
        else:
            self._enter(accepted)
        return True

    def _enter_late(self, accepted: socket.socket) -> None:
        del self._early[accepted]
        self._enter(accepted)

    def _refuse(self, accepted: socket.socket, why: str) -> None:
        """Say why, as far as it goes, and hang up."""
        if self._refusals.may_log():
            log.warning("connection refused: the daemon %s", why)
        error = DaemonBusyError(f"the weightd daemon {why}; try again later")
        with accepted, contextlib.suppress(OSError):
            accepted.send(error_frame(error))

    def _pause(self, listener: socket.socket, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(listener.fileno())
        loop.call_later(seconds, self._resume)

    def _resume(self) -> None:
        if self._listener is not None:
            asyncio.get_running_loop().add_reader(self._listener.fileno(), self._accept, self._listener)


def error_frame(error: WeightdError) -> bytes:
    """An error as it goes to a peer, its message shortened if need be."""
    reply = handles_pb2.HandleError(reason=error.reason, message=clip(error.message), metadata=error.metadata)
    return handles_pb2.HandleReply(error=reply).SerializeToString()
