"""Keeps an open device file of each GPU in the service manager's store, beside the segments that lie on the GPU.

Between two daemons, the store may be all that is left of who has a GPU open, and the memory goes with the last
(devices/cuda_node.py). For the same reason a GPU cannot be reset, nor its driver unloaded, until it was forgotten.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING

from .descriptor_store import NODE, PersistentDescriptorStore

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weightd_daemon.devices.device import Device


log = logging.getLogger(__name__)


class GpuNodes:
    """The device files that are stored. On the thread of the loop."""

    def __init__(self, store: PersistentDescriptorStore, devices: Mapping[str, Device]) -> None:
        self._store = store
        self._devices = devices
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def keep(self, uuid: str) -> None:
        """Begin to have the device file of a device that serves stored, if it has one and anything of it is kept."""
        device = self._devices[uuid]
        if device.lasting and self._store.stores and not self._store.holds(NODE + uuid) and uuid not in self._tasks:
            task = self._tasks[uuid] = asyncio.get_running_loop().create_task(self._keep(device))
            task.add_done_callback(lambda _: self._tasks.pop(uuid, None))

    async def drop(self, uuid: str) -> None:
        """Let go of the device file of a device that is forgotten."""
        if (task := self._tasks.get(uuid)) is not None:
            await asyncio.wait([task])
        if self._store.holds(NODE + uuid):
            self._store.drop(NODE + uuid)

    async def _keep(self, device: Device) -> None:
        try:
            descriptor = await device.calls.run("open", device.open_node)
            if descriptor is None:
                return
            try:
                await self._store.store(NODE + device.uuid, descriptor)
            finally:
                os.close(descriptor)
        except (OSError, TimeoutError) as error:
            log.warning(
                "device %s: its device file is not kept; where persistence mode is off, its memory may not outlive "
                "this daemon: %s", device.uuid, str(error) or "the service manager does not answer",
            )  # fmt: skip
