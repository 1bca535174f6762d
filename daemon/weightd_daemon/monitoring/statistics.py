"""The figures of the whole daemon at one moment, for `weightd stats` and the metrics."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from typing import NamedTuple

from weightd._proto.v1 import daemon_pb2
from weightd_daemon.core.store import ContentStore
from weightd_daemon.devices.device import Device
from weightd_daemon.handles.connections import HandleSocketConnections
from weightd_daemon.inspection.sharing_upkeep import SharingUpkeep
from weightd_daemon.loads.loads import Loads
from weightd_daemon.operations.drain import DrainOperation
from weightd_daemon.persistence.digest_index import PersistentDigestIndex

_STATES = {
    "serving": daemon_pb2.DAEMON_STATE_SERVING,
    "draining": daemon_pb2.DAEMON_STATE_DRAINING,
    "drained": daemon_pb2.DAEMON_STATE_DRAINED,
}


class Statistics(NamedTuple):
    """Sources of the figures that metrics and `weightd stats` show."""

    store: ContentStore
    loads: Loads
    connections: HandleSocketConnections
    devices: Mapping[str, Device]
    drain: DrainOperation
    digests: PersistentDigestIndex
    sharing: SharingUpkeep

    async def refresh(self) -> None:
        """Look anew at what each device has free, which leases are held, and who shares with whom."""
        await asyncio.gather(*(device.refresh() for device in self.devices.values()))
        self.store.leases.held()  # strikes out those that have ended
        await self.sharing.caught_up()

    def read(self) -> daemon_pb2.GetStatsResponse:
        """Every figure, in one step of the loop. It takes time in proportion to devices and checkpoints."""
        store = self.store
        devices = []
        for uuid, memory in store.memories.items():
            used, live, in_flight = memory.used, store.live_bytes(uuid), store.in_flight_bytes(uuid)
            device = self.devices[uuid]
            budget = used if uuid in store.absent else memory.budget
            sharing = store.sharing.on(uuid)
            devices.append(
                daemon_pb2.Device(
                    uuid=uuid,
                    kind=device.kind,
                    name=device.name,
                    budget_bytes=budget,
                    used_bytes=used,
                    live_bytes=live,
                    in_flight_bytes=in_flight,
                    reusable_bytes=used - live - in_flight,
                    free_bytes=budget - used,
                    segments=memory.segments,
                    device_free_bytes=device.available(),
                    absence=store.absent.get(uuid, ""),
                    pinned_bytes=sharing.pinned_bytes,
                    leased_bytes=sharing.leased_bytes,
                    evictable_bytes=0 if uuid in store.absent else sharing.evictable_bytes,  # law 12
                    hole_bytes=store.hole_bytes(uuid),
                )
            )
        logical = sum(checkpoint.total_bytes for checkpoint in store.checkpoints.values())
        resident = sum(device.live_bytes for device in devices)
        return daemon_pb2.GetStatsResponse(
            devices=devices,
            logical_bytes=logical,
            resident_bytes=resident,
            saved_bytes=logical - resident,
            saved_ratio=(logical - resident) / logical if logical else 0.0,
            checkpoints=len(store.checkpoints),
            blobs=store.blobs.sealed,
            leases=len(store.leases),
            digest_collisions=store.collisions,
            evictions=store.evictions,
            state=_STATES[self.drain.state],
            digest_index=daemon_pb2.DigestIndex(
                path=os.fsencode(self.digests.path).decode(errors="replace"),
                problem=self.digests.problem,
                failures=self.digests.failures,
            ),
            books=daemon_pb2.Books(limit_bytes=store.books.limit, used_bytes=store.books.used),
            revision=store.revision.number,
        )
