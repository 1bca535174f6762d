"""Pages of a device's map, made in this process from books that are full."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from support.filled import BLOBS, DEVICES, WHO, Filled
from weightd._proto.v1 import inspection_pb2
from weightd.errors import InvalidReferenceError
from weightd_daemon.core import blob_places as blob_places_module
from weightd_daemon.core.checkpoint import CheckpointKey, Content
from weightd_daemon.core.loading import StoreTransaction
from weightd_daemon.core.manifest import ContentFile, ContentTensor
from weightd_daemon.core.principal import Principal
from weightd_daemon.core.ranges import RangeSet
from weightd_daemon.inspection import segment_map as segment_map_module
from weightd_daemon.inspection.pages import token_of
from weightd_daemon.inspection.segment_map import SegmentMaps
from weightd_daemon.turns import LoopTurn

DEVICE = DEVICES[0]
PAGE = 4096
STRANGER = Principal(2000, admin=False, domain="uid:2000")
ADMIN = Principal(0, admin=True, domain="uid:0")
MapExtent = inspection_pb2.MapExtent


class Books(Filled):
    """Ten checkpoints on one device, of which the first shares with a small one, and a load that has begun."""

    def __init__(self) -> None:
        super().__init__(0)
        for number in range(10):
            self.add(DEVICE, number)
        self.load = StoreTransaction(self.store, DEVICE, "", 1000)
        self.granted = self.load.grant(5 * PAGE, 5 * PAGE)
        small = StoreTransaction(self.store, DEVICE, "", 1000)
        blobs = [blob for number in (3, 4) if (blob := small.candidate(f"0-{number}".encode().ljust(16), PAGE))]
        for blob in blobs:
            small.share(blob.number, None, 0)
        entries = tuple(ContentTensor("", f"t{at}", "U8", (PAGE,), 0, PAGE) for at in range(2))
        small.seal(Content("sha256:" + "f" * 64, (ContentFile("", "f", None),), entries, tuple(blobs)), 0.0)
        small.end()
        self.maps = SegmentMaps(self.store, self.catalog, self.sharing)

    async def all_pages(
        self, size: int = 0, who: Principal = WHO, token: str = ""
    ) -> list[inspection_pb2.GetMapResponse]:
        found = []
        while True:
            request = inspection_pb2.GetMapRequest(page_size=size, page_token=token)
            found.append(await self.maps.page(who, request, DEVICE))
            token = found[-1].next_page_token
            if not token:
                return found

    def pages(self, size: int = 0, who: Principal = WHO, token: str = "") -> list[inspection_pb2.GetMapResponse]:
        return asyncio.run(self.all_pages(size, who, token))


@pytest.fixture
def books() -> Books:
    return Books()


def all_extents(pages: list[inspection_pb2.GetMapResponse]) -> list[inspection_pb2.MapExtent]:
    return [extent for page in pages for extent in page.extents]


def covered(pages: list[inspection_pb2.GetMapResponse]) -> dict[int, int]:
    """The bytes that extents cover, by segment: they follow each other without a gap."""
    ends: dict[int, int] = {}
    for extent in all_extents(pages):
        assert ends.get(extent.segment, 0) == extent.offset
        assert extent.length > 0
        ends[extent.segment] = extent.offset + extent.length
    assert list(ends) == sorted(ends)
    return ends


def named(pages: list[inspection_pb2.GetMapResponse]) -> Iterator[tuple[int, int, int, list[str]]]:
    """Segment, offset, number of blobs and the names of their users, of each extent of blobs."""
    for page in pages:
        for extent in page.extents:
            if extent.kind == MapExtent.KIND_BLOBS:
                users = [page.checkpoints[at] for at in page.users[extent.users].checkpoints]
                yield extent.segment, extent.offset, extent.blobs, [user.name or user.content_digest for user in users]


def test_the_map_says_who_uses_what(books: Books) -> None:
    pages = books.pages()
    assert len(pages) == 1
    page = pages[0]
    assert (page.device, page.revision) == (DEVICE, books.store.revision.number)
    memory = books.store.memories[DEVICE]
    sizes = {segment: memory.size(segment) for segment in memory.domains()}
    assert covered(pages) == sizes == {one.segment: one.size_bytes for one in page.segments}
    kinds = [extent.kind for extent in page.extents]
    assert kinds.count(MapExtent.KIND_IN_FLIGHT) == 1
    assert next(e for e in page.extents if e.kind == MapExtent.KIND_IN_FLIGHT).load == books.load.number
    first = books.store.checkpoints[next(iter(books.store.checkpoints))].segments[0]
    shared = [found[1:] for found in named(pages) if found[0] == first]
    assert shared == [
        (0, 3, ["n0"]),
        (3 * PAGE, 2, ["n0", "sha256:" + "f" * 64]),
        (5 * PAGE, BLOBS - 5, ["n0"]),
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_pages_together_are_the_map(books: Books, size: int) -> None:
    whole = books.pages()
    pages = books.pages(size)
    assert all(len(page.extents) <= size for page in pages)
    assert all_extents(pages)[0].offset == 0
    assert covered(pages) == covered(whole)
    assert list(named(pages)) == list(named(whole))
    assert {page.revision for page in pages} == {whole[0].revision}


def test_a_page_ends_after_so_much_work(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = books.pages()
    monkeypatch.setattr(segment_map_module, "_MOST_WORK", 40)
    pages = books.pages()
    assert len(pages) > 5
    assert covered(pages) == covered(whole)
    assert sum(extent.blobs for extent in all_extents(pages)) == sum(extent.blobs for extent in all_extents(whole))


def test_whoever_goes_on_after_a_change_gets_the_rest_as_it_is_now(books: Books) -> None:
    token = (books.pages(12))[0].next_page_token
    before = all_extents([(books.pages(12))[0]])[-1]
    for name in ("n1", "n8"):
        checkpoint = books.catalog.find(WHO, name)
        books.held = False
        for lease in books.store.leases_of(checkpoint):
            books.store.leases.end(lease.number)
        books.catalog.remove(WHO, name)
    books.add(DEVICE, 77)
    rest = books.pages(12, token=token)
    assert rest[0].revision != 0
    first = rest[0].extents[0]
    assert (first.segment, first.offset) >= (before.segment, before.offset + before.length)
    names = [name for *_, users in named(rest) for name in users]
    assert "n77" in names
    assert "n8" not in names


def test_a_page_is_of_one_revision(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two steps of a page something changes: the page ends there, and the next one is of another revision."""
    books.pages()
    numbers = iter(range(100, 120))

    async def change(_: LoopTurn) -> None:
        for number in itertools.islice(numbers, 1):
            books.add(DEVICE, number)

    monkeypatch.setattr(LoopTurn, "is_over", property(lambda _: True))
    monkeypatch.setattr(LoopTurn, "next", change)
    pages = books.pages()
    assert [page.revision for page in pages[1:]] == [books.store.revision.number] * (len(pages) - 1)
    assert pages[0].revision < pages[1].revision
    assert covered(pages) == covered(books.pages())


