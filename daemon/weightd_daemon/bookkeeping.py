"""Makes the daemon's books: of the devices' memory, of leases and names, and what keeps them for the next daemon."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from .core.catalog import Catalog
from .core.lease import LeaseTable
from .core.memory import MemoryAccounting
from .core.store import ContentStore
from .devices.budgets import books_of, pool_of
from .devices.reclaimer import DeviceReclaimer
from .handles.lease_files import HandleLeaseFiles
from .handles.lease_locks import HandleLeaseLocks
from .handles.lease_sweep import HandleLeaseSweep
from .handles.manifests import ManifestHandles
from .monitoring.event_log import EventLog
from .monitoring.event_stream import MonitoringEventStream
from .operations.absence import AbsentDevices
from .persistence.descriptor_store import PersistentDescriptorStore
from .persistence.gpu_nodes import GpuNodes

if TYPE_CHECKING:
    import contextlib

    from .config.settings import Settings
    from .core.limits import UserLimits
    from .devices.served import Devices
    from .monitoring.listeners import EventListeners
    from .persistence.given import GivenDescriptors
    from .persistence.service_manager import ServiceManagerStore
    from .residency import Residency


class DaemonBooks(NamedTuple):
    """What the daemon holds, what is kept of it for the next one, and by device what returns its memory."""

    store: ContentStore
    catalog: Catalog
    limits: UserLimits
    event_stream: MonitoringEventStream
    manifests: ManifestHandles
    locks: HandleLeaseLocks
    sweep: HandleLeaseSweep
    descriptor_store: PersistentDescriptorStore
    reclaimers: dict[str, DeviceReclaimer]
    absences: AbsentDevices


def open_books(
    stack: contextlib.AsyncExitStack, settings: Settings, manager: ServiceManagerStore, served: Devices,
    residency: Residency, listeners: EventListeners, given: GivenDescriptors,
) -> DaemonBooks:  # fmt: skip
    """Make the books of the devices' memory, empty, and what keeps them for the next daemon.

    What they need when the daemon ends is pushed on `stack`.
    """
    limits, publish = settings.limits, listeners.publish
    manifests = ManifestHandles(residency.before_lock)
    stack.callback(manifests.close)
    lease_files = HandleLeaseFiles()
    stack.callback(lease_files.close)
    locks = HandleLeaseLocks(manifests, lease_files)
    store = ContentStore(leases=LeaseTable(locks.is_locked, publish, locks.forget), on_event=residency.on_event)
    store.revision.number = time.time_ns()  # no number that an earlier daemon has had
    catalog = Catalog(store, limits, changed=residency.on_changed, on_event=publish)
    event_stream = MonitoringEventStream(store=store, catalog=catalog, now=time.time)
    listeners.add(event_stream)
    listeners.add(EventLog(event_stream.encode))
    descriptor_store = PersistentDescriptorStore(
        manager=manager, given=given, store=store, catalog=catalog, devices=served.devices,
        manifests=manifests, lease_files=lease_files, now=time.time,
    )  # fmt: skip
    stack.callback(descriptor_store.close)
    sweep = HandleLeaseSweep(store.leases, lease_files)
    stack.push_async_callback(sweep.close)
    reclaimers: dict[str, DeviceReclaimer] = {}
    for uuid, device in served.devices.items():
        budget = 0 if uuid in served.absent else served.budgets[uuid]
        reclaimer = reclaimers[uuid] = DeviceReclaimer(device, partial(descriptor_store.released, uuid))
        stack.push_async_callback(reclaimer.stop)
        store.memories[uuid] = MemoryAccounting(
            budget=budget, page=device.page, sparse=device.sparse, pool_limit=pool_of(settings, device, budget),
            create=reclaimer.maker.create, on_reclaim=reclaimer.kick, available=partial(served.available, uuid),
            before_use=residency.before_use,
        )  # fmt: skip
        reclaimer.watch(store.memories[uuid])
    store.books.limit = books_of(settings, served.budgets)
    nodes = GpuNodes(descriptor_store, served.devices)
    absences = AbsentDevices(settings, served, store, reclaimers, nodes, publish)
    stack.push_async_callback(absences.close)
    return DaemonBooks(
        store, catalog, limits, event_stream, manifests, locks, sweep, descriptor_store, reclaimers, absences
    )
