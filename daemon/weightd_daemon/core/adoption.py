"""Fills an empty store with the blobs and checkpoints of an earlier daemon, at the places in their manifests.

Nothing here believes anything: a checkpoint whose blobs cannot lie where they are said to lie is refused, and the books
are as they were before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from weightd.types import ALIGNMENT

from .arena import slot_bytes
from .blob import Blob, BlobKey
from .checkpoint import Checkpoint, CheckpointKey, Content
from .manifest import content_digest
from .ranges import RangeSet

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from .digest import BlobIdentity
    from .manifest import ContentFile, ContentTensor
    from .store import ContentStore


class BlobPlace(NamedTuple):
    """Placement of a blob: a segment of this daemon, and an offset in bytes."""

    segment: int
    offset: int


class CheckpointDescription(NamedTuple):
    """A checkpoint to enter into the store: files, tensors, and each one's blob identity and place (None: no bytes)."""

    files: Sequence[ContentFile]
    entries: Sequence[ContentTensor]
    identities: Sequence[BlobIdentity]
    places: Sequence[BlobPlace | None]
    manifest_bytes: int = 0


class StoreAdoption:
    """Enters an earlier daemon's checkpoints of one device into the store. `sizes` are its adopted segments' bytes."""

    def __init__(self, store: ContentStore, sizes: Mapping[int, int]) -> None:
        self._store = store
        self._sizes = sizes
        self._blobs: dict[BlobPlace, Blob] = {}
        self.taken: dict[int, RangeSet] = {}
        """The bytes that restored blobs have, by segment."""

    def add(self, key: CheckpointKey, described: CheckpointDescription, owner: int | None, loaded: float) -> Checkpoint:
        """Enter a checkpoint; `loaded` is seconds since the epoch. Errors: ValueError, and nothing has changed."""
        if key in self._store.checkpoints:
            raise ValueError("it is there twice")
        if content_digest(described.entries, described.identities, described.files) != key.content_digest:
            raise ValueError("its content is not what its digest says")
        self._check(key, described)
        blobs = [None if place is None else self._blob(key, blob, place) for blob, place in _rows(described)]
        content = Content(key.content_digest, tuple(described.files), tuple(described.entries), tuple(blobs))
        checkpoint = Checkpoint.of(key, content, owner, loaded, described.manifest_bytes)
        self._store.enter(checkpoint)
        return checkpoint

    def _check(self, key: CheckpointKey, described: CheckpointDescription) -> None:
        """Whether every blob fits into its segment, and lies on no other. Errors: ValueError."""
        fresh: dict[BlobPlace, BlobIdentity] = {}
        for identity, place in _rows(described):
            if place is None:
                if identity.length:
                    raise ValueError("a tensor with bytes has no place")
                continue
            if identity.length <= 0 or place.offset < 0 or place.offset % ALIGNMENT:
                raise ValueError(f"a blob of {identity.length} bytes at {place.offset} cannot be")
            if place.offset + slot_bytes(identity.length) > self._sizes.get(place.segment, 0):
                raise ValueError("a blob lies beyond its segment")
            there = self._blobs.get(place)
            if there is not None and (there.identity != identity or there.key[:2] != key[:2]):
                raise ValueError("a blob lies where another does")
            if there is None and fresh.setdefault(place, identity) != identity:
                raise ValueError("two of its blobs lie in one place")
        ends: dict[int, int] = {}
        for place, identity in sorted(fresh.items()):
            end = place.offset + slot_bytes(identity.length)
            taken = self.taken.get(place.segment)
            if place.offset < ends.get(place.segment, 0) or (taken and taken.within(place.offset, end)):
                raise ValueError("a blob lies on another")
            ends[place.segment] = end

    def _blob(self, key: CheckpointKey, identity: BlobIdentity, place: BlobPlace) -> Blob:
        """The blob of a place, which has been checked."""
        blob = self._blobs.get(place)
        if blob is None:
            where = BlobKey(key.device, key.domain, identity.digest, identity.length)
            blob = self._store.blobs.place(where, identity.variant, place.segment, place.offset, load=0)
            self._blobs[place] = blob
            self.taken.setdefault(place.segment, RangeSet()).add(place.offset, blob.slot.end)
        return blob


def _rows(described: CheckpointDescription) -> Iterator[tuple[BlobIdentity, BlobPlace | None]]:
    return zip(described.identities, described.places, strict=True)


def number_uses(store: ContentStore, uses: Mapping[CheckpointKey, tuple[int, float]]) -> None:
    """Put restored checkpoints in the order of their last use: by its number, and where that is not known by its time.

    They are numbered anew, so that numbers stay small whatever was written down.
    """
    for key in sorted(uses, key=lambda key: uses[key]):
        checkpoint = store.checkpoints[key]
        store.use(checkpoint, checkpoint.last_used)
