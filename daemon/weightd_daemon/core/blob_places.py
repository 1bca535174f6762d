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
"""Blobs that are entered or struck out in one step."""
_CHUNK_BITS = 20
"""A segment is looked at by the MiB, in which at most 4,096 blobs begin: they are sorted when somebody asks."""

_Chunk = dict[int, "Blob"]


class BlobPlaces:
    """The blobs that resident checkpoints use, by segment and offset.

    Until it has caught up, blobs of checkpoints that have come since are missing. Those of checkpoints that have gone
    are never returned. Each tensor takes some 70 bytes, which `checkpoint.BYTES_OF_TENSOR` covers.
    """

    def __init__(self, store: ContentStore) -> None:
        self._store = store
        self._known: dict[CheckpointKey, Checkpoint] = {}
        self._chunks: dict[int, dict[int, _Chunk]] = {}
        """By segment and MiB of it, the blobs that begin there, by offset."""

    @property
    def behind(self) -> bool:
        """Whether `catch_up` has anything to do."""
        return self._known != self._store.checkpoints

    def catch_up(self) -> Iterator[None]:
        """Enter what has come and strike out what has gone, in steps, until there is no more.

        One call has to end before the next one begins.
        """
        there = self._store.checkpoints
        while self.behind:
            gone = [checkpoint for key, checkpoint in self._known.items() if there.get(key) is not checkpoint]
            come = [checkpoint for key, checkpoint in there.items() if self._known.get(key) is not checkpoint]
            for checkpoint in gone:
                del self._known[checkpoint.key]
                yield from self._strike(checkpoint)
            for checkpoint in come:
                self._known[checkpoint.key] = checkpoint
                yield from self._enter(checkpoint)

    def following(self, segment: int, start: int, size: int) -> tuple[list[Blob], int]:
        """The next blobs of a segment of `size` bytes that end after `start`, and the end of the part looked at.

        The part ends with a blob, or where the next one may begin. The first blob may begin before `start`.
        """
        chunks = self._chunks.get(segment, {})
        number = start >> _CHUNK_BITS
        chunk = chunks.get(number, {})
        offsets = sorted(chunk)
        at = bisect_left(offsets, start)
        found = [chunk[offset] for offset in offsets[at:]]
        end = number + 1 if chunk else min((later for later in chunks if later > number), default=-1)
        end = size if end < 0 else min(end << _CHUNK_BITS, size)
        before = chunk[offsets[at - 1]] if at else self._last_before(chunks, number)
        if before is not None and before.slot.end > start:
            found.insert(0, before)
        found = [blob for blob in found if blob.references]
        return found, max(end, found[-1].slot.end) if found else end

    def _last_before(self, chunks: dict[int, _Chunk], number: int) -> Blob | None:
        """The last blob that begins before the MiB of that number."""
        earlier = [before for before, chunk in chunks.items() if before < number and chunk]
        chunk = chunks[max(earlier)] if earlier else {}
        return chunk[max(chunk)] if chunk else None

    def _enter(self, checkpoint: Checkpoint) -> Iterator[None]:
        blobs = iter(list(checkpoint.unique.values()))
        while some := list(islice(blobs, _AT_ONCE)):
            for blob in some:
                if blob.references:  # else the checkpoint has gone meanwhile, and something else may lie there
                    chunks = self._chunks.setdefault(blob.segment, {})
                    chunks.setdefault(blob.offset >> _CHUNK_BITS, {})[blob.offset] = blob
            yield

    def _strike(self, checkpoint: Checkpoint) -> Iterator[None]:
        memory = self._store.memories.get(checkpoint.key.device)
        there = memory.domains() if memory is not None else {}
        for segment in checkpoint.segments:
            if segment not in there:
                self._chunks.pop(segment, None)
        blobs = iter(list(checkpoint.unique.values()))
        while some := list(islice(blobs, _AT_ONCE)):
            for blob in some:
                chunks = self._chunks.get(blob.segment, {})
                chunk = chunks.get(blob.offset >> _CHUNK_BITS, {})
                if not blob.references and chunk.get(blob.offset) is blob:
                    del chunk[blob.offset]
                    if not chunk:
                        del chunks[blob.offset >> _CHUNK_BITS]
            yield
