"""Checkpoints: content that users load. Each is resident on one device, in one sharing domain."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from weightd.errors import DeviceError, InUseError

from .arena import Extent
from .lease import named

if TYPE_CHECKING:
    from collections.abc import Iterable

    from weightd.layouts import Group
    from weightd.types import SourceFile

    from .blob import Blob
    from .lease import Lease
    from .manifest import ContentFile, ContentTensor


BYTES_OF_TENSOR = 2304
"""Memory of the daemon for one tensor of a resident checkpoint, beside its manifest (bench/books.py measures it)."""
MANIFEST_BYTES_OF_TENSOR = 48
"""About what a tensor takes in a manifest beside its name: what is reckoned with before that is made."""


_MOST_IN_RUN = 1000


def books_of(tensors: int, manifest_bytes: int) -> int:
    """Bytes of the daemon's own books (books.py) for a checkpoint of so many tensors, with such a manifest."""
    return manifest_bytes + BYTES_OF_TENSOR * tensors


class CheckpointKey(NamedTuple):
    """Identity of a checkpoint: its content is resident once per device and sharing domain."""

    device: str
    domain: str
    content_digest: str


class _ContentTally(NamedTuple):
    """What a checkpoint's record has of its content: by component the blobs and the number of tensors, and the rest."""

    components: dict[str, list[Blob]]
    tensors: dict[str, int]
    unique: dict[int, Blob]
    total_bytes: int
    segments: list[int]
    runs: list[tuple[Extent, list[Blob]]]
    """The unique blobs, as far as they lie one behind the other, with the bytes that they take."""


@dataclass(frozen=True)
class Content:
    """Content of a checkpoint: files, tensors, the blob of each (None for a tensor without bytes), and views."""

    content_digest: str
    files: tuple[ContentFile, ...]
    entries: tuple[ContentTensor, ...]
    blobs: tuple[Blob | None, ...]
    views: tuple[Group, ...] = ()
    """What frameworks fuse, where its tensors (members are rows) lie one behind the other."""

    @property
    def segments(self) -> list[int]:
        """Numbers of the segments that hold the blobs, sorted: in a manifest, a segment goes by its place here."""
        return self.tally.segments

    @cached_property
    def tally(self) -> _ContentTally:
        """What the record needs, counted at the first call: on a thread, where there are many tensors."""
        components: dict[str, list[Blob]] = {}
        tensors: dict[str, int] = {}
        unique: dict[int, Blob] = {}
        total = 0
        for entry, blob in zip(self.entries, self.blobs, strict=True):
            tensors[entry.component] = tensors.get(entry.component, 0) + 1
            part = components.setdefault(entry.component, [])
            if blob is not None:
                part.append(blob)
                unique[blob.number] = blob
                total += blob.length
        segments = sorted({blob.segment for blob in unique.values()})
        return _ContentTally(components, tensors, unique, total, segments, _runs(unique.values()))


@dataclass(slots=True, eq=False)
class Checkpoint:
    """State of a sealed checkpoint. Times are seconds since the epoch; `owner` is the uid that loaded it first."""

    key: CheckpointKey
    components: dict[str, list[Blob]]
    tensors: dict[str, int]
    total_bytes: int
    owner: int | None
    loaded: float
    last_used: float
    """For people: clocks are stepped, so `used` decides what is evicted."""
    used: int = 0
    """The number of its last use; of two checkpoints the one with the lower was used less recently."""
    segments: list[int] = field(default_factory=list)
    """Numbers of the segments that hold its blobs, in the order of its manifest."""
    pins: set[int | None] = field(default_factory=set)
    """The users who keep it from eviction; each takes back only its own pin."""
    origin: tuple[SourceFile, ...] = ()
    """The files that it was loaded from first."""
    reference: str = ""
    """What these were found by, for people."""
    sources: list[tuple[SourceFile, ...]] = field(default_factory=list)
    """Files that are known to hold this content as long as their identities stay what they are."""
    unique: dict[int, Blob] = field(default_factory=dict)
    runs: list[tuple[Extent, list[Blob]]] = field(default_factory=list)
    """As in _ContentTally."""
    manifest_bytes: int = 0

    @classmethod
    def of(
        cls, key: CheckpointKey, content: Content, owner: int | None, now: float, manifest_bytes: int = 0
    ) -> Checkpoint:
        """The record of `content`; per-tensor columns stay in the manifest, which has `manifest_bytes`."""
        tally = content.tally
        return cls(
            key, tally.components, tally.tensors, tally.total_bytes, owner, now, now, segments=tally.segments,
            unique=tally.unique, runs=tally.runs, manifest_bytes=manifest_bytes,
        )  # fmt: skip

    @property
    def tensor_count(self) -> int:
        return sum(self.tensors.values())

    @property
    def books_bytes(self) -> int:
        """What it takes of the daemon's own books (books.py), whatever it takes of its device."""
        return books_of(self.tensor_count, self.manifest_bytes)

    @property
    def pinned(self) -> bool:
        """Whether anybody keeps it from eviction."""
        return bool(self.pins)

    def forget_blobs(self) -> None:
        """Its bytes are gone: what is left is a record."""
        self.components.clear()
        self.unique.clear()
        self.runs.clear()

    def in_use(self, leases: Iterable[Lease], called: str = "") -> InUseError:
        """The error that names who holds the checkpoint, which it calls `called` (or by its digest)."""
        called = called or self.key.content_digest[:19]
        return InUseError(f"checkpoint {called} is in use by {named(leases)}; stop them first")


@dataclass(frozen=True, slots=True)
class LostCheckpoint:
    """Record of a checkpoint whose device lost its memory, until it is loaded again or removed."""

    checkpoint: Checkpoint
    reason: str

    def error(self, called: str = "") -> DeviceError:
        """The error for whoever asks for the checkpoint, which it calls `called` (or by its digest)."""
        called = called or self.checkpoint.key.content_digest[:19]
        return DeviceError(f"checkpoint {called} was lost: {self.reason}; load it again")


def _runs(blobs: Iterable[Blob]) -> list[tuple[Extent, list[Blob]]]:
    """Blobs that lie one behind the other, as they come, with the bytes that they take."""
    runs: list[tuple[Extent, list[Blob]]] = []
    for blob in blobs:
        slot = blob.slot
        if runs:
            extent, before = runs[-1]
            if extent.segment == slot.segment and extent.end == slot.offset and len(before) < _MOST_IN_RUN:
                before.append(blob)
                runs[-1] = extent._replace(length=extent.length + slot.length), before
                continue
        runs.append((slot, [blob]))
    return runs
