"""GetMap: what lies where on a device, page by page."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from weightd._proto.v1 import inspection_pb2
from weightd_daemon.core.blob_places import BlobPlaces
from weightd_daemon.core.segment_pieces import PieceKind, SegmentPieces
from weightd_daemon.turns import LoopTurn

from .page_users import PageUsers
from .pages import position_of, rows_of, token_of

if TYPE_CHECKING:
    from weightd_daemon.core.catalog import Catalog
    from weightd_daemon.core.principal import Principal
    from weightd_daemon.core.segment_pieces import SegmentPiece
    from weightd_daemon.core.store import ContentStore

    from .sharing_upkeep import SharingUpkeep

_CALL = "GetMap"
_MOST_WORK = 50_000
"""How much is looked at for one page, in blobs and in users of sets: long extents take time, too."""
_STEP_WORK = 20
"""What a step counts beside its blobs."""

_KINDS = {kind: inspection_pb2.MapExtent.Kind.Value(f"KIND_{kind.name}") for kind in PieceKind}


class SegmentMaps:
    """Answers GetMap."""

    def __init__(self, store: ContentStore, catalog: Catalog, upkeep: SharingUpkeep) -> None:
        self._store = store
        self._catalog = catalog
        self._upkeep = upkeep
        self._places = BlobPlaces(store)
        self._catching_up = asyncio.Lock()

    async def page(
        self, who: Principal, request: inspection_pb2.GetMapRequest, device: str
    ) -> inspection_pb2.GetMapResponse:
        """A page of the map of a device, given by its UUID.

        It ends early where the books change while it is made, so it is of one revision.
        Errors: InvalidReferenceError.
        """
        most = rows_of(request.page_size)
        segment, offset = (int(value) for value in position_of(request.page_token, _CALL, (0, 0)))
        await self._catch_up()
        turn, revision, memory = LoopTurn(), self._store.revision.number, self._store.memories[device]
        response = inspection_pb2.GetMapResponse(device=device, revision=revision)
        page, pieces = _MapPage(response, self._catalog, most), SegmentPieces(self._store, device, self._places)
        for number, domain in memory.domains().items():
            if number < segment:
                continue
            position = offset if number == segment else 0
            following = pieces.following if who.admin or domain == who.domain else pieces.hidden
            while number in memory.arena(domain) and position < memory.size(number):  # it may go meanwhile
                if page.is_full or self._store.revision.number != revision:
                    response.next_page_token = token_of(_CALL, (number, position))
                    return response
                found, _ = following(number, position)
                page.begin_step(number, memory.size(number))
                for piece in found:
                    if not page.add(piece):
                        break
                    position = piece.end
                    if turn.is_over:
                        await turn.next()
                        if self._store.revision.number != revision:  # then the users of the next piece may be others
                            break
        return response

    async def _catch_up(self) -> None:
        """Wait until everything that has happened is known; it is, until the caller pauses."""
        async with self._catching_up:
            turn = LoopTurn()
            while self._places.behind or self._store.sharing.behind:
                for _ in self._places.catch_up():
                    if turn.is_over:
                        await turn.next()
                await self._upkeep.caught_up()


class _MapPage:
    """A page that is being filled, with at most so many extents."""

    def __init__(self, response: inspection_pb2.GetMapResponse, catalog: Catalog, most: int) -> None:
        self._response = response
        self._users = PageUsers(catalog, response)
        self._most = most
        self._work = 0
        self._segment = 0
        self._last = (-1, 0, 0, 0, 0)
        """Of the last extent the segment, the end, and what the next one must have in common to be one with it."""

    @property
    def is_full(self) -> bool:
        """Whether it is to end here."""
        return len(self._response.extents) >= self._most or self._work + self._users.named >= _MOST_WORK

    def begin_step(self, segment: int, size: int) -> None:
        """What follows is of this segment, of `size` bytes."""
        if not self._response.segments or self._segment != segment:
            self._response.segments.add(segment=segment, size_bytes=size)
        self._segment = segment
        self._work += _STEP_WORK

    def add(self, piece: SegmentPiece) -> bool:
        """Add a piece, which follows the last one; returns False where there is no room for another extent."""
        extents, kind = self._response.extents, _KINDS[piece.kind]
        users = self._users.index(piece.users) if piece.kind is PieceKind.BLOBS else 0
        self._work += piece.blobs
        if self._last == (self._segment, piece.offset, kind, users, piece.load):
            extents[-1].length += piece.end - piece.offset
            extents[-1].blobs += piece.blobs
        elif len(extents) < self._most:
            extents.add(
                segment=self._segment, offset=piece.offset, length=piece.end - piece.offset, kind=kind,
                blobs=piece.blobs, users=users, load=piece.load,
            )  # fmt: skip
        else:
            return False
        self._last = (self._segment, piece.end, kind, users, piece.load)
        return True
