"""The service manager, as a service sees it: notifications, its watchdog, descriptors that it keeps for the next start.

The protocols are sd_notify(3) and sd_listen_fds(3): datagrams to $NOTIFY_SOCKET, and descriptors from number 3 on.
Where nobody listens, as in a terminal, nothing is sent and nothing is kept.
"""

from __future__ import annotations

import asyncio
import os
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import MutableMapping, Sequence

_FIRST_DESCRIPTOR = 3
_SEND_SECONDS = 5.0
"""The manager reads at once. Where it does not, the machine has other troubles, and the caller's error says so."""


class ServiceManager:
    """The manager that $NOTIFY_SOCKET names, if any. The variables are taken: children must not use them."""

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        self._address = environment.pop("NOTIFY_SOCKET", "")
        watched = environment.pop("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        every = environment.pop("WATCHDOG_USEC", "")
        self.watchdog_seconds: float | None = int(every) / 1e6 if watched and every.isdigit() and int(every) else None
        """How long it waits for a ping before it kills us; None where it does not."""
        most = environment.pop("FDSTORE", "")
        self.most_kept: int | None = int(most) if most.isdigit() else None
        """How many descriptors it keeps; None where it does not say (systemd before 254)."""

    @property
    def listens(self) -> bool:
        """Whether there is a manager."""
        return bool(self._address)

    def tell(self, *lines: str, descriptors: Sequence[int] = ()) -> None:
        """Send one notification. Errors: OSError (it does not take it)."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.settimeout(_SEND_SECONDS)
            sender.connect(address)
            socket.send_fds(sender, ["\n".join(lines).encode()], list(descriptors))

    def keep(self, name: str, descriptor: int) -> None:
        """Let it keep a duplicate until `drop`, and give it to the next start. Errors: OSError.

        It does so some time after this; see `barrier`. Without FDPOLL=0 it drops a descriptor that hangs up.
        """
        self.tell("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", descriptors=[descriptor])

    def drop(self, name: str) -> None:
        """Let it close what it keeps under a name. Errors: OSError."""
        self.tell("FDSTOREREMOVE=1", f"FDNAME={name}")

    async def barrier(self, seconds: float) -> None:
        """Wait until everything that was told before has been done. Errors: OSError, TimeoutError."""
        if not self._address:
            return
        read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        loop = asyncio.get_running_loop()
        done = asyncio.Event()
        try:
            try:
                self.tell("BARRIER=1", descriptors=[write])
            finally:
                os.close(write)
            loop.add_reader(read, done.set)  # it closes its end when it comes to this message
            try:
                async with asyncio.timeout(seconds):
                    await done.wait()
            finally:
                loop.remove_reader(read)
        finally:
            os.close(read)


def kept_descriptors(environment: MutableMapping[str, str]) -> list[tuple[str, int]]:
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
