"""Writes changes of segments, checkpoints and names to the root record, as rows.

The books say what has changed: `changed` and `touched` of the store, `renamed` and `repinned` of the catalog. The rows
are made of the books as they are at the moment of the write. So a write costs its changes, and nothing is kept twice.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from typing import TYPE_CHECKING, Any

from .root_record import PersistentRootRecord, RootRecordChange

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from weightd.types import SourceFile
    from weightd_daemon.core.catalog import Catalog
    from weightd_daemon.core.checkpoint import Checkpoint, CheckpointKey
    from weightd_daemon.core.store import ContentStore
    from weightd_daemon.devices.device import Device

log = logging.getLogger(__name__)

_MOST_FILES, _MOST_FILES_OF_ONE = 1 << 22, 1 << 16
"""Characters of lists of files, in all and of one list, that the root record takes: who loads says how long they are.
What is left out is read again when it is loaded the next time."""

_Where = tuple[str, int]
"""A segment: its device's UUID, and its number there."""


class RootRecordWriter:
    """Writes changes of the books to the root record, which survives a restart. Without a `root` nothing is written."""

    def __init__(self, *, store: ContentStore, catalog: Catalog, devices: dict[str, Device]) -> None:
        self.root: PersistentRootRecord | None = None
        self.segments: dict[_Where, int] = {}
        """The numbers under which segments are kept."""
        self.kept: dict[CheckpointKey, int] = {}
        """The numbers under which manifests are kept."""
        self.last_id = 0
        self.last_lease = 0
        self._store = store
        self._catalog = catalog
        self._devices = devices
        self._counters: dict[str, int] = {}
        self._rows: dict[CheckpointKey, tuple[int | None, list[int]]] = {}
        """Of each checkpoint, as it was at the last write: the number of its row, if it has one, and its segments."""
        self._needed: Counter[_Where] = Counter()
        """How many checkpoints that are kept lie in a segment; `_others`: how many that are not."""
        self._others: Counter[_Where] = Counter()
        self._written: dict[_Where, tuple[int, bool]] = {}
        """The segments that have a row: its number, and whether it says that they are frozen."""
        self._lists = _Lists()
        self._copied: Iterator[RootRecordChange] | None = None
        self._whole = True
        self.failed = False
        """Whether the root record says nothing, because it could not be written."""

    def write(self, *, uses: bool = False) -> None:
        """Write what has changed since the last write, if anything has: it holds from now on.

        That checkpoints were used is no change by itself, unless `uses` says so; it is written with the next one.
        Where a write fails, `failed` is true until one succeeds: the next change, or one with `uses`, writes it all.
        """
        store, catalog, counters = self._store, self._catalog, {"last_id": self.last_id, "last_lease": self.last_lease}
        changed = store.changed or catalog.renamed or catalog.repinned or (uses and store.touched)
        if not changed and counters == self._counters and not (uses and self.failed):
            return
        self._counters = counters
        if self.root is None:
            for noted in (store.changed, store.touched, catalog.renamed, catalog.repinned):
                noted.clear()
            return
        try:
            self._write(self.root)
            self.failed = False
        except OSError as error:
            self._whole = self.failed = True
            log.error("the root record cannot be written: %s; a daemon that starts now begins empty", error)  # noqa: TRY400  # no bug: no traceback
        except Exception:  # the books have changed all the same: what was written last may be untrue from now on
            self._whole = self.failed = True
            with contextlib.suppress(OSError):
                self.root.clear()
            log.exception("the root record cannot be made by a bug; a daemon that starts now begins empty")

    # -- inside ----------------------------------------------------------------------------------------------------

    def _write(self, root: PersistentRootRecord) -> None:
        """Write what has changed; where that fails, all, at once: meanwhile the state before the change counts.

        Errors: OSError; then nothing counts.
        """
        if not self._whole:
            try:
                return self._write_changes(root)
            except OSError as error:
                self._whole = True
                log.warning("a change of the root record cannot be written: %s; all of it is written anew", error)
        return self._write_all(root)

    def _write_all(self, root: PersistentRootRecord) -> None:
        self._rows.clear()
        self._needed.clear()
        self._others.clear()
        self._written.clear()
        self._lists = _Lists()
        self._store.changed |= self._store.checkpoints.keys()
        self._catalog.renamed |= self._catalog.tags.keys()
        root.write(self._changes(), self._counters)
        self._copied, self._whole = None, False

    def _write_changes(self, root: PersistentRootRecord) -> None:
        most = root.append(list(self._changes()), self._counters)
        if self._copied is not None:
            if root.copy(self._copied, self._counters, most):
                self._copied = None
                root.end_base(self._counters)
        elif root.outgrown:
            root.begin_base()
            self._copied = self._everything()

    def _changes(self) -> Iterator[RootRecordChange]:
        """What has changed since the last write, which these are of then."""
        store, catalog = self._store, self._catalog
        changed, renamed = set(store.changed), set(catalog.renamed)
        marked = (store.touched | catalog.repinned) - changed
        for noted in (store.changed, store.touched, catalog.renamed, catalog.repinned):
            noted.clear()
        places: set[_Where] = set()
        for key in changed:
            before, now = self._rows.get(key), store.checkpoints.get(key)
            number = self.kept.get(key) if now is not None else None
            places |= self._count(key, number, now)
            if before is not None and before[0] is not None and before[0] != number:
                yield RootRecordChange("checkpoints", before[0], None)
            if now is not None and number is not None:
                yield self._checkpoint(now, number)
            else:
                self._lists.forget(key)
        for where in places:
            written = self._written.get(where)
            if not self._needed[where]:
                if written is not None:
                    del self._written[where]
                    yield RootRecordChange("segments", written[0], None)
            elif written is None or written[1] != self._is_frozen(where):
                self._written[where] = self.segments[where], self._is_frozen(where)
                yield self._segment(where)
        for key in marked:
            checkpoint, row = store.checkpoints.get(key), self._rows.get(key)
            if checkpoint is not None and row is not None and row[0] is not None:
                yield RootRecordChange("checkpoints", row[0], _marks(checkpoint), merge=True)
        for domain, name in renamed:
            yield self._name(domain, name)

    def _count(self, key: CheckpointKey, number: int | None, now: Checkpoint | None) -> set[_Where]:
        """Have a checkpoint counted as it is. Returns the segments whose row may be another now."""
        before = self._rows.pop(key, None)
        if before is not None:
            for segment in before[1]:
                counted = self._others if before[0] is None else self._needed
                counted[key.device, segment] -= 1
                if not counted[key.device, segment]:
                    del counted[key.device, segment]
        if now is not None:
            for segment in now.segments:
                (self._others if number is None else self._needed)[key.device, segment] += 1
            self._rows[key] = number, now.segments
        segments = (before[1] if before else []) + (now.segments if now else [])
        return {(key.device, segment) for segment in segments}

    def _everything(self) -> Iterator[RootRecordChange]:
        """A row for all that has one, as it is when it is asked for."""
        for where in list(self._written):
            if where in self._written:
                yield self._segment(where)
        for key in list(self.kept):
            number, now = self.kept.get(key), self._store.checkpoints.get(key)
            if number is not None and now is not None:
                yield self._checkpoint(now, number)
        for domain, name in self._catalog.tags:
            yield self._name(domain, name)

    def _is_frozen(self, where: _Where) -> bool:
        """Whether a segment has bytes that the next daemon cannot place, while clients read them."""
        uuid, segment = where
        return self._others[where] > 0 or self._store.memories[uuid].is_frozen(segment)

    def _segment(self, where: _Where) -> RootRecordChange:
        uuid, segment = where
        memory, (number, frozen) = self._store.memories[uuid], self._written[where]
        row = {
            "id": number,
            "device": uuid,
            "kind": self._devices[uuid].kind,
            "domain": memory.domain_of(segment),
            "size": memory.size(segment),
            "frozen": frozen,
        }
        return RootRecordChange("segments", number, row)

    def _checkpoint(self, checkpoint: Checkpoint, number: int) -> RootRecordChange:
        key = checkpoint.key
        origin, sources = self._lists.choose(key, checkpoint.origin, checkpoint.sources)
        row = {
            "device": key.device,
            "domain": key.domain,
            "content": key.content_digest,
            "manifest": number,
            "segments": [self.segments[key.device, segment] for segment in checkpoint.segments],
            "owner": checkpoint.owner,
            "loaded": checkpoint.loaded,
            "reference": checkpoint.reference,
            "origin": origin,
            "sources": sources,
            **_marks(checkpoint),
        }
        return RootRecordChange("checkpoints", number, row)

    def _name(self, domain: str, name: str) -> RootRecordChange:
        tag, key = self._catalog.tag(domain, name), f"{domain}\0{name}"
        if tag is None:
            return RootRecordChange("names", key, None)
        row = {"domain": domain, "name": name, "content": tag.content_digest, "owner": tag.owner}
        return RootRecordChange("names", key, {**row, "default": tag.is_default})


