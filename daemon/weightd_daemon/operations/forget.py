"""Forgets devices: empties one, absent or not, and lets go of all that is kept of it. The rest serves on."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from weightd.errors import DeviceAbsentError, InUseError, InvalidReferenceError
from weightd_daemon.core.lease import named
from weightd_daemon.log_line import Line

from .drain import LOOK_SECONDS

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping

    from weightd_daemon.core.lease import Lease, Peer
    from weightd_daemon.core.store import Store
    from weightd_daemon.devices.reclaimer import Reclaimer
    from weightd_daemon.loads.loads import Loads

    from .absence import Absences

log = logging.getLogger(__name__)

_LEAVING = "it is being let go of (`weightd drain --forget`)"


class Forgetting:
    """One device that is being forgotten. `settled` waits until the service manager has done what it was told."""

    def __init__(
        self,
        *,
        store: Store,
        loads: Loads,
        absences: Absences,
        reclaimers: Mapping[str, Reclaimer],
        settled: Callable[[], Awaitable[None]],
    ) -> None:
        self._store = store
        self._loads = loads
        self._absences = absences
        self._reclaimers = reclaimers
        self._settled = settled

    async def forget(
        self, uuid: str, seconds: float | None, by: Peer, gone: Callable[[int], None]
    ) -> AsyncGenerator[list[Lease], None]:
        """Empty a device, and let go of it. Yields who still holds a lease: at first and when that has changed.

        `gone` is told the freed bytes of each checkpoint. When this ends early the device goes on as before, with what
        is left on it. Errors: InUseError (leases are held after `seconds`, or somebody else forgets it),
        InvalidReferenceError (host memory that serves).
        """
        store, absences = self._store, self._absences
        if uuid in absences.leaving:
            raise InUseError(f"device {uuid} is being let go of by somebody else")
        before = store.absent.get(uuid)
        if before is None and store.memories[uuid].sparse:
            raise InvalidReferenceError(f"device {uuid} is no GPU that could be let go of; `weightd drain` empties it")
        absences.leaving.add(uuid)
        try:
            store.absent[uuid] = _LEAVING
            self._loads.lose(uuid, DeviceAbsentError(f"device {uuid} is absent: {_LEAVING}", {"device": uuid}))
            async for holders in self._wait(uuid, seconds):
                yield holders
            count = 0
            for checkpoint in store.on_device(uuid):
                if store.checkpoints.get(checkpoint.key) is checkpoint:
                    gone(store.remove(checkpoint, reason="drained", by=by))
                    count += 1
                await asyncio.sleep(0)  # the loop answers in between
            await self._reclaimers[uuid].finish()
            await absences.nodes.drop(uuid)
            await self._settled()
            log.info(Line("device forgotten", {"device": uuid, "checkpoints": count}))
            if absences.serves(uuid):
                absences.depart(uuid)
                before = store.absent[uuid]
        finally:
            absences.leaving.discard(uuid)
            if before is None:
                del store.absent[uuid]
            else:
                store.absent[uuid] = before
            absences.look(uuid)  # it may answer again by now, or no longer

    async def _wait(self, uuid: str, seconds: float | None) -> AsyncGenerator[list[Lease], None]:
        """Yield who holds a lease on the device, until nobody does. Errors: InUseError."""
        loop, store = asyncio.get_running_loop(), self._store
        end = None if seconds is None else loop.time() + seconds
        seen: list[Lease] = []
        while holders := [lease for c in store.on_device(uuid) for lease in store.leases_of(c)]:
            if holders != seen:
                yield holders
                seen = holders
            if end is not None and loop.time() >= end:
                raise InUseError(f"still held after {seconds:g} s by {named(holders)}; nothing was let go of")
            await asyncio.sleep(LOOK_SECONDS)
