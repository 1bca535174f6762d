"""Runs the steps for a checkpoint that becomes resident, is evicted, or is lost with its device, in their order.

The order is meaning: a daemon that is killed between any two steps must leave nothing that the next one would misread.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightd.errors import DeviceError

from . import heap
from .core.events import CheckpointEvicted, CheckpointSealed, DeviceLost
from .log_line import Line

if TYPE_CHECKING:
    from collections.abc import Callable

    from .core.catalog import Catalog
    from .core.events import Event
    from .core.store import ContentStore
    from .handles.manifests import ManifestHandles
    from .loads.loads import Loads
    from .persistence.descriptor_store import PersistentDescriptorStore

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Parts:
    store: ContentStore
    catalog: Catalog
    manifests: ManifestHandles
    descriptor_store: PersistentDescriptorStore
    loads: Loads


class Residency:
    """Made before the parts that report to it, which `join` brings. On the thread of the loop that serves.

    `publish` notifies the listeners of an event, and raises nothing.
    """

    def __init__(self, publish: Callable[[Event], None]) -> None:
        self._publish = publish
        self._joined: _Parts | None = None

    def join(
        self,
        store: ContentStore,
        catalog: Catalog,
        manifests: ManifestHandles,
        descriptor_store: PersistentDescriptorStore,
        loads: Loads,
    ) -> None:
        """Act on these parts. Due before anything is sealed, leased or named, and before the loop runs."""
        self._joined = _Parts(store, catalog, manifests, descriptor_store, loads)

    def on_event(self, event: Event) -> None:
        """Handle what the store reports. Errors: for a seal, whatever keeps the checkpoint from surviving a restart."""
        if isinstance(event, CheckpointSealed):
            self._sealed(event)
        elif isinstance(event, CheckpointEvicted):
            self._evicted(event)
        else:
            self._publish(event)

    def _sealed(self, event: CheckpointSealed) -> None:
        # Law 11. May raise, and then the checkpoint is not sealed: so nobody has been told of it.
        self._parts.descriptor_store.sealed(event.checkpoint.key, event.manifest)
        self._publish(event)

    def _evicted(self, event: CheckpointEvicted) -> None:
        parts, key = self._parts, event.checkpoint.key
        self._publish(event)  # listeners look up the checkpoint's names, which may be forgotten below
        parts.manifests.remove(key)
        if event.load:
            parts.loads.evicted(event)  # which looks the names up, too
        # Before the next root record: it must not have names any more that went with the checkpoint.
        parts.catalog.forget(event.checkpoint, chosen=event.reason == "removed")
        parts.descriptor_store.evicted(key)
        heap.gone(lambda: parts.store.blobs.sealed)

    def on_changed(self) -> None:
        """A name, a pin or another mark of a checkpoint has changed: the root record is to say so."""
        self._parts.descriptor_store.changed()

    def before_use(self) -> None:
        """Memory is about to be used again (law 11): the root record that no longer names it is written first."""
        self._parts.descriptor_store.flip()

    def before_answer(self) -> None:
        """An answer is about to be sent: what it tells of outlives the daemon."""
        self._parts.descriptor_store.flip()

    def before_lock(self, lease: int) -> None:
        """A lease of that number is about to get its lock: the root record covers its number first."""
        self._parts.descriptor_store.reserve(lease)

    def on_lost(self, device: str, reason: str) -> None:
        """The memory of a device, given by its UUID, is gone: so are its checkpoints, and then the loads to it."""
        log.warning(Line("device lost", {"device": device}, because=reason))
        if self._joined is None:  # while the daemon starts, nothing lies there
            return
        self._publish(DeviceLost(device, reason))
        self._parts.store.lose(device, reason)
        self._parts.loads.lose(device, DeviceError(f"device {device}: {reason}; load it again"))

    @property
    def _parts(self) -> _Parts:
        if self._joined is None:
            raise RuntimeError("something has happened to a checkpoint or a device before `join`")
        return self._joined
