"""Drain: refuses new attaches and loads; when no lease is left, evicts everything and releases the pool.

What is kept of absent devices stays: nobody who drains a daemon means what it cannot even reach.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from weightd.errors import DrainingError, InUseError, LeaseLostError
from weightd_daemon.core.events import DrainChanged
from weightd_daemon.core.lease import named
from weightd_daemon.log_line import Line

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from weightd_daemon.core.events import Event
    from weightd_daemon.core.lease import Lease
    from weightd_daemon.core.store import ContentStore
    from weightd_daemon.loads.loads import Loads

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.2
"""Between two looks at who holds something: the kernel tells nobody that a lock has gone."""


class DrainOperation:
    """The daemon's drain, if one is under way. It runs also if nobody watches. `resumed` is called on undrain."""

    def __init__(
        self, *, store: ContentStore, loads: Loads, on_event: Callable[[Event], None], resumed: Callable[[], None]
    ) -> None:
        self.checkpoints = 0
        """How many have gone."""
        self.freed_bytes = 0
        """Bytes of their blobs."""
        self._store = store
        self._loads = loads
        self._on_event = on_event
        self._resumed = resumed
        self._task: asyncio.Task[None] | None = None

    @property
    def state(self) -> str:
        """Whether the daemon is "serving", "draining" or "drained"."""
        if self._task is None:
            return "serving"
        return "drained" if self._task.done() else "draining"

    def begin(self) -> None:
        """Begin, unless a drain is under way. Loads under way end, for nobody could attach to what they bring."""
        if self._task is not None:
            return
        self._store.leases.draining = True
        self.checkpoints = self.freed_bytes = 0
        self._task = asyncio.get_running_loop().create_task(self._run())
        log.info(Line("draining", {"leases": len(self._store.leases), "loads": len(self._loads.under_way)}))
        self._on_event(DrainChanged("draining"))
        self._loads.end_all(DrainingError("the load was ended: the daemon is draining; load again when it is back"))

    def undo(self) -> None:
        """Let attaches and loads in again; of what has gone, `resumed` may bring back some."""
        if self._task is None:
            return
        self._task.cancel()
        self._task = None
        self._store.leases.draining = False
        for memory in self._store.memories.values():
            memory.open_pool()
        log.info("the drain was taken back")
        self._on_event(DrainChanged("undrained"))
        self._resumed()

    async def watch(self, seconds: float | None) -> AsyncGenerator[list[Lease], None]:
        """Who still holds a lease: at first and when that has changed, until everything has gone.

        Errors: InUseError (leases are held after `seconds`), LeaseLostError (the drain was taken back).
        """
        task, loop = self._task, asyncio.get_running_loop()
        assert task is not None  # begun
        end = None if seconds is None else loop.time() + seconds
        seen: list[Lease] = []
        while not task.done():
            holders = self._store.leases.refresh()
            if holders != seen:
                yield holders
                seen = holders
            if holders and end is not None and loop.time() >= end:
                raise InUseError(f"still held after {seconds:g} s by {named(holders)}; the daemon continues to drain")
            await asyncio.wait([task], timeout=LOOK_SECONDS)
        if task.cancelled():
            raise LeaseLostError("the drain was taken back; the daemon lends and loads again")
        task.result()  # a bug in it is the caller's to hear

    async def close(self) -> None:
        """The daemon stops."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        while self._store.leases.held():  # noqa: ASYNC110  # the kernel sets no event
            await asyncio.sleep(LOOK_SECONDS)
        for checkpoint in list(self._store.checkpoints.values()):
            if self._store.is_absent(checkpoint):
                continue  # emptying a device is for one that is there, or by its name (forget.py)
            if self._store.checkpoints.get(checkpoint.key) is checkpoint:  # else it went by `rm`, or with its device
                self.freed_bytes += self._store.remove(checkpoint, reason="drained")
                self.checkpoints += 1
            await asyncio.sleep(0)  # the loop answers in between
        for memory in self._store.memories.values():
            memory.close_pool()  # nothing is loaded that could use it
        log.info(Line("drained", {"checkpoints": self.checkpoints, "bytes": self.freed_bytes}))
        self._on_event(DrainChanged("drained"))
