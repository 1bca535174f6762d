"""What each byte of a segment is used for, as pieces that cover it without a gap."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, NamedTuple

from .arena import slot_bytes
from .blob_places import PART_BYTES
from .ranges import gaps

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .blob import Blob
    from .blob_places import BlobPlaces
    from .sharing import BlobUsers
    from .store import ContentStore


class PieceKind(enum.Enum):
    """What is there; see `MapExtent.Kind` in protos/weightd/v1/inspection.proto."""

    BLOBS = "blobs"
    HOLE = "hole"
    HOLLOW = "hollow"
    LEAVING = "leaving"
    IN_FLIGHT = "in_flight"
    SET_ASIDE = "set_aside"
    OTHERS = "others"


class SegmentPiece(NamedTuple):
    """Bytes [offset, end) of a segment, all of one kind and with the same users.

    `blobs` counts the blobs that begin there. `users` is None but for blobs that checkpoints use: those without are
    kept by a load that relies on them, or will be freed in a moment, and are not counted. `load` is the number of the
    load that bytes in flight are granted to, else 0.
    """

    offset: int
    end: int
    kind: PieceKind
    blobs: int = 0
    users: BlobUsers | None = None
    load: int = 0


class SegmentPieces:
    """Says of the segments of one device what is where, a part at a time.

    It is right when `places` and the sharing index have caught up; until then, blobs lack their users.
    """

    def __init__(self, store: ContentStore, device: str, places: BlobPlaces) -> None:
        self._store = store
        self._memory = store.memories[device]
        self._places = places

    def following(self, segment: int, start: int) -> tuple[list[SegmentPiece], int]:
        """The pieces from `start` on, at least one, and where they end. It is a step of at most some 4,000 blobs."""
        arena = self._memory.arena(self._memory.domain_of(segment))
        blobs, end = self._places.following(segment, start, arena.size(segment))
        unused = arena.unused(segment, start, end)
        found: list[SegmentPiece] = self._blobs(blobs, start)
        for kind, ranges in (
            (PieceKind.HOLE, unused.holes),
            (PieceKind.HOLLOW, unused.hollow),
            (PieceKind.LEAVING, unused.leaving),
            (PieceKind.SET_ASIDE, unused.set_aside),
        ):
            found += [SegmentPiece(low, high, kind) for low, high in ranges]
        found.sort(key=_offset)
        for low, high in gaps(start, end, [piece[:2] for piece in found]):
            found += self._granted(segment, low, high)
        found.sort(key=_offset)
        return found, end

    def hidden(self, segment: int, start: int) -> tuple[list[SegmentPiece], int]:
        """As `following`, for somebody who may not see what the segment holds: only where it has memory."""
        arena = self._memory.arena(self._memory.domain_of(segment))
        end = min(arena.size(segment), start + PART_BYTES)
        hollow = arena.unused(segment, start, end).hollow
        found: list[SegmentPiece] = [SegmentPiece(low, high, PieceKind.HOLLOW) for low, high in hollow]
        found += [SegmentPiece(low, high, PieceKind.OTHERS) for low, high in gaps(start, end, hollow)]
        return sorted(found, key=_offset), end

    def _blobs(self, blobs: Iterable[Blob], start: int) -> list[SegmentPiece]:
        """Blobs that follow each other and have the same users, as one piece each."""
        found: list[SegmentPiece] = []
        low, high, count = start, -1, 0
        users: BlobUsers | None = None
        of = self._store.sharing.of
        for blob in blobs:
            offset, used_by = blob.offset, of(blob)
            if offset != high or used_by is not users:
                if high > low:
                    found.append(SegmentPiece(low, high, PieceKind.BLOBS, count, users))
                low, users, count = max(offset, start), used_by, 0
            count += offset >= start
            high = offset + slot_bytes(blob.key.length)
        if high > low:
            found.append(SegmentPiece(low, high, PieceKind.BLOBS, count, users))
        return found

    def _granted(self, segment: int, start: int, end: int) -> list[SegmentPiece]:
        """What open loads were granted of [start, end). No checkpoint uses the blobs in the rest."""
        granted = sorted(
            (max(extent.offset, start), min(extent.end, end), load)
            for load in self._store.open_loads
            for extent in self._memory.granted(load)
            if extent.segment == segment and extent.offset < end and extent.end > start
        )
        found: list[SegmentPiece] = [
            SegmentPiece(low, high, PieceKind.IN_FLIGHT, load=load) for low, high, load in granted
        ]
        rest = gaps(start, end, [extent[:2] for extent in granted])
        return found + [SegmentPiece(low, high, PieceKind.BLOBS) for low, high in rest]


def _offset(piece: SegmentPiece) -> int:
    return piece.offset