def _marks(checkpoint: Checkpoint) -> dict[str, Any]:
    """What changes of a checkpoint while it is resident, but for its sources."""
    return {"last_used": checkpoint.last_used, "used": checkpoint.used, "pins": list(checkpoint.pins)}


class _Lists:
    """Which lists of files the root record takes: those that there is room for."""

    def __init__(self) -> None:
        self._taken: dict[CheckpointKey, int] = {}
        self._left = _MOST_FILES

    def choose(
        self, key: CheckpointKey, origin: tuple[SourceFile, ...], sources: Iterable[tuple[SourceFile, ...]]
    ) -> tuple[tuple[SourceFile, ...], list[tuple[SourceFile, ...]]]:
        """A checkpoint's origin and sources, as far as there is room for them beside those of all others."""
        self.forget(key)
        return origin if self._takes(key, origin) else (), [files for files in sources if self._takes(key, files)]

    def forget(self, key: CheckpointKey) -> None:
        """A checkpoint has none any more."""
        self._left += self._taken.pop(key, 0)

    def _takes(self, key: CheckpointKey, files: tuple[SourceFile, ...]) -> bool:
        size = sum(100 + len(file.component) + len(file.file) for file in files)
        if size > min(self._left, _MOST_FILES_OF_ONE):
            return False
        self._left -= size
        self._taken[key] = self._taken.get(key, 0) + size
        return True
