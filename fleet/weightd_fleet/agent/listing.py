"""What a node can serve and what its devices hold; listed anew only when the daemon's books or the state have changed.

Each follower asks once a second. Published files may change while neither does, so they are looked at each time.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from typing import TYPE_CHECKING, NamedTuple

from weightd.errors import DaemonUnreachableError, FormatError, NotFoundError, PermissionDeniedError

from .inventory import DeviceInventory, NodeInventory, ServableCheckpoint
from .local_blobs import UnchangedFiles
from .resident import DEVICE

if TYPE_CHECKING:
    from collections.abc import Iterable

    from weightd.types import DeviceStats
    from weightd_fleet.core.manifest import FleetManifest
    from weightd_fleet.publishing.state import PublishedState

    from .inventory import ResidentCheckpoint
    from .resident import ResidentTensors


class _ListedCheckpoint(NamedTuple):
    """A published checkpoint. `files` are for those of its tensors that are not resident; None where all are."""

    entry: ServableCheckpoint
    files: UnchangedFiles | None


class _Listing(NamedTuple):
    """What was found at a revision of the daemon's books, None without a daemon, and with these files of the state."""

    revision: int | None
    stamps: frozenset[tuple[object, ...]]
    checkpoints: list[_ListedCheckpoint]
    whole: tuple[ResidentCheckpoint, ...]


class NodeListing:
    """Lists what a node can serve. Safe for use from several threads, which share what is found."""

    def __init__(self, state: PublishedState, resident: ResidentTensors) -> None:
        self._state = state
        self._resident = resident
        self._lock = threading.Lock()
        self._decoded: dict[str, FleetManifest] = {}
        self._last: _Listing | None = None

    def inventory(self, *, draining: bool) -> NodeInventory:
        """What this node can serve, and what the devices of its daemon hold. Hashes what is resident and new."""
        with self._lock:
            stamps = self._state.stamps()  # before anything is read: what changes from here on is found the next time
            devices: tuple[DeviceInventory, ...] = ()
            problem = ""
            try:
                stats = self._resident.stats()
                if not self._is_known(stats.revision, stamps):
                    self._last = self._list(stats.revision, stamps)
                    stats = self._resident.stats()  # to hash may have taken long
                devices = _devices(stats.devices, self._last.whole if self._last else ())
            except (DaemonUnreachableError, PermissionDeniedError) as error:
                problem = str(error)
                if not self._is_known(None, stamps):
                    self._last = self._list(None, stamps)
            listed = self._last.checkpoints if self._last else []
            served = tuple(one.entry for one in listed if one.files is None or one.files.have_all())
            return NodeInventory(served, devices, draining, problem)

    def _is_known(self, revision: int | None, stamps: frozenset[tuple[object, ...]]) -> bool:
        """Whether the last listing holds. A daemon that says 0 does not tell when its books change."""
        return self._last is not None and revision != 0 and self._last[:2] == (revision, stamps)

    def _list(self, revision: int | None, stamps: frozenset[tuple[object, ...]]) -> _Listing:
        """Errors: DaemonUnreachableError, PermissionDeniedError; neither where `revision` is None."""
        published = self._published()
        lengths = {row.length for manifest in published.values() for row in manifest.tensors if row.length}
        resident = set() if revision is None else self._resident.find(lengths)
        whole = () if revision is None else tuple(sorted(self._resident.whole(published.values())))
        listed = []
        for name, manifest in published.items():
            rest = {row.digest for row in manifest.tensors if row.length} - resident
            files = UnchangedFiles(self._state, manifest, rest) if rest else None
            listed.append(_ListedCheckpoint(self._entry(name, manifest), files))
        return _Listing(revision, stamps, listed, whole)

    def _published(self) -> dict[str, FleetManifest]:
        """The manifests of all that was published. Each is decoded once: a name has one manifest."""
        published = {}
        for name in self._state.names():
            with contextlib.suppress(NotFoundError, FormatError):  # removed meanwhile, or damaged
                published[name] = self._decoded.get(name) or self._state.manifest(name)
        self._decoded = published
        return published

    def _entry(self, name: str, manifest: FleetManifest) -> ServableCheckpoint:
        try:
            reference = self._state.sources(name).get("reference")
        except (NotFoundError, FormatError):
            reference = ""
        repository, commit = manifest.origin or ("", "")
        return ServableCheckpoint(
            name=name,
            total_bytes=manifest.tensor_bytes,
            tensors=sum(row.counts for row in manifest.tensors),
            repository=repository,
            commit=commit,
            reference=reference if isinstance(reference, str) else "",
        )


def _devices(stats: Iterable[DeviceStats], whole: tuple[ResidentCheckpoint, ...]) -> tuple[DeviceInventory, ...]:
    """The devices that can be used now."""
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
        for device in stats
        if not device.absence
    )
