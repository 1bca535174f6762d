"""The map of segments against the books, in every state that the store's own state machine brings about."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import initialize, invariant, rule

from property.test_store import DEVICE, PAGE, PICK, StoreMachine
from support.sealed import sealed_blobs
from weightd_daemon.core import blob_places as blob_places_module
from weightd_daemon.core import segment_pieces as segment_pieces_module
from weightd_daemon.core.blob_places import BlobPlaces
from weightd_daemon.core.segment_pieces import PieceKind, SegmentPiece, SegmentPieces


class MapMachine(StoreMachine):
    """A store of which somebody looks at the map between any two steps, always or now and then."""

    always = False

    def __init__(self) -> None:
        super().__init__()
        self.patch.setattr(blob_places_module, "_AT_ONCE", 1)
        self.patch.setattr(blob_places_module, "_CHUNK_BITS", 11)
        self.patch.setattr(segment_pieces_module, "PART_BYTES", 3 * PAGE)
        self.patch.setattr(blob_places_module, "PART_BYTES", 3 * PAGE)

    @initialize(looked=st.booleans())
    def choose(self, looked: bool) -> None:
        self.always = looked

    def begin_books(self, last_lease: int) -> None:
        super().begin_books(last_lease)
        self.places = BlobPlaces(self.store)

    def catch_up(self) -> None:
        for _ in self.places.catch_up():
            pass
        while self.store.sharing.go_on():
            pass

    @rule(pick=PICK, steps=st.integers(1, 4))
    def begin_to_catch_up(self, pick: int, steps: int) -> None:
        """Somebody begins to catch up, and the rest comes after a change, or somebody else begins anew."""
        catching_up = self.places.catch_up()
        for _ in range(steps):
            next(catching_up, None)
        if pick % 2:
            self.remove(pick)
            self.free_some()
        for _ in catching_up if pick % 3 else ():
            pass

    @rule()
    def look(self) -> None:
        """Everybody who looks sees the books as they are."""
        self.catch_up()
        memory, counted = self.memory, Counter[PieceKind]()
        blobs = 0
        for segment, domain in memory.domains().items():
            whole = self.read_all(segment)
            arena = memory.arena(domain)
            self.is_right(segment, whole)
            assert not (memory.is_frozen(segment) and any(piece.kind is PieceKind.HOLE for piece in whole))
            assert memory.is_frozen(segment) or not any(piece.kind is PieceKind.SET_ASIDE for piece in whole)
            for piece in whole:
                counted[piece.kind] += piece.end - piece.offset
                blobs += piece.blobs
            hollow = sum(piece.end - piece.offset for piece in whole if piece.kind is PieceKind.HOLLOW)
            assert memory.size(segment) - hollow == arena.populated(segment)
            hidden = self.read_all(segment, hidden=True)
            assert {piece.kind for piece in hidden} <= {PieceKind.HOLLOW, PieceKind.OTHERS}
            assert hollow == sum(piece.end - piece.offset for piece in hidden if piece.kind is PieceKind.HOLLOW)
        in_flight = self.store.in_flight_bytes(DEVICE) - sum(one.size for one in self.creating)
        assert counted[PieceKind.IN_FLIGHT] == in_flight
        assert counted[PieceKind.LEAVING] == sum(
            memory.arena(domain).leaving for domain in set(memory.domains().values())
        )
        assert blobs == sum(blob.references > 0 for blob in sealed_blobs(self.store))
        slots = sum(blob.slot.length for blob in sealed_blobs(self.store))
        assert counted[PieceKind.BLOBS] == slots

    @invariant()
    def looked_at(self) -> None:
        """Whoever has not caught up lacks blobs, and sees none that has gone."""
        if not hasattr(self, "store"):
            return
        if self.always:
            self.look()
            known = [
                blob for chunks in self.places._chunks.values() for chunk in chunks.values() for blob in chunk.values()
            ]
            assert set(known) == {blob.number for blob in sealed_blobs(self.store) if blob.references}
        for segment in self.memory.domains():
            shown = [piece for piece in self.read_all(segment) if piece.kind is PieceKind.BLOBS]
            slots = sum(blob.slot.length for blob in sealed_blobs(self.store) if blob.segment == segment)
            assert sum(piece.end - piece.offset for piece in shown) == slots

    def read_all(self, segment: int, *, hidden: bool = False) -> list[SegmentPiece]:
        """The pieces of a whole segment, which cover it without a gap."""
        pieces, size = SegmentPieces(self.store, DEVICE, self.places), self.memory.size(segment)
        found: list[SegmentPiece] = []
        position = 0
        while position < size:
            more, end = (pieces.hidden if hidden else pieces.following)(segment, position)
            assert [piece.offset for piece in more] == [position, *(piece.end for piece in more[:-1])]
            assert more[-1].end == end > position
            found += more
            position = end
        assert position == size
        return found

    def is_right(self, segment: int, whole: list[SegmentPiece]) -> None:
        """Each blob is in a piece with its users; and whoever begins anywhere sees the same."""
        for blob in sealed_blobs(self.store):
            if blob.segment == segment:
                users = {c.key for c in self.store.checkpoints.values() if blob.number in c.unique}
                inside = [piece for piece in whole if piece.end > blob.offset and piece.offset < blob.slot.end]
                assert {piece.kind for piece in inside} == {PieceKind.BLOBS}
                for piece in inside:
                    assert {c.key for c in (piece.users.checkpoints() if piece.users else ())} == users
        for position in range(256, self.memory.size(segment), 7 * 256):
            more, _ = SegmentPieces(self.store, DEVICE, self.places).following(segment, position)
            there = next(piece for piece in whole if piece.offset <= position < piece.end)
            assert (more[0].kind, more[0].users, more[0].load) == (there.kind, there.users, there.load)


TestMap = MapMachine.TestCase
TestMap.settings = settings(max_examples=250, stateful_step_count=50)
