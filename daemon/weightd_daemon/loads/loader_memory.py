"""Makes room on a device for what a loader takes beside segments: its context, its pinned buffers, its mappings.

Nobody knows beforehand how much that is, and the driver does not say what it lacks. So checkpoints are evicted a little
at a time, until the loader's next try succeeds or the device has as much free as any context takes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightd._sizes import size
from weightd.errors import CapacityError

if TYPE_CHECKING:
    from weightd_daemon.core.making_room import Evictor
    from weightd_daemon.core.memory import MemoryAccounting
    from weightd_daemon.devices.device import Device
    from weightd_daemon.devices.reclaimer import DeviceReclaimer

    from .loader_pool import LoadProcessPool

_STEPS = 8
"""In how many steps at least all that a context may take is evicted for."""

_NAMES = {
    "cuDevicePrimaryCtxRetain": "the context",
    "cuMemHostAlloc": "the pinned buffers",
    "cuEventCreate": "the events",
    "cuStreamCreate": "a stream",
}
_ADVICE = "stop what else uses the device, remove or unpin a checkpoint, or lower --budget"


class LoaderMemory:
    """The memory that one load's loader needs beside segments."""

    def __init__(
        self,
        *,
        room: Evictor,
        memory: MemoryAccounting,
        device: Device,
        reclaimer: DeviceReclaimer,
        pool: LoadProcessPool,
    ) -> None:
        self._room = room
        self._memory = memory
        self._device = device
        self._reclaimer = reclaimer
        self._pool = pool
        self._evicted = 0

    async def make_room(self, call: str) -> None:
        """Do something that may let the driver's function `call` succeed now. Errors: CapacityError, DeviceError."""
        if await self._pool.dismiss_idle():
            return  # each of them had a context
        if self._memory.reclaiming:
            await self._reclaimer.wait()
            return
        await self._device.refresh()
        most = self._device.loader_bytes
        step = -(-most // _STEPS)
        available = self._device.available()
        free = self._evicted if available is None else available
        if free >= most or not self._room.evict_for_device(step):
            raise self._refusal(call)
        self._evicted += step
        while self._memory.reclaiming:
            await self._reclaimer.wait()

    def _refusal(self, call: str) -> CapacityError:
        refusal = self._room.refusal(self._device.loader_bytes, MemoryError(call))
        assert isinstance(refusal, CapacityError)  # for want of bytes, as far as anybody knows
        evictable, pinned, leased = map(size, (refusal.evictable_bytes, refusal.pinned_bytes, refusal.leased_bytes))
        return CapacityError(
            f"{_shortage(self._device, call)}, {evictable} evictable, {pinned} pinned, {leased} leased; {_ADVICE}",
            refusal.metadata,
        )


def _shortage(device: Device, call: str) -> str:
    """Say what a loader has no room for, and what the device has free."""
    what, available = _NAMES.get(call, "a mapping"), device.available()
    free = "unknown" if available is None else size(available)
    return (
        f"no room on {device.uuid} for {what} of a loader process, which takes up to {size(device.loader_bytes)} of "
        f"the device beside tensors ({call}): {free} free there"
    )


async def make_room_for_verifying(device: Device, pool: LoadProcessPool, call: str) -> None:
    """As `LoaderMemory.make_room`, without evicting: that would be to lose weights for looking at others.

    Errors: CapacityError.
    """
    if not await pool.dismiss_idle():
        await device.refresh()
        raise CapacityError(
            f"cannot verify: {_shortage(device, call)}; {_ADVICE}", {"requested_bytes": str(device.loader_bytes)}
        )
