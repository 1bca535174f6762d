"""Executes queued reclaims (holes to punch, segments to release) on a thread; 1 GB takes 0.15 s."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from weightd_daemon.core.memory import MemoryAccounting
from weightd_daemon.core.reclaims import ExtentReclaim, Reclaim

if TYPE_CHECKING:
    from collections.abc import Callable

    from .device import Device

log = logging.getLogger(__name__)

_REPORTED_AT_ONCE = 1000
"""Reclaims that are reported done in one step of the loop."""


class DeviceReclaimer:
    """Returns one device's memory to the system. Started by `kick`, from the loop's thread.

    `before_release(segment)` is told, on the other thread, of each segment that is about to be released.
    """

    def __init__(self, device: Device, before_release: Callable[[int], None] = lambda _: None) -> None:
        self._device = device
        self._before_release = before_release
        self._memory: MemoryAccounting | None = None
        self._task: asyncio.Task[None] | None = None
        self._arrived = asyncio.Condition()

    def watch(self, memory: MemoryAccounting) -> None:
        """The books whose queue this carries out."""
        self._memory = memory

    def kick(self) -> None:
        """There is something to do, or something that others wait for has happened."""
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def wait(self) -> None:
        """Wait until some memory has come back, or a load has ended; not where neither is to be expected."""
        async with self._arrived:
            if self._memory is not None and self._memory.reclaiming:
                await self._arrived.wait()

    async def finish(self) -> None:
        """Wait until everything queued has been done."""
        while self._task is not None and not self._task.done():
            await self._task

    async def _run(self) -> None:
        assert self._memory is not None  # kicked by the memory that it watches
        reclaims = self._memory.next_reclaims()
        while True:
            while self._memory.freeing.go_on():
                await asyncio.sleep(0)  # others have their turn on the loop
                reclaims += self._memory.next_reclaims()
            if reclaims:
                await asyncio.to_thread(self._carry_out, reclaims)
            for done, reclaim in enumerate(reclaims, start=1):
                self._memory.reclaimed(reclaim)
                if done % _REPORTED_AT_ONCE == 0:
                    await asyncio.sleep(0)
            async with self._arrived:
                self._arrived.notify_all()
            reclaims = self._memory.next_reclaims()
            if not reclaims and not self._memory.freeing:
                return

    def _carry_out(self, reclaims: list[Reclaim]) -> None:
        for reclaim in reclaims:
            try:
                if isinstance(reclaim, ExtentReclaim):
                    extent = reclaim.extent
                    self._device.punch(extent.segment, extent.offset, extent.length)
                else:
                    self._before_release(reclaim.segment)
                    self._device.release(reclaim.segment)
            except Exception:  # whatever broke, the rest of the queue must be done and reported
                # The bytes are free all the same; what is lost is that the system does not get them back.
                log.exception("memory could not be returned: %s", reclaim)
