"""A daemon's books with what survives of them, in this process, and a service manager that keeps it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any, cast

import xxhash

from support.prompt_memory import PromptMemory
from weightd.types import FileIdentity, SourceFile
from weightd_daemon.core.catalog import Catalog
from weightd_daemon.core.checkpoint import Checkpoint, CheckpointKey, Content
from weightd_daemon.core.lease import LeasePeer, LeaseTable
from weightd_daemon.core.limits import UserLimits
from weightd_daemon.core.loading import StoreTransaction
from weightd_daemon.core.manifest import ContentFile, ContentTensor, content_digest
from weightd_daemon.core.principal import Principal
from weightd_daemon.core.store import ContentStore
from weightd_daemon.devices.host import HostDevice
from weightd_daemon.handles.lease_files import HandleLeaseFiles
from weightd_daemon.handles.lease_locks import HandleLeaseLocks
from weightd_daemon.handles.manifests import ManifestHandles
from weightd_daemon.persistence.descriptor_store import PersistentDescriptorStore
from weightd_daemon.persistence.given import GivenDescriptors
from weightd_daemon.persistence.root_record import read_root
from weightd_daemon.residency import Residency

MIB = 1 << 20
WHO = Principal(1000, False, "")
FILES = (ContentFile("", "f.safetensors", {"key": "value"}),)
SOURCES = (SourceFile("", "f.safetensors", FileIdentity(1, 1 << 63, 3, 4, 5)),)
INDEXED = (*SOURCES, SourceFile("", "f.safetensors.index.json", FileIdentity(1, 2, 3, 4, 5), is_index=True))
PEER = LeasePeer(1, 2, 1000, "python")


class Keeper:
    """A service manager that keeps at once, and remembers what it was told, with the root record at that moment."""

    def __init__(self) -> None:
        self.listens = True
        self.most_stored: int | None = None
        self.kept: dict[str, int] = {}
        self.told: list[tuple[str, str, dict[str, Any]]] = []
        self.broken = False
        self.deaf = ""
        """What begins with this is taken, and given up later."""

    def store(self, name: str, descriptor: int, failed: Callable[[], object] = lambda: None) -> None:
        if self.broken:
            raise OSError("nobody is there")
        if self.deaf and name.startswith(self.deaf):
            self.told.append(("lost", name, self.root))
            failed()  # some time after it was told
            return
        self.told.append(("store", name, self.root))
        self.kept[name] = os.dup(descriptor)

    def drop(self, name: str) -> None:
        self.told.append(("drop", name, self.root))
        if name in self.kept:
            os.close(self.kept.pop(name))

    async def barrier(self, seconds: float) -> None:
        self.told.append(("barrier", "", self.root))

    @property
    def root(self) -> dict[str, Any]:
        record = read_root(self.kept["root"]) if "root" in self.kept else None
        return {} if record is None else record.body

    def close(self) -> None:
        for name in list(self.kept):
            self.drop(name)


class Books:
    """A daemon's books over host memory, with what survives of them."""

    def __init__(self, keeper: Keeper, *, budget: int = 64 * MIB) -> None:
        self.device = HostDevice()
        residency = Residency(lambda _: None)
        self.manifests = ManifestHandles(residency.before_lock)
        self.files = HandleLeaseFiles()
        self.locks = HandleLeaseLocks(self.manifests, self.files)
        leases = LeaseTable(self.locks.is_locked, forget=self.locks.forget)
        self.store = ContentStore(leases=leases, on_event=residency.on_event)
        self.store.memories["host"] = PromptMemory(
            budget=budget, page=self.device.page, sparse=True, pool_limit=0, create=self.device.create,
            before_use=residency.before_use,
        )  # fmt: skip
        self.catalog = Catalog(self.store, UserLimits(), changed=residency.on_changed)
        given = [(name, os.dup(descriptor)) for name, descriptor in keeper.kept.items()]
        self.descriptor_store = PersistentDescriptorStore(
            manager=keeper, given=GivenDescriptors(given), store=self.store, catalog=self.catalog,  # type: ignore[arg-type]  # plays one
            devices={"host": self.device},
            manifests=self.manifests, lease_files=self.files, now=lambda: 7.0,
        )  # fmt: skip
        residency.join(self.store, self.catalog, self.manifests, self.descriptor_store, loads=cast("Any", None))
        asyncio.run(self.descriptor_store.begin())
        self.reclaim()

    def reclaim(self) -> None:
        memory = self.store.memories["host"]
        while reclaims := memory.next_reclaims():
            for reclaim in reclaims:
                if hasattr(reclaim, "extent"):
                    self.device.punch(reclaim.extent.segment, reclaim.extent.offset, reclaim.extent.length)
                else:
                    self.descriptor_store.released("host", reclaim.segment)
                    self.device.release(reclaim.segment)
                memory.reclaimed(reclaim)

    def load(self, name: str, tensors: dict[str, bytes]) -> Checkpoint:
        """Load as a loader does, new tensors one behind the other in one extent, and name it."""
        load = StoreTransaction(self.store, "host", "", 1000)
        blobs = []
        segment, offset = 0, 0
        for data in tensors.values():
            digest = xxhash.xxh3_128(data).digest()
            blob = load.candidate(digest, len(data))
            if blob is not None:
                blob = load.share(blob.number, None, 0)
            if blob is None:
                if not segment:
                    extent = load.grant(sum(map(len, tensors.values())), len(data))
                    assert extent is not None
                    segment, offset = extent.segment, extent.offset
                os.pwrite(self.device.writable(segment), data, offset)
                placed, blob = load.settle(digest, len(data), segment, offset)
                assert placed
                offset += len(data)
            blobs.append(blob)
        entries = [ContentTensor("", key, "U8", (len(data),), 0, len(data)) for key, data in tensors.items()]
        digest_of = content_digest(entries, [blob.identity for blob in blobs], FILES)
        content = Content(digest_of, FILES, tuple(entries), tuple(blobs))
        draft = asyncio.run(self.descriptor_store.prepare(content, "host"))
        checkpoint = load.seal(content, 5.0, draft, draft.size)
        draft.discard()
        checkpoint.origin, checkpoint.sources, checkpoint.reference = SOURCES, [INDEXED], "/m"
        self.store.changed.add(checkpoint.key)
        self.descriptor_store.flip()
        load.end()
        self.reclaim()
        self.catalog.set(WHO, name, digest_of)
        self.descriptor_store.flip()
        return checkpoint

    def lock(self, key: CheckpointKey, number: int) -> int:
        """The descriptor with the lock of a lease, on the manifest."""
        return self.locks.lock(key, number, None).manifest

    def bytes_of(self, name: str) -> list[bytes]:
        checkpoint = self.catalog.find(WHO, name)
        blobs = checkpoint.components[""]
        return [os.pread(self.device.shared(blob.segment), blob.length, blob.offset) for blob in blobs]

    def names(self) -> set[str]:
        return {name for checkpoint in self.store.checkpoints.values() for name in self.catalog.names(checkpoint)}

    def end(self) -> None:
        """The end of the process by a kill: nothing more is written."""
        if self.descriptor_store._record.root is not None:
            self.descriptor_store._record.root.close()
        self.manifests.close()
        self.files.close()
        self.device.close()


DATA = {name: {f"t{i}": bytes([ord(name), i]) * (MIB // 2) for i in range(3)} for name in "ab"}
DATA["b"]["t2"] = DATA["a"]["t2"]
