"""Forgets devices: empties one, absent or not, and lets go of all that is kept of it. The rest serves on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from weightd.errors import DeviceAbsentError, InUseError, InvalidReferenceError
from weightd_daemon.core.lease import named
from weightd_daemon.log_line import Line

from .drain import LOOK_SECONDS

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping

    from weightd_daemon.core.lease import Lease, LeasePeer
    from weightd_daemon.core.store import ContentStore
    from weightd_daemon.devices.reclaimer import DeviceReclaimer
    from weightd_daemon.loads.loads import Loads

    from .absence import AbsentDevices

log = logging.getLogger(__name__)

_LEAVING = "it is being let go of (`weightd drain --forget`)"


class DeviceForgetting:
    """Forgets devices. `settled` waits until the service manager has done what it was told."""

    def __init__(
        self,
        *,
        store: ContentStore,
        loads: Loads,
        absences: AbsentDevices,
        reclaimers: Mapping[str, DeviceReclaimer],
        settled: Callable[[], Awaitable[None]],
    ) -> None:
        self._store = store
        self._loads = loads
        self._absences = absences
        self._reclaimers = reclaimers
        self._settled = settled

    async def forget(
        self, uuid: str, seconds: float | None, by: LeasePeer, gone: Callable[[int], None]
    ) -> AsyncGenerator[list[Lease], None]:
        """Empty a device, and let go of it. Yields who still holds a lease: at first and when that has changed.

        `gone` is told the freed bytes of each checkpoint. When this ends early the device goes on as before, with what
        is left on it. Errors: InUseError (leases are held after `seconds`, or somebody else forgets it),
        InvalidReferenceError (host memory that serves).
        """
        store, absences = self._store, self._absences
        if uuid in store.leaving:
            raise InUseError(f"device {uuid} is being let go of by somebody else")
        before = store.absent.get(uuid)
        if before is None and store.memories[uuid].sparse:
            raise InvalidReferenceError(f"device {uuid} is no GPU that could be let go of; `weightd drain` empties it")
        store.leaving.add(uuid)
        try:
            store.set_absent(uuid, _LEAVING)
            self._loads.lose(uuid, DeviceAbsentError(f"device {uuid} is absent: {_LEAVING}", {"device": uuid}))
            loop, count = asyncio.get_running_loop(), 0
            end = float("inf") if seconds is None else loop.time() + seconds
            async with contextlib.aclosing(self._wait(uuid, end)) as changes:
                async for holders in changes:
                    yield holders
            for checkpoint in store.on_device(uuid):
                if store.checkpoints.get(checkpoint.key) is checkpoint:
                    gone(store.remove(checkpoint, reason="drained", by=by))
                    count += 1
                await asyncio.sleep(0)  # the loop answers in between
            await self._reclaimers[uuid].finish()
            while store.memories[uuid].segments:  # law 7: a loader that was ended may have some open
                if loop.time() >= end:
                    raise InUseError(f"a loader that has ended has memory of {uuid} open still; try again")
                await asyncio.sleep(LOOK_SECONDS)
                await self._reclaimers[uuid].finish()
            await absences.nodes.drop(uuid)
            await self._settled()
            log.info(Line("device forgotten", {"device": uuid, "checkpoints": count}))
            before = absences.depart(uuid)
        finally:
            store.leaving.discard(uuid)
            store.set_absent(uuid, before or "")
            if absences.serves(uuid):
                absences.nodes.keep(uuid)
            absences.look(uuid)  # it may answer again by now, or no longer

    async def _wait(self, uuid: str, end: float) -> AsyncGenerator[list[Lease], None]:
        """Yield who holds a lease on the device, until nobody does. Errors: InUseError (at `end` somebody does)."""
        loop, store = asyncio.get_running_loop(), self._store
        seen: list[Lease] = []
        while holders := [lease for c in store.on_device(uuid) for lease in store.leases_of(c)]:
            if holders != seen:
                yield holders
                seen = holders
            if loop.time() >= end:
                raise InUseError(f"device {uuid} is still held by {named(holders)}; nothing was let go of")
            await asyncio.sleep(LOOK_SECONDS)
