"""Notifies the service manager from the serving loop: watchdog signals, readiness, and a status line."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from weightd_daemon.core.store import ContentStore
    from weightd_daemon.persistence.service_manager import ServiceManagerStore

log = logging.getLogger(__name__)

_EVERY_SECONDS = 5.0
_START_SECONDS = 30
"""What a sign of life asks for before the daemon is ready: the time until the next one, generously."""


class ServiceManagerNotifier:
    """Notifies the service manager of start, status and stop, and pings its watchdog.

    Pings are timers of the loop, so a loop that is stuck sends none, and the watchdog bites.

    Where no manager listens nothing is done. Where it does not take what it is told, the log says so once, and the
    daemon serves on.
    """

    def __init__(self, manager: ServiceManagerStore) -> None:
        self._manager = manager
        watchdog = manager.watchdog_seconds
        self._every = _EVERY_SECONDS if watchdog is None else min(_EVERY_SECONDS, watchdog / 2)
        self._timer: asyncio.TimerHandle | None = None
        self._status: Callable[[], str] | None = None
        self._shown = ""
        self._failed = False

    def start(self) -> None:
        """Begin with the signs of life. Until `ready` each of them asks for more time to start."""
        if self._manager.listens:
            self._tick()

    def ready(self, status: Callable[[], str]) -> None:
        """Say that everything is served; `status` is asked for the line for people from now on."""
        self._status = status
        self._shown = status()
        self._notify("READY=1", f"STATUS={self._shown}")

    @contextlib.contextmanager
    def reloading(self) -> Iterator[None]:
        """Say that settings are read again, and at the end that this is done, however it went."""
        self._notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            yield
        finally:
            self._notify("READY=1")

    def stop(self) -> None:
        """Say that the daemon ends. No sign of life follows: from now on the manager's limit for stopping counts."""
        if self._timer is not None:
            self._timer.cancel()
        self._notify("STOPPING=1", "STATUS=Stopping")

    def _tick(self) -> None:
        # First the next one: were the line for people to fail, the loop would still be alive.
        self._timer = asyncio.get_running_loop().call_later(self._every, self._tick)
        if self._status is None:
            self._notify(f"EXTEND_TIMEOUT_USEC={_START_SECONDS * 1_000_000}")
            return
        if self._manager.watchdog_seconds is not None:
            self._notify("WATCHDOG=1")
        status = self._status()
        if status != self._shown:
            self._shown = status
            self._notify(f"STATUS={status}")

    def _notify(self, *lines: str) -> None:
        try:
            self._manager.notify(*lines)
        except OSError as error:
            if not self._failed:
                log.warning("service manager does not take notifications: %s", error.strerror or error)
            self._failed = True


def status_line(store: ContentStore) -> str:
    """What the daemon holds, in one line for people."""
    used = sum(memory.used for memory in store.memories.values()) / 2**30
    budget = sum(memory.used if uuid in store.absent else memory.budget for uuid, memory in store.memories.items())
    checkpoints, leases = len(store.checkpoints), len(store.leases)  # the kernel is not asked each time
    absent = f", absent: {', '.join(store.absent)}" if store.absent else ""
    return (
        f"Serving {checkpoints} checkpoint{'s' * (checkpoints != 1)}, {used:.1f} of {budget / 2**30:.1f} GiB, "
        f"{leases} lease{'s' * (leases != 1)}{absent}"
    )
