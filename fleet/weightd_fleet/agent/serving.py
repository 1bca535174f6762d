"""What an agent serves, and to how many readers at once; one reader too many is told of others that have the bytes."""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Final, NamedTuple

from weightd.errors import (
    DaemonUnreachableError,
    DrainingError,
    FormatError,
    InvalidReferenceError,
    NotFoundError,
    PermissionDeniedError,
)

from .inventory import DeviceInventory, NodeInventory, ServableCheckpoint
from .local_blobs import BlobReaders, StateBlobs, published_files, tensors_in_files
from .peer_errors import MAX_SOURCES, PeerBusyError
from .resident import DEVICE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from weightd_fleet.core.manifest import FleetManifest
    from weightd_fleet.publishing.state import PublishedState

    from .addresses import AgentAddress
    from .resident import ResidentTensors

MAX_ROWS: Final = 100_000
"""Most rows of one read."""
_MAX_NAMES: Final = 1000


class ServedCheckpoint(NamedTuple):
    """A checkpoint that can be fetched here."""

    name: str
    manifest: FleetManifest


class ReadAdmission:
    """Admits at most `most` reads at once, and remembers for each checkpoint who has read it and serves it now.

    Of those who follow the inventory it admits `watchers`, and of those who have this node fetch `fetches`.
    """

    def __init__(self, most: int, watchers: int = 8, fetches: int = 16) -> None:
        self._most = most
        self._watchers = threading.BoundedSemaphore(watchers)
        self._most_fetches = fetches
        self._fetches = threading.BoundedSemaphore(fetches)
        self._lock = threading.Lock()
        self._reading = 0
        self._readers: OrderedDict[str, list[AgentAddress]] = OrderedDict()
        self.draining = False

    @contextlib.contextmanager
    def admitted(self, name: str, serves_at: AgentAddress | None) -> Iterator[None]:
        """Around a read. Errors: PeerBusyError, DrainingError."""
        with self._lock:
            if self.draining:
                raise DrainingError("this agent is drained and serves nothing new; ask another one")
            if self._reading >= self._most:
                sources = [one for one in self._readers.get(name, []) if one != serves_at]
                raise PeerBusyError(f"{self._most} reads are under way, and no more may be; try again", sources)
            self._reading += 1
        try:
            yield
            if serves_at is not None and not serves_at.is_any:  # as agents of 0.2 say that listen everywhere
                self._remember(name, serves_at)
        finally:
            with self._lock:
                self._reading -= 1

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Around following the inventory. Errors: PeerBusyError."""
        if not self._watchers.acquire(blocking=False):
            raise PeerBusyError("too many follow the inventory; ask without following it")
        try:
            yield
        finally:
            self._watchers.release()

    @contextlib.contextmanager
    def fetching(self) -> Iterator[None]:
        """Around a fetch for a client. Errors: PeerBusyError."""
        if not self._fetches.acquire(blocking=False):
            raise PeerBusyError(f"{self._most_fetches} fetches are under way here, and no more may be; try again")
        try:
            yield
        finally:
            self._fetches.release()

    def _remember(self, name: str, reader: AgentAddress) -> None:
        with self._lock:
            readers = self._readers.setdefault(name, [])
            self._readers.move_to_end(name)
            if reader not in readers:
                readers.insert(0, reader)
                del readers[MAX_SOURCES:]
            while len(self._readers) > _MAX_NAMES:
                self._readers.popitem(last=False)


class ServedBlobs:
    """The checkpoints and blobs that this node can serve: published, and resident or in unchanged files."""

    def __init__(self, state: PublishedState, resident: ResidentTensors) -> None:
        self._state = state
        self._resident = resident
        self._lock = threading.Lock()
        self._decoded: dict[str, FleetManifest] = {}

    def manifest(self, name: str) -> FleetManifest:
        """Errors: NotFoundError, FormatError, InvalidReferenceError (no name)."""
        return self._state.manifest(name)

    def checkpoints(self) -> list[ServedCheckpoint]:
        """The published checkpoints of which this node has every byte."""
        return self._served(self._published())

    def inventory(self, *, draining: bool) -> NodeInventory:
        """What this node can serve, and what the devices of its daemon hold."""
        published = self._published()
        served = self._served(published)  # it hashes what is resident and new
        devices: tuple[DeviceInventory, ...] = ()
        problem = ""
        try:
            devices = self._devices(published)
        except (DaemonUnreachableError, PermissionDeniedError) as error:
            problem = str(error)
        return NodeInventory(tuple(map(self._entry, served)), devices, draining, problem)

    def _entry(self, served: ServedCheckpoint) -> ServableCheckpoint:
        manifest = served.manifest
        try:
            reference = self._state.sources(served.name).get("reference")
        except (NotFoundError, FormatError):
            reference = ""
        repository, commit = manifest.origin or ("", "")
        return ServableCheckpoint(
            name=served.name,
            total_bytes=manifest.tensor_bytes,
            tensors=sum(row.counts for row in manifest.tensors),
            repository=repository,
            commit=commit,
            reference=reference if isinstance(reference, str) else "",
        )

    def _devices(self, published: dict[str, FleetManifest]) -> tuple[DeviceInventory, ...]:
        """The devices that can be used now. Errors: DaemonUnreachableError, PermissionDeniedError."""
        present = [device for device in self._resident.stats() if not device.absence]
        whole = tuple(sorted(self._resident.whole(published.values())))
        return tuple(
            DeviceInventory(
                device=device.uuid,
                kind=device.kind,
                budget_bytes=device.budget_bytes,
                used_bytes=device.used_bytes,
                firm_bytes=max(0, device.live_bytes + device.in_flight_bytes - device.evictable_bytes),
                page_bytes=mmap.PAGESIZE,
                checkpoints=whole if device.uuid == DEVICE else (),
            )
            for device in present
        )

    def _published(self) -> dict[str, FleetManifest]:
        """The manifests of all that was published. Each is decoded once: a name has one manifest."""
        with self._lock:
            published = {}
            for name in self._state.names():
                with contextlib.suppress(NotFoundError, FormatError):  # removed meanwhile, or damaged
                    published[name] = self._decoded.get(name) or self._state.manifest(name)
            self._decoded = published
            return published

    def _served(self, published: dict[str, FleetManifest]) -> list[ServedCheckpoint]:
        lengths = {row.length for manifest in published.values() for row in manifest.tensors if row.length}
        resident = self._resident.find(lengths)
        served = []
        for name, manifest in published.items():
            rest = {row.digest for row in manifest.tensors if row.length} - resident
            if not rest or rest <= tensors_in_files(self._state, manifest):
                served.append(ServedCheckpoint(name, manifest))
        return served

    @contextlib.contextmanager
    def rows(self, name: str, digests: Sequence[bytes]) -> Iterator[BlobReaders]:
        """Hold some blobs of a checkpoint. Errors: NotFoundError, FormatError, InvalidReferenceError."""
        if len(digests) > MAX_ROWS:
            raise InvalidReferenceError(f"{len(digests)} rows are asked for, over the limit of {MAX_ROWS}")
        manifest = self.manifest(name)
        lengths = {row.digest: row.length for row in manifest.tensors}
        own = StateBlobs(self._state, manifest)
        wanted = {digest for digest in digests if digest not in own}
        for digest in wanted - lengths.keys():
            raise NotFoundError(f"{name}: has no row {digest.hex()[:64]!r}")
        with (
            self._resident.hold(wanted, {lengths[digest] for digest in wanted}) as held,
            published_files(self._state, [name], wanted) as files,
        ):
            found = BlobReaders([own, held, files])
            for digest in wanted:
                if lengths[digest] and digest not in found:
                    row = digest.hex()[:16]
                    raise NotFoundError(f"{name}: its row {row} is not on this node any more; ask another one")
            yield found
