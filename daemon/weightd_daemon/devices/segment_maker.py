"""Makes the segments that the books of a device ask for, off the loop, and reports each when it is there."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING

from weightd.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Callable

    from weightd_daemon.core.creations import Creation
    from weightd_daemon.core.memory import MemoryAccounting

    from .device import Device

log = logging.getLogger(__name__)


class SegmentMaker:
    """Makes segments of one device, on the loop's thread. `device` says which stands for it by now.

    `on_report` is told of each report to the books.
    """

    def __init__(self, device: Callable[[], Device], on_report: Callable[[], None]) -> None:
        self._device = device
        self._on_report = on_report
        self._memory: MemoryAccounting | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def watch(self, memory: MemoryAccounting) -> None:
        """The books to report to."""
        self._memory = memory

    def create(self, creation: Creation) -> None:
        """Begin with a segment."""
        task = asyncio.get_running_loop().create_task(self._make(creation))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _make(self, creation: Creation) -> None:
        assert self._memory is not None  # which asks
        device = self._device()
        try:
            segment = await device.calls.run(device.creates_by, partial(_create, device, creation))
        except Exception as error:  # noqa: BLE001  # whatever it is, it is the load's that waits
            self._memory.failed(creation, error)
        else:
            if not self._memory.made(creation, segment):  # its device has lost its memory meanwhile
                await device.calls.run(device.releases_by, partial(_release, device, segment))
        self._on_report()


def _create(device: Device, creation: Creation) -> int:
    if not creation.wanted:
        raise DeviceError("the load has ended that the segment was for")
    return device.create(creation.size)


def _release(device: Device, segment: int) -> None:
    try:
        device.release(segment)
    except DeviceError:
        log.exception("segment %d could not be given back", segment)