def test_users_are_those_of_one_revision(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a page still has to add when a checkpoint goes has other users by then: it ends before that."""
    whole = books.pages()
    small = books.store.checkpoints[CheckpointKey(DEVICE, "", "sha256:" + "f" * 64)]
    changes = [lambda: books.store.evict(small, "removed")]

    async def change(_: LoopTurn) -> None:
        if changes:
            changes.pop()()
            await books.sharing.caught_up()

    with monkeypatch.context() as at_once:
        at_once.setattr(LoopTurn, "is_over", property(lambda _: True))
        at_once.setattr(LoopTurn, "next", change)
        pages = books.pages()
    assert pages[0].revision == whole[0].revision
    assert [one for one in named(whole) if one in list(named(pages[:1]))] == list(named(pages[:1]))
    assert {page.revision for page in pages[1:]} == {books.store.revision.number}
    assert covered(pages) == covered(books.pages())


def test_a_stranger_sees_how_much_and_nothing_else(books: Books) -> None:
    pages = books.pages(who=STRANGER)
    assert {extent.kind for extent in all_extents(pages)} == {MapExtent.KIND_OTHERS}
    assert not any(page.users or page.checkpoints for page in pages)
    assert not any(extent.blobs or extent.load for extent in all_extents(pages))
    assert covered(pages) == covered(books.pages())
    assert len(all_extents(pages)) == len(covered(pages))
    assert list(named(books.pages(who=ADMIN))) == list(named(books.pages()))


def test_to_look_changes_nothing(books: Books) -> None:
    def state() -> Any:
        store = books.store
        return (
            [(one.key, one.used, one.last_used) for one in store.index.by_use()],
            [(lease.number, lease.checkpoint) for lease in store.leases],
            store.revision.number,
            {segment: list(memory.arena(domain).free_ranges(segment)) for segment, domain in memory.domains().items()},
            store.uses,
        )

    memory = books.store.memories[DEVICE]
    before = state()
    books.pages()
    books.pages(2, who=STRANGER)
    assert state() == before


def test_what_is_set_aside_is_shown(books: Books) -> None:
    memory, taken = books.store.memories[DEVICE], RangeSet()
    taken.add(PAGE, 2 * PAGE)
    memory.quarantine = True
    memory.adopt("", 1000, 4 * PAGE, taken, [], frozen=False)
    memory.adopt("", 1001, 4 * PAGE, taken, [(2 * PAGE, 3 * PAGE)], frozen=True)
    found = [extent for extent in all_extents(books.pages()) if extent.segment >= 1000]
    assert [(e.offset // PAGE, e.length // PAGE, e.kind) for e in found if e.segment == 1000] == [
        (0, 1, MapExtent.KIND_SET_ASIDE), (1, 1, MapExtent.KIND_BLOBS), (2, 2, MapExtent.KIND_SET_ASIDE),
    ]  # fmt: skip
    memory.quarantine = False
    memory.adopt("", 1002, 4 * PAGE, taken, [(2 * PAGE, 3 * PAGE)], frozen=True)
    found = [extent for extent in all_extents(books.pages()) if extent.segment == 1002]
    assert [(e.offset // PAGE, e.length // PAGE, e.kind) for e in found] == [
        (0, 1, MapExtent.KIND_SET_ASIDE), (1, 1, MapExtent.KIND_BLOBS), (2, 1, MapExtent.KIND_HOLLOW),
        (3, 1, MapExtent.KIND_SET_ASIDE),
    ]  # fmt: skip


@pytest.mark.parametrize("position", [(0, 13), (5, 1 << 50), (1 << 62, 0), (3, 3 * PAGE + 1)])
def test_a_made_up_token_leads_somewhere_or_nowhere(books: Books, position: tuple[int, int]) -> None:
    pages = books.pages(token=token_of("GetMap", position))
    for extent in all_extents(pages):
        assert (extent.segment, extent.offset) >= position
        assert extent.length > 0


def test_a_step_does_not_go_through_the_whole_segment(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    """A map of one tensor a MiB has as many steps as the segment has MiB."""
    monkeypatch.setattr(blob_places_module, "_CHUNK_BITS", 12)
    books.pages()
    walks = 0

    class Chunks(dict[int, Any]):
        def __iter__(self) -> Iterator[int]:
            nonlocal walks
            walks += 1
            return super().__iter__()

    chunks = books.maps._places._chunks
    chunks.update({segment: Chunks(found) for segment, found in chunks.items()})
    steps = sum(len(found) for found in chunks.values())
    assert covered(books.pages()) == covered(books.pages(2))
    assert walks <= len(chunks) < steps


def test_a_lost_device_is_empty(books: Books) -> None:
    assert all_extents(books.pages())
    books.store.lose(DEVICE, "it fell off the bus")
    pages = books.pages()
    assert (len(pages), all_extents(pages), pages[0].next_page_token) == (1, [], "")


def test_two_may_look_at_once(books: Books) -> None:
    async def look() -> list[list[inspection_pb2.GetMapResponse]]:
        return await asyncio.gather(*(books.all_pages(size) for size in (1, 2, 0)))

    found = asyncio.run(look())
    assert len({tuple(covered(pages).items()) for pages in found}) == 1


def test_pages_have_limits(books: Books) -> None:
    with pytest.raises(InvalidReferenceError, match="page_size"):
        books.pages(5001)
    with pytest.raises(InvalidReferenceError, match="page_token"):
        books.pages(token="?")
