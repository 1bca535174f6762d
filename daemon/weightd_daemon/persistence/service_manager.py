"""The service manager from a service's view: notifications, watchdog, and descriptors kept for the next start.

The protocols are sd_notify(3) and sd_listen_fds(3): datagrams to $NOTIFY_SOCKET, and descriptors from number 3 on.
Where nobody listens, as in a terminal, nothing is sent and nothing is kept.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
import threading
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping, Sequence

_FIRST_DESCRIPTOR = 3
_SEND_SECONDS = 5
_SEND_TIMEOUT = struct.pack("@ll", _SEND_SECONDS, 0)
"""The manager reads at once. Where it does not, the machine has other troubles: what waits is given up."""
_MOST_WAITING = 1024


class ServiceManagerStore:
    """The service manager ($NOTIFY_SOCKET): stores descriptors across restarts, and takes notifications.

    The environment's variables are taken: children must not use them.
    """

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        self._address = environment.pop("NOTIFY_SOCKET", "")
        watched = environment.pop("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        every = environment.pop("WATCHDOG_USEC", "")
        self.watchdog_seconds: float | None = int(every) / 1e6 if watched and every.isdigit() and int(every) else None
        """How long it waits for a ping before it kills us; None where it does not."""
        most = environment.pop("FDSTORE", "")
        self.most_stored: int | None = int(most) if most.isdigit() else None
        """How many descriptors it keeps; None where it does not say (systemd before 254)."""
        self._lock = threading.Lock()
        self._backlog: deque[tuple[bytes, list[int], Callable[[], object]]] = deque()
        """What waits until the manager reads: no caller does, least of all the loop."""

    @property
    def listens(self) -> bool:
        """Whether there is a manager."""
        return bool(self._address)

    def notify(self, *lines: str, descriptors: Sequence[int] = (), failed: Callable[[], object] = lambda: None) -> None:
        """Send one notification, at once or, if the manager is behind, in order as soon as it reads. On any thread.

        Errors: OSError (it does not take it, or so much waits already). If it does not take what has waited, `failed`
        is called, on any thread.
        """
        if not self._address:
            return
        message = "\n".join(lines).encode()
        with self._lock:
            if not self._backlog and self._send(message, descriptors, socket.MSG_DONTWAIT):
                return
            if len(self._backlog) >= _MOST_WAITING:
                raise OSError(errno.ENOBUFS, "the service manager does not read")
            kept: list[int] = []
            try:
                kept.extend(map(os.dup, descriptors))  # one by one: what there is when this fails gets closed
            except OSError:
                _close(kept)
                raise
            self._backlog.append((message, kept, failed))
            if len(self._backlog) == 1:
                threading.Thread(target=self._catch_up, name="weightd-notify", daemon=True).start()

    def store(self, name: str, descriptor: int, failed: Callable[[], object] = lambda: None) -> None:
        """Let it keep a duplicate until `drop`, and give it to the next start. Errors: as for `notify`.

        It does so some time after this; see `barrier`. Without FDPOLL=0 it drops a descriptor that hangs up.
        """
        self.notify("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", descriptors=[descriptor], failed=failed)

    def drop(self, name: str) -> None:
        """Let it close what it keeps under a name. Errors: as for `notify`."""
        self.notify("FDSTOREREMOVE=1", f"FDNAME={name}")

    async def barrier(self, seconds: float) -> None:
        """Wait until everything that was told before has been done. Errors: OSError, TimeoutError."""
        if not self._address:
            return
        read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        loop = asyncio.get_running_loop()
        done = asyncio.Event()
        lost: list[bool] = []
        try:
            try:
                self.notify("BARRIER=1", descriptors=[write], failed=lambda: lost.append(True))
            finally:
                os.close(write)
            loop.add_reader(read, done.set)  # it closes its end when it comes to this message
            try:
                async with asyncio.timeout(seconds):
                    await done.wait()
            finally:
                loop.remove_reader(read)
            if lost:
                raise OSError("the service manager takes no more notifications")
        finally:
            os.close(read)

    def _send(self, message: bytes, descriptors: Sequence[int], flags: int = 0) -> bool:
        """Send one message. Returns False if that would block. Errors: OSError."""
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _SEND_TIMEOUT)
            sender.connect(address)
            try:
                socket.send_fds(sender, [message], list(descriptors), flags)
            except BlockingIOError:
                return False
        return True

    def _catch_up(self) -> None:
        """Send what waits, on a thread of its own, which ends when nothing does."""
        while True:
            message, descriptors, _ = self._backlog[0]  # only this thread takes from it
            try:
                sent = self._send(message, descriptors)
            except OSError:
                sent = False
            with self._lock:
                # If it does not read, all that has come behind would wait as long, one after the other.
                over = [self._backlog.popleft()] if sent else list(self._backlog)
                if not sent:
                    self._backlog.clear()
                empty = not self._backlog
            for _, kept, on_failure in over:
                if not sent:
                    on_failure()
                _close(kept)  # after it: a barrier waits for that
            if empty:
                return


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def stored_descriptors(environment: MutableMapping[str, str]) -> list[tuple[str, int]]:
    """Name and number of each descriptor that the manager has given this start; the caller closes them."""
    pid, count = environment.pop("LISTEN_PID", ""), environment.pop("LISTEN_FDS", "")
    names = environment.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdigit():
        return []
    found = []
    for number in range(_FIRST_DESCRIPTOR, _FIRST_DESCRIPTOR + int(count)):
        os.set_inheritable(number, False)
        index = number - _FIRST_DESCRIPTOR
        found.append((names[index] if index < len(names) else "", number))
    return found
