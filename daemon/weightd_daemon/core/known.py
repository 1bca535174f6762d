"""What an open load knows of equal bytes, and which of its blobs have to be compared again before it can be sealed.

Two loads that place bytes under one key *contest* it: when one of them is sealed, the other has to recheck its own. So
a load looks again at contested keys only, and only after a load was sealed that contests them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .alike import DuplicateBlobs, DuplicateCandidates

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .blob import Blob, BlobKey, BlobTable


class KnownBlobs:
    """Blobs that one open load has met, by key, and those that it has placed, for deduplication."""

    def __init__(self, blobs: BlobTable, load: int) -> None:
        self._blobs = blobs
        self._load = load
        self._alike: dict[BlobKey, DuplicateCandidates] = {}
        self._alone: dict[BlobKey, Blob] = {}
        """The load's blob of a key that had no other: until an equal digest comes, nothing else is known of it."""
        self._twins: dict[int, DuplicateBlobs] = {}
        self._contested = blobs.contested[load] = {}
        self._unchecked = blobs.unchecked[load] = {}

    def is_new(self, key: BlobKey) -> bool:
        """Whether the load meets the key for the first time, and nothing is there."""
        return key not in self._alike and not self._blobs.of(key)

    def add_alone(self, blob: Blob) -> None:
        """The load has placed the first blob of a new key."""
        self._alone[blob.key] = blob

    def alike(self, key: BlobKey) -> DuplicateCandidates:
        """What the load knows of a key: begun when it first meets it, with the blobs that are sealed by then."""
        alike = self._alike.get(key)
        if alike is None:
            alone = self._alone.pop(key, None)
            there = () if alone else self._blobs.of(key)
            alike = self._alike[key] = DuplicateCandidates(blob for blob in there if blob.sealed)
            if alone:
                alike.add(alone)
                alike.placed = True
        return alike

    def twins(self, blob: Blob) -> DuplicateBlobs:
        """The placed blobs that equal this one, itself among them."""
        twins = self._twins.get(blob.number)
        if twins is None:
            twins = self._twins[blob.number] = DuplicateBlobs(set(), [blob])
        return twins

    def fresh(self, twins: DuplicateBlobs) -> list[Blob]:
        """Sealed blobs that these placed ones have not been compared with."""
        there = self._blobs.of(twins.blobs[0].key)
        return [blob for blob in there if blob.sealed and blob.number not in twins.known]

    def contest(self, key: BlobKey, twins: DuplicateBlobs) -> None:
        """The load is about to place a blob that will be one of `twins`: at the first of its key, see who else has."""
        alike = self.alike(key)
        if alike.placed:
            return
        alike.placed = True
        for other in self._blobs.of(key):
            if not other.sealed and other.load != self._load:
                self._blobs.contested[other.load][key] = None
                self._contested[key] = None
            elif other.number not in twins.known:
                self._contested[key] = None
                self._unchecked[key] = None

    def add(self, blob: Blob, twins: DuplicateBlobs) -> None:
        """The load has placed a blob, one of `twins`."""
        self._twins[blob.number] = twins
        twins.blobs.append(blob)

    @property
    def rechecked(self) -> bool:
        """Whether `to_recheck` has nothing to tell."""
        return not self._unchecked

    def to_recheck(self, most: int) -> list[tuple[Blob, Blob]]:
        """Pairs of a placed and a sealed blob that have to be compared, of so many keys at most.

        None may mean that there are some of other keys: see `rechecked`.
        """
        pairs = []
        for key in [self._unchecked.popitem()[0] for _ in range(min(most, len(self._unchecked)))]:
            placed = (blob for blob in self._blobs.of(key) if blob.load == self._load and not blob.sealed)
            found = [
                (twins.blobs[0], fresh[0])
                for twins in {id(twins): twins for twins in map(self.twins, placed)}.values()
                if (fresh := self.fresh(twins))
            ]
            if found:
                self._unchecked[key] = None  # it may have to be compared with others, too
            pairs += found
        return pairs

    def forget(self, most: int) -> Iterator[None]:
        """Let go of all this, `most` rows a step: of a load of many tensors, these are a million objects."""
        known: tuple[dict[Any, Any], ...] = (self._alone, self._alike, self._twins, self._contested, self._unchecked)
        for rows in known:
            while rows:
                for _ in range(min(most, len(rows))):
                    rows.popitem()
                yield
        del self._blobs.contested[self._load], self._blobs.unchecked[self._load]
