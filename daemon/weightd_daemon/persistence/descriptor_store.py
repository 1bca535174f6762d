"""Keeps segments, manifests and the root record in the service manager's descriptor store, across restarts.

Order is everything. Before a seal its segments are stored, then its manifest, then a barrier says that they are; before
the seal is told, or leased to a client, the root record is written. An eviction goes the other way: the root record is
written before a byte may be granted or punched, then the manifest leaves the store, and a segment before it is
released. So whenever this process is killed, all that the root record names is stored, and lies where it says.

The root record is written once in a step of the loop: at its end, or before the first thing that leaves the daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

from weightd import _failpoints
from weightd_daemon.handles.manifest_file import encode_manifest, make_manifest
from weightd_daemon.handles.segment_table import HandleSegmentTable
from weightd_daemon.log_line import Line

from .given import ROOT, GivenDescriptors
from .record_writer import RootRecordWriter
from .restore import restore
from .root_record import PersistentRootRecord

if TYPE_CHECKING:
    from collections.abc import Callable

    from weightd_daemon.core.catalog import Catalog
    from weightd_daemon.core.checkpoint import CheckpointKey, Content
    from weightd_daemon.core.store import ContentStore
    from weightd_daemon.devices.device import Device
    from weightd_daemon.handles.lease_files import HandleLeaseFiles
    from weightd_daemon.handles.manifests import ManifestHandles

    from .service_manager import ServiceManagerStore

log = logging.getLogger(__name__)

NODE = "gpu."
"""Begins the name under which an open device file is stored; the device's UUID follows (gpu_nodes.py)."""
_BARRIER_SECONDS = 10.0
RETRY_SECONDS = (0.1, 0.5, 2.0, 5.0)
"""How long after the root record could not be written it is tried again; the last one again and again. A daemon that is
killed meanwhile leaves nothing."""
_MOST_STORED = 4096
"""What the units ask for (`FileDescriptorStoreMax=`); a manager before systemd 254 does not say what it keeps."""
_LEASES_AHEAD = 4096
"""The root record names a lease number that none exceeds. It is raised by this much, so that few attaches write."""

_LEASE_FILES_SHARE = 16
"""One in so many of the descriptors that the service manager keeps is for lease files, each of 256 leases of a user."""


class PersistedManifestDraft:
    """A manifest that is made, and perhaps stored, before its checkpoint is sealed. `number` is the stored one's."""

    def __init__(self, descriptor: int, table: HandleSegmentTable) -> None:
        self.descriptor = descriptor
        self.table = table
        self.number: int | None = None
        self._on_discard: Callable[[], None] = lambda: None

    def stored_as(self, number: int, on_discard: Callable[[], None]) -> None:
        """It is on its way into the store."""
        self.number, self._on_discard = number, on_discard

    @property
    def size(self) -> int:
        """Bytes of the manifest."""
        return os.fstat(self.descriptor).st_size

    def pop_descriptor(self) -> int:
        """The descriptor, which is the caller's now."""
        descriptor, self.descriptor = self.descriptor, -1
        return descriptor

    def discard(self) -> None:
        """Give it up; nothing happens where it was taken."""
        if self.descriptor >= 0:
            os.close(self.pop_descriptor())
            self.forget()

    def forget(self) -> None:
        """It is not to be kept."""
        if self.number is not None:
            self.number = None
            self._on_discard()


