"""Executes queued reclaims (holes to punch, segments to release) on a thread; 1 GB takes 0.15 s."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from functools import partial
from typing import TYPE_CHECKING

from weightd import _failpoints
from weightd.errors import DeviceAbsentError
from weightd_daemon.core.memory import MemoryAccounting
from weightd_daemon.core.reclaims import ExtentReclaim, Reclaim
from weightd_daemon.turns import LoopTurn

from .segment_maker import SegmentMaker

if TYPE_CHECKING:
    from collections.abc import Callable

    from .device import Device

log = logging.getLogger(__name__)


class DeviceReclaimer:
    """Returns one device's memory to the system. Started by `kick`, from the loop's thread.

    `before_release(segment)` is told, on the other thread, of each segment that is about to be released.
    """

    def __init__(self, device: Device, before_release: Callable[[int], None] = lambda _: None) -> None:
        self.device = device
        """Whose memory it is. Another may take its place while nothing is under way."""
        self._before_release = before_release
        self._memory: MemoryAccounting | None = None
        self._task: asyncio.Task[None] | None = None
        self._arrived = asyncio.Event()
        self.maker = SegmentMaker(lambda: self.device, self.notify)
        """Makes the segments of the same device; whoever waits here hears of them, too."""

    def watch(self, memory: MemoryAccounting) -> None:
        """The books whose queue this carries out, and whose segments `maker` makes."""
        self._memory = memory
        self.maker.watch(memory)

    def kick(self) -> None:
        """There is something to do, or something that others wait for has happened."""
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())
            self._task.add_done_callback(lambda _: self.notify())

    def notify(self) -> None:
        """Something has happened that others may wait for: memory has come, or the device answers no longer."""
        self._arrived.set()
        self._arrived = asyncio.Event()

    async def wait(self) -> None:
        """Wait until some memory has come, or a load has ended; not where neither is to be expected.

        Errors: DeviceAbsentError (the device does not answer).
        """
        self.device.calls.check()
        if self._memory is not None and self._memory.reclaiming:
            await self._arrived.wait()
            self.device.calls.check()

    async def finish(self) -> None:
        """Wait until everything queued has been done, and every segment that was asked for is there.

        Errors: DeviceAbsentError (the device does not answer).
        """
        while (self._task is not None and not self._task.done()) or (self._memory and self._memory.creating):
            self.device.calls.check()
            await self._arrived.wait()

    async def stop(self) -> None:
        """Finish, or leave to the end of this process what the device does not answer."""
        with contextlib.suppress(DeviceAbsentError):
            await self.finish()

    async def _run(self) -> None:
        assert self._memory is not None  # kicked by the memory that it watches
        reclaims = self._memory.next_reclaims()
        while True:
            turn = LoopTurn()
            while self._memory.freeing.go_on():
                if turn.is_over:
                    await turn.next()
                reclaims += self._memory.next_reclaims()
            device = self.device
            # A driver's calls are timed one by one. Pages are punched by the thousand.
            for some in [reclaims] if device.sparse else [[reclaim] for reclaim in reclaims]:
                await device.calls.run(device.releases_by, partial(self._carry_out, some))
            turn = LoopTurn()
            for reclaim in reclaims:
                self._memory.reclaimed(reclaim)
                if turn.is_over:
                    await turn.next()
            self.notify()
            reclaims = self._memory.next_reclaims()
            if not reclaims and not self._memory.freeing:
                return

    def _carry_out(self, reclaims: list[Reclaim]) -> None:
        for reclaim in reclaims:
            try:
                if isinstance(reclaim, ExtentReclaim):
                    extent = reclaim.extent
                    _failpoints.reach("evict.punch")
                    self.device.punch(extent.segment, extent.offset, extent.length)
                else:
                    _failpoints.reach("evict.release")
                    self._before_release(reclaim.segment)
                    self.device.release(reclaim.segment)
            except Exception:  # whatever broke, the rest of the queue must be done and reported
                # The bytes are free all the same; what is lost is that the system does not get them back.
                log.exception("memory could not be returned: %s", reclaim)
