"""Where blobs lie: those of resident checkpoints, segment by segment, in the order of their offsets.

Only maps of the memory ask for that order, so a seal or an eviction does nothing for it: `catch_up` looks for the
checkpoints that have come or gone since it was called last.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .blob import Blob
    from .checkpoint import Checkpoint, CheckpointKey
    from .store import ContentStore

_AT_ONCE = 1000
"""Blobs that are entered in one step."""
_CHUNK_BITS = 20
"""A segment is looked at by the MiB, in which at most 4,096 blobs begin: they are sorted when somebody asks."""

PART_BYTES = 16 << 20
"""Bytes without a blob that are looked at in one step: they may be some 10,000 ranges."""

_Chunk = dict[int, int]
"""Numbers of blobs by offset. Not the blobs: a dictionary of numbers costs no collection of garbage anything."""


class BlobPlaces:
    """The blobs that resident checkpoints use, by segment and offset.

    Until it has caught up, blobs of checkpoints that have come since are missing. Those of checkpoints that have gone
    are never returned. A small blob takes 37 bytes, which `checkpoint.BYTES_OF_TENSOR` covers, one of a MiB 290.
    """

    def __init__(self, store: ContentStore) -> None:
        self._store = store
        self._known: dict[CheckpointKey, list[int]] = {}
        """By checkpoint that was entered, its segments. The record itself would stay in memory when it has gone."""
        self._chunks: dict[int, dict[int, _Chunk]] = {}
        """By segment and MiB of it, what begins there."""
        self._order: dict[int, list[int]] = {}
        """By segment that was asked for since one was added or struck out, the numbers of these MiB, ascending."""

    @property
    def behind(self) -> bool:
        """Whether `catch_up` has anything to do."""
        there = self._store.checkpoints
        return len(self._known) != len(there) or any(not self._is_known(checkpoint) for checkpoint in there.values())

    def catch_up(self) -> Iterator[None]:
        """Enter what has come and strike out what has gone, in steps, until there is no more.

        One call has to end, or to be given up, before the next one begins, which then does again what was not finished.
        """
        while self.behind:
            there = self._store.checkpoints
            come = [checkpoint for checkpoint in there.values() if not self._is_known(checkpoint)]
            gone = {key for key in self._known if key not in there} | {checkpoint.key for checkpoint in come}
            for segment in {segment for key in gone for segment in self._known.get(key, ())}:
                yield from self._sweep(segment)
            for key in gone:
                self._known.pop(key, None)
            for checkpoint in come:
                self._known[checkpoint.key] = checkpoint.segments[:]  # not known yet, but to be swept
                yield from self._enter(checkpoint)
                self._known[checkpoint.key] = checkpoint.segments

    def following(self, segment: int, start: int, size: int) -> tuple[list[Blob], int]:
        """The next blobs of a segment of `size` bytes that end after `start`, and the end of the part looked at.

        The part ends with a blob, or where the next one may begin. The first blob may begin before `start`.
        """
        chunks, order = self._chunks.get(segment, {}), self._ordered(segment)
        number = start >> _CHUNK_BITS
        chunk = chunks.get(number, {})
        offsets = sorted(chunk)
        at, place = bisect_left(offsets, start), bisect_left(order, number)
        numbers = [chunk[offset] for offset in offsets[at:]]
        end = number + 1 if chunk else order[place] if place < len(order) else -1
        end = min(size if end < 0 else end << _CHUNK_BITS, size, start + PART_BYTES)
        last = chunks[order[place - 1]] if place else {}
        before = self._blob(chunk[offsets[at - 1]] if at else last[max(last)] if last else 0)
        found = [before] if before is not None and before.slot.end > start else []
        found += [blob for one in numbers if (blob := self._blob(one)) is not None]
        return found, max(end, found[-1].slot.end) if found else end

    def _blob(self, number: int) -> Blob | None:
        """The blob of a number, if a checkpoint uses it."""
        blob = self._store.blobs.get(number)
        return blob if blob is not None and blob.references else None

    def _ordered(self, segment: int) -> list[int]:
        """The numbers of the MiB of a segment in which blobs begin, ascending."""
        order = self._order.get(segment)
        if order is None and segment in self._chunks:
            order = self._order[segment] = sorted(self._chunks[segment])
        return order or []

    def _enter(self, checkpoint: Checkpoint) -> Iterator[None]:
        blobs = iter(list(checkpoint.unique.values()))
        while some := list(islice(blobs, _AT_ONCE)):
            for blob in some:
                chunks, number = self._chunks.setdefault(blob.segment, {}), blob.offset >> _CHUNK_BITS
                if number not in chunks:
                    chunks[number] = {}
                    self._order.pop(blob.segment, None)
                chunks[number][blob.offset] = blob.number
            yield

    def _sweep(self, segment: int) -> Iterator[None]:
        """Strike out of a segment what no checkpoint uses any more."""
        chunks = self._chunks.get(segment, {})
        for number, chunk in list(chunks.items()):
            for offset, blob in list(chunk.items()):
                if self._blob(blob) is None:
                    del chunk[offset]
            if not chunk:
                del chunks[number]
                self._order.pop(segment, None)
            yield
        if not chunks:
            self._chunks.pop(segment, None)

    def _is_known(self, checkpoint: Checkpoint) -> bool:
        """Whether this very checkpoint was entered: it may have come again, with the same content, at another place."""
        return self._known.get(checkpoint.key) is checkpoint.segments
