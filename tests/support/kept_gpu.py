"""A daemon's books over GPUs and what is kept of them, in this process: start after start, with a driver that fails.

The driver is the double that `fake_driver` has loaded here. A start is what the daemon does with its devices: it reads
what was kept, opens devices, restores the books, and has the devices take up what is theirs.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Any, cast

import xxhash

from weightd._mapping import cuda_driver
from weightd_daemon.config.settings import Settings
from weightd_daemon.core.arena import Extent
from weightd_daemon.core.catalog import Catalog
from weightd_daemon.core.checkpoint import Checkpoint, Content
from weightd_daemon.core.events import Event
from weightd_daemon.core.lease import LeaseTable
from weightd_daemon.core.limits import UserLimits
from weightd_daemon.core.loading import StoreTransaction
from weightd_daemon.core.manifest import ContentFile, ContentTensor, content_digest
from weightd_daemon.core.memory import MemoryAccounting
from weightd_daemon.core.principal import Principal
from weightd_daemon.core.store import ContentStore
from weightd_daemon.devices.reclaimer import DeviceReclaimer
from weightd_daemon.devices.served import Devices
from weightd_daemon.handles.lease_files import HandleLeaseFiles
from weightd_daemon.handles.lease_locks import HandleLeaseLocks
from weightd_daemon.handles.manifests import ManifestHandles
from weightd_daemon.operations.absence import AbsentDevices
from weightd_daemon.persistence.descriptor_store import PersistentDescriptorStore
from weightd_daemon.persistence.given import GivenDescriptors
from weightd_daemon.persistence.gpu_nodes import GpuNodes
from weightd_daemon.persistence.root_record import read_root
from weightd_daemon.residency import Residency

MIB = 1 << 20
WHO = Principal(1000, False, "")
FILES = (ContentFile("", "f.safetensors", None),)


class Keeper:
    """A service manager that keeps at once. `dropped` are the names that it was told to let go of."""

    def __init__(self) -> None:
        self.listens = True
        self.most_stored: int | None = None
        self.kept: dict[str, int] = {}
        self.dropped: list[str] = []

    def store(self, name: str, descriptor: int, failed: Callable[[], object] = lambda: None) -> None:
        self.kept[name] = os.dup(descriptor)

    def drop(self, name: str) -> None:
        self.dropped.append(name)
        if name in self.kept:
            os.close(self.kept.pop(name))

    async def barrier(self, seconds: float) -> None:
        """All that was told has been done."""

    def rows(self) -> dict[str, Any]:
        """What the root record says, in an order of its own; without what every start may change."""
        record = read_root(self.kept["root"])
        assert record is not None
        return {table: sorted(map(repr, record.body[table])) for table in ("segments", "checkpoints", "names")}

    def close(self) -> None:
        for name in list(self.kept):
            self.drop(name)


class Start:
    """What one daemon has, from its start to its end by a kill."""

    def __init__(self, keeper: Keeper, **settings: str) -> None:
        cuda_driver._initialised_in = None  # a process of its own would call cuInit
        self.events: list[Event] = []
        self.settings = Settings(budget="64MiB", **settings)
        self.residency = Residency(self.events.append)
        self.served = Devices(self.settings, cast("Any", None))  # no holder is started here
        given = GivenDescriptors([(name, os.dup(descriptor)) for name, descriptor in keeper.kept.items()])
        self.served.open(given.kinds)
        self.manifests = ManifestHandles(self.residency.before_lock)
        self.files = HandleLeaseFiles()
        self.locks = HandleLeaseLocks(self.manifests, self.files)
        leases = LeaseTable(self.locks.is_locked, forget=self.locks.forget)
        self.store = ContentStore(leases=leases, on_event=self.residency.on_event)
        self.catalog = Catalog(self.store, UserLimits(), changed=self.residency.on_changed)
        self.descriptor_store = PersistentDescriptorStore(
            manager=cast("Any", keeper), given=given, store=self.store, catalog=self.catalog,
            devices=self.served.devices, manifests=self.manifests, lease_files=self.files, now=lambda: 7.0,
        )  # fmt: skip
        self.residency.join(self.store, self.catalog, self.manifests, self.descriptor_store, cast("Any", None))
        self.reclaimers: dict[str, DeviceReclaimer] = {}
        for uuid, device in self.served.devices.items():
            reclaimer = DeviceReclaimer(device, partial(self.descriptor_store.released, uuid))
            self.reclaimers[uuid] = reclaimer
            self.store.memories[uuid] = MemoryAccounting(
                budget=0 if uuid in self.served.absent else self.served.budgets[uuid], page=device.page,
                sparse=device.sparse, pool_limit=0, create=reclaimer.maker.create,
                on_reclaim=reclaimer.kick, before_use=self.residency.before_use,
            )  # fmt: skip
            reclaimer.watch(self.store.memories[uuid])
        nodes = GpuNodes(self.descriptor_store, self.served.devices)
        self.absences = AbsentDevices(
            self.settings, self.served, self.store, self.reclaimers, nodes, self.events.append
        )

    @classmethod
    @contextlib.asynccontextmanager
    async def of(cls, keeper: Keeper, **settings: str) -> AsyncIterator[Start]:
        """Start, and serve until the end of the block, which is that of a kill: nothing more is written."""
        start = cls(keeper, **settings)
        try:
            await start.descriptor_store.begin()
            await start.absences.begin()
            start.descriptor_store.flip()
            start.absences.serve(came=lambda: None)
            yield start
            start.descriptor_store.flip()
        finally:
            await start.absences.close()
            for reclaimer in start.reclaimers.values():
                await reclaimer.stop()
            start.end()

    async def until(self, happened: Callable[[], object], seconds: float = 60.0) -> None:
        """Wait until something is so."""
        async with asyncio.timeout(seconds):
            while not happened():  # noqa: ASYNC110  # a driver tells nobody
                await asyncio.sleep(0.005)

    async def load(self, name: str, uuid: str, tensors: dict[str, bytes]) -> Checkpoint:
        """Load as a loader does, in one extent, and name it."""
        load = StoreTransaction(self.store, uuid, "", 1000)
        total = sum(map(len, tensors.values()))
        extent = None if total else Extent(0, 0, 0)
        while extent is None and (extent := load.grant(total, total)) is None:
            await self.reclaimers[uuid].wait()  # until the segment is made
        assert extent is not None
        blobs, offset = [], extent.offset
        for data in tensors.values():
            self.write(uuid, extent.segment, offset, data)
            blobs.append(load.settle(xxhash.xxh3_128(data).digest(), len(data), extent.segment, offset)[1])
            offset += len(data)
        entries = [ContentTensor("", key, "U8", (len(data),), 0, len(data)) for key, data in tensors.items()]
        digest = content_digest(entries, [blob.identity for blob in blobs], FILES)
        content = Content(digest, FILES, tuple(entries), tuple(blobs))
        draft = await self.descriptor_store.prepare(content, uuid)
        checkpoint = load.seal(content, 5.0, draft, draft.size)
        draft.discard()
        load.end()
        self.catalog.set(WHO, name, digest)
        self.descriptor_store.flip()
        return checkpoint

    def write(self, uuid: str, segment: int, offset: int, data: bytes) -> None:
        if uuid == "host":
            os.pwrite(self.served.devices[uuid].writable(segment), data, offset)  # type: ignore[arg-type]  # a descriptor
            return
        with self._mapped(uuid, segment) as address:
            ctypes.memmove(address + offset, data, len(data))

    def bytes_of(self, name: str) -> list[bytes]:
        """What the tensors of a resident checkpoint are."""
        checkpoint = self.catalog.find(WHO, name)
        found = []
        for blob in checkpoint.components[""]:
            with self._mapped(checkpoint.key.device, blob.segment) as address:
                found.append(ctypes.string_at(address + blob.offset, blob.length))
        return found

    def state(self, name: str) -> str:
        """Whether a checkpoint is "resident" or "absent"."""
        return "absent" if self.store.is_absent(self.catalog.find(WHO, name)) else "resident"

    @contextlib.contextmanager
    def _mapped(self, uuid: str, segment: int) -> Iterator[int]:
        """Where a segment of a GPU is mapped, as a client does it: by what the device hands out."""
        device = self.served.devices[uuid]
        size = self.store.memories[uuid].size(segment)
        allocation = cuda_driver.import_descriptor(cast("int", device.shared(segment)))
        addresses = cuda_driver.MappedAddressRange(cuda_driver.ordinal_of(uuid), size)
        try:
            addresses.map(0, size, allocation)
            addresses.allow(writable=True)
            yield addresses.address
        finally:
            addresses.close()
            cuda_driver.release(allocation)

    def end(self) -> None:
        if self.descriptor_store._record.root is not None:
            self.descriptor_store._record.root.close()
        self.manifests.close()
        self.files.close()
        self.served.close()