class PersistentDescriptorStore:
    """Stores checkpoints for the next daemon, and restores what the last one stored.

    Where no service manager listens and none has given anything, nothing is kept and nothing is written.
    """

    def __init__(
        self,
        *,
        manager: ServiceManagerStore,
        given: GivenDescriptors,
        store: ContentStore,
        catalog: Catalog,
        devices: dict[str, Device],
        manifests: ManifestHandles,
        lease_files: HandleLeaseFiles,
        now: Callable[[], float],
    ) -> None:
        self._manager = manager
        self._given = given
        self._store = store
        self._catalog = catalog
        self._devices = devices
        self._manifests = manifests
        self._lease_files = lease_files
        lease_files.store_in(self)
        self._now = now
        self._most = _MOST_STORED if manager.most_stored is None else manager.most_stored
        self._record = RootRecordWriter(store=store, catalog=catalog, devices=devices)
        self._ids = count(1)
        self._stored: set[str] = set()
        self._going: list[str] = []
        """Names of manifests that leave the store when the root record says that they are gone."""
        self._scheduled = False
        self._retry: asyncio.TimerHandle | None = None
        self._retries = 0

    # -- at the start ----------------------------------------------------------------------------------------------

    async def begin(self) -> None:
        """Take up what was kept, and keep on from there. Nobody may have connected yet."""
        _failpoints.reach("restore.begin")
        given, record = self._given, self._record
        record.root = given.root
        record.last_id = max([given.number("last_id"), *given.used_ids])
        self._ids = count(record.last_id + 1)
        record.last_lease = given.number("last_lease")
        self._store.leases.number_above(record.last_lease)
        if given.body:
            record.segments, record.kept = restore(
                given, store=self._store, catalog=self._catalog, devices=self._devices,
                manifests=self._manifests, last_lease=record.last_lease, now=self._now(),
            )  # fmt: skip
        _failpoints.reach("restore.adopted")
        lease_files = self._lease_files.adopt(
            given.descriptors, record.kept, self._store.leases, record.last_lease, self._now()
        )
        given.taken |= {given.descriptors[name] for name in lease_files}
        kept = *map(_segment_name, record.segments.values()), *map(_manifest_name, record.kept.values())
        nodes = {NODE + uuid for uuid in self._devices} & given.descriptors.keys()  # only the store need have them open
        self._stored = {*kept, *lease_files, *nodes, ROOT}
        await self._begin_root()
        self.flip()
        self._let_go()
        for uuid in self._devices.keys() - self._store.absent.keys():
            for _ in self._store.fit(uuid):
                await asyncio.sleep(0)
            if excess := self._store.memories[uuid].excess():
                log.warning("device %s: %d bytes more than its budget are leased or pinned, and stay", uuid, excess)
        self.flip()
        _failpoints.reach("restore.written")
        if given.all:
            counts = {
                "checkpoints": len(record.kept),
                "segments": len(record.segments),
                "leases": len(self._store.leases),
            }
            log.info(Line("taken up", counts))

    async def _begin_root(self) -> None:
        """Have a root record kept, unless there is one, or nobody to keep it."""
        if self._record.root is not None or not self._manager.listens:
            return
        root = PersistentRootRecord.create()
        try:
            self._manager.drop(ROOT)
            refused: list[str] = []
            self._manager.store(ROOT, root.descriptor, partial(refused.append, ROOT))
            await self._manager.barrier(_BARRIER_SECONDS)
            if refused:
                raise OSError("it does not read")
        except (OSError, TimeoutError) as error:
            root.close()
            log.warning("nothing outlives this daemon: the service manager takes no descriptors: %s", error)
        else:
            self._record.root = root

    def _let_go(self) -> None:
        """What was not taken up leaves the store, and its memory the machine."""
        given = self._given
        names = {name for name, _ in given.all} - self._stored
        for name in sorted(names):
            log.info("descriptor %r is left: nothing needs it", name[:80])
            if name and name.isprintable():  # else no name of the descriptor store
                self.drop(name)
        for descriptor in {descriptor for name, descriptor in given.all if name != ROOT} - given.taken:
            os.close(descriptor)

    # -- while it serves -------------------------------------------------------------------------------------------

    async def prepare(self, content: Content, uuid: str) -> PersistedManifestDraft:
        """Make the manifest of a content that is to be sealed, and have all stored that it needs to outlive us.

        Where that fails the load goes on: a warning says that this checkpoint ends with the daemon.
        """
        device, size = self._devices[uuid], self._store.memories[uuid].size
        encoded = await asyncio.to_thread(encode_manifest, content, uuid, device.kind, size)
        table = await asyncio.to_thread(HandleSegmentTable.of, content)
        _failpoints.reach("seal.manifest")
        draft = PersistedManifestDraft(make_manifest(encoded), table)
        try:
            await asyncio.sleep(0)  # to write it takes a moment, and so does the seal, which may be next
            if self.stores and device.lasting:
                await self._store_draft(draft, device, content.segments)
        except (OSError, TimeoutError) as error:
            draft.forget()
            what = {"content": content.content_digest[:19], "device": uuid}
            why = str(error) or "the service manager does not answer"
            log.warning(Line("checkpoint", what, "ends with this daemon", because=why))
        except BaseException:
            draft.discard()
            raise
        return draft

    async def _store_draft(self, draft: PersistedManifestDraft, device: Device, segments: list[int]) -> None:
        fresh = [segment for segment in segments if (device.uuid, segment) not in self._record.segments]
        if len(self._stored) + len(fresh) + 1 > self._most - self._most // _LEASE_FILES_SHARE:
            raise OSError(f"the service manager keeps {self._most} descriptors, and has them all")
        for segment in fresh:
            handle = device.writable(segment)
            assert isinstance(handle, int)  # a lasting segment is a descriptor
            number = self._next()
            place = device.uuid, segment
            self._record.segments[place] = number
            self._stored.add(_segment_name(number))
            give_up = partial(self._forget_segment, place, number)
            try:
                _failpoints.reach("seal.segment")
                self._manager.store(_segment_name(number), handle, give_up)
            except OSError:
                give_up()
                raise
        name = _manifest_name(self._next())
        draft.stored_as(self._record.last_id, lambda: self.drop(name))
        self._stored.add(name)
        refused: list[str] = []
        self._manager.store(name, draft.descriptor, partial(refused.append, name))
        _failpoints.reach("seal.barrier")
        await self._manager.barrier(_BARRIER_SECONDS)
        if refused or any((device.uuid, segment) not in self._record.segments for segment in segments):
            raise OSError("the service manager did not take all that was to be kept")

    def _forget_segment(self, place: tuple[str, int], number: int) -> None:
        """The manager has not taken a segment."""
        self._record.segments.pop(place, None)
        self._stored.discard(_segment_name(number))

    @property
    def stores(self) -> bool:
        """Whether anything outlives this daemon."""
        return self._record.root is not None and self._manager.listens

    def holds(self, name: str) -> bool:
        """Whether a descriptor is stored under a name, or is about to be."""
        return name in self._stored

    async def store(self, name: str, descriptor: int) -> None:
        """Store a descriptor under a name. When this returns, it is stored. Errors: OSError, TimeoutError; then not."""
        if len(self._stored) >= self._most:
            raise OSError(f"the service manager keeps {self._most} descriptors, and has them all")
        self._stored.add(name)
        try:
            self._manager.store(name, descriptor)
            await self._manager.barrier(_BARRIER_SECONDS)
        except (OSError, TimeoutError):
            self.drop(name)
            raise

    def drop(self, name: str) -> None:
        """Let the manager close what it keeps under a name. If it does not, it goes when the next daemon starts."""
        self._stored.discard(name)
        try:
            _failpoints.reach("evict.drop")
            self._manager.drop(name)
        except OSError as error:
            log.warning("the service manager does not let go of %r: %s", name, error)

    async def settled(self) -> None:
        """Wait until the manager has done what it was told by now, if it answers."""
        with contextlib.suppress(OSError, TimeoutError):
            await self._manager.barrier(_BARRIER_SECONDS)

    def sealed(self, key: CheckpointKey, draft: object) -> None:
        """Take over the manifest of a checkpoint that is about to be resident. This is written as `changed` says."""
        assert isinstance(draft, PersistedManifestDraft)  # of `prepare`
        self._manifests.add(key, draft.pop_descriptor(), draft.table, number=draft.number or 0)
        if draft.number is not None:
            self._record.kept[key] = draft.number
        self._store.changed.add(key)
        self.changed()

    def evicted(self, key: CheckpointKey) -> None:
        """Note that a checkpoint is gone. `flip` must be called before its bytes are used again."""
        number = self._record.kept.pop(key, None)
        if number is not None:
            self._going.append(_manifest_name(number))
        self._store.changed.add(key)
        self.changed()

    def released(self, uuid: str, segment: int) -> None:
        """Have a segment that is about to be released leave the store; on any thread."""
        number = self._record.segments.pop((uuid, segment), None)
        if number is not None:
            self.drop(_segment_name(number))

    def reserve(self, lease: int) -> None:
        """Have everything written before the lock of a lease is put on a manifest: the next daemon looks for it."""
        if lease > self._record.last_lease:
            self._record.last_lease = lease + _LEASES_AHEAD
        self.flip()

    def changed(self) -> None:
        """Note that the books have changed: the root record is written at the end of this step of the loop.

        That is before anything runs that this step has woken. Where something leaves the daemon earlier, such as the
        answer to a call, or memory that was freed, `flip` is called before it.
        """
        if self._scheduled:
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # before and after it runs `begin` and `close` write
            return
        loop.call_soon(self._on_step)
        self._scheduled = True

    def flip(self, *, uses: bool = False) -> None:
        """Write what has changed to the root record, if anything has: it holds from now on. For `uses` see there."""
        self._record.write(uses=uses)
        if not self._record.failed:
            self._retries = 0
        else:
            self._write_later()
        if self._going:
            going, self._going = self._going, []
            for name in going:
                self.drop(name)

    def close(self) -> None:
        """Write the root record once more, with the times of last use, and close it. What is kept stays kept."""
        self.flip(uses=True)
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        if self._record.root is not None:
            self._record.root.close()
            self._record.root = None

    # -- inside ----------------------------------------------------------------------------------------------------

    def _next(self) -> int:
        self._record.last_id = next(self._ids)
        return self._record.last_id

    def _on_step(self) -> None:
        self._scheduled = False
        self.flip()

    def _write_later(self) -> None:
        """Try again to write what could not be written: a daemon that is killed before leaves nothing to the next."""
        if self._retry is None:
            pause = RETRY_SECONDS[min(self._retries, len(RETRY_SECONDS) - 1)]
            with contextlib.suppress(RuntimeError):  # before and after the loop runs, `begin` and `close` write
                self._retry = asyncio.get_running_loop().call_later(pause, self._write_again)

    def _write_again(self) -> None:
        self._retry = None
        self._retries += 1
        self.flip(uses=True)


def _segment_name(number: int) -> str:
    return f"seg.{number}"


def _manifest_name(number: int) -> str:
    return f"man.{number}"
