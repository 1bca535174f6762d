"""Pages of pairs that share, and the index that is kept up beside a loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from itertools import combinations, count
from types import SimpleNamespace
from typing import Any

import pytest

from weightd._proto.v1 import inspection_pb2
from weightd.errors import InvalidReferenceError, NotFoundError
from weightd_daemon.core.blob import Blob, BlobKey
from weightd_daemon.core.catalog import Catalog
from weightd_daemon.core.checkpoint import Checkpoint, CheckpointKey
from weightd_daemon.core.lease import LeaseTable
from weightd_daemon.core.limits import UserLimits
from weightd_daemon.core.partners import Partners
from weightd_daemon.core.principal import Principal
from weightd_daemon.core.sharing import Part
from weightd_daemon.core.store import ContentStore
from weightd_daemon.inspection import sharing_list as sharing_list_module
from weightd_daemon.inspection.sharing_list import SharingList
from weightd_daemon.inspection.sharing_upkeep import SharingUpkeep

ADMIN = Principal(0, admin=True, domain="uid:0")
ALICE = Principal(1, admin=False, domain="uid:1")


class Desk:
    """A store of checkpoints without memory; each is a string whose letters are blobs, shared within a domain."""

    def __init__(self) -> None:
        self.store = ContentStore(leases=LeaseTable(lambda _: True), on_event=lambda _: None)
        self.catalog = Catalog(self.store, UserLimits())
        self.upkeep = SharingUpkeep(self.store.sharing)
        self.list = SharingList(self.store, self.catalog, self.upkeep)
        self.blobs: dict[BlobKey, Blob] = {}
        self.numbers = count(1)
        for device in ("host", "GPU-1"):
            self.store.memories[device] = Any  # type: ignore[assignment]  # nothing asks it

    def blob(self, device: str, domain: str, letter: str) -> Blob:
        """A blob that takes 1 byte for "a", 2 for "b", 4 for "c" and so on, so that each sum says what is in it."""
        key = BlobKey(device, domain, letter.encode() * 16, 1 << ord(letter) - ord("a"))
        if key not in self.blobs:
            self.blobs[key] = self.store.blobs.place(key, 0, 1, 0, 0)
            self.blobs[key].holds += 1  # it stays, whoever goes
        return self.blobs[key]

    def add(self, device: str = "host", domain: str = "uid:1", **components: str) -> Checkpoint:
        parts = {
            name: [self.blob(device, domain, letter) for letter in letters] for name, letters in components.items()
        }
        unique = {blob.number: blob for blobs in parts.values() for blob in blobs}
        total = sum(blob.length for blobs in parts.values() for blob in blobs)
        key = CheckpointKey(device, domain, f"sha256:{next(self.numbers):064x}")
        checkpoint = Checkpoint(key, parts, dict.fromkeys(parts, 1), total, 1, 0.0, 0.0, unique=unique)
        self.store.enter(checkpoint)
        return checkpoint

    def page(self, who: Principal = ADMIN, device: str = "", **request: Any) -> inspection_pb2.ListSharingResponse:
        return asyncio.run(self.list.page(who, inspection_pb2.ListSharingRequest(**request), device))


Row = tuple[int, int, int]


def rows(page: inspection_pb2.ListSharingResponse) -> list[Row]:
    """Numbers of both checkpoints, and the bytes that they share."""
    numbers = [int(one.content_digest.removeprefix("sha256:"), 16) for one in page.checkpoints]
    return [(numbers[pair.one], numbers[pair.other], pair.shared_bytes) for pair in page.pairs]


def pages(desk: Desk, size: int, between: Callable[[], object] = lambda: None, **request: Any) -> list[list[Row]]:
    found, token = [], ""
    while True:
        page = desk.page(page_size=size, page_token=token, **request)
        found.append(rows(page))
        if not (token := page.next_page_token):
            return found
        between()


def test_those_with_most_in_common_come_first_on_pages_of_any_size() -> None:
    desk = Desk()
    contents = ["abc", "bcd", "cd", "ad", "abcd", "e", "cd", "b"]
    for content in contents:
        desk.add(**{"": content})
    expected = [
        (one, other, shared)
        for (one, mine), (other, theirs) in combinations(enumerate(contents, 1), 2)
        if (shared := sum(1 << ord(letter) - ord("a") for letter in {*mine} & {*theirs}))
    ]
    expected.sort(key=lambda row: (-row[2], *row[:2]))
    assert [row for page in pages(desk, 0) for row in page] == expected
    for size in range(1, len(expected) + 2):
        found = pages(desk, size)
        assert [row for page in found for row in page] == expected
        assert {len(page) for page in found[:-1]} <= {size}
    of_third = sorted(
        ((3, other if one == 3 else one, shared) for one, other, shared in expected if 3 in (one, other)),
        key=lambda row: (-row[2], row[1]),
    )
    reference = f"sha256:{3:064x}"
    for size in (1, 2, 3, 0):
        assert [row for page in pages(desk, size, reference=reference) for row in page] == of_third


def test_what_comes_and_goes_between_pages_moves_no_other_pair() -> None:
    desk = Desk()
    there = [desk.add(**{"": content}) for content in ("abc", "bc", "c", "ab", "b")]
    before = [row for page in pages(desk, 0) for row in page]
    desk.add(**{"": "c"})
    changes = [lambda: desk.add(**{"": "abc"}), lambda: desk.store.evict(there[-1], "removed")]
    found = [row for page in pages(desk, 3, lambda: changes.pop()() if changes else None) for row in page]
    stayed = [row for row in before if 5 not in row[:2]]
    assert [row for row in found if row in stayed] == stayed
    assert len(set(found)) == len(found)


def test_pairs_have_what_only_they_use_and_their_components() -> None:
    desk = Desk()
    desk.add(vae="ab", unet="bc")
    desk.add(vae="b", te="a")
    desk.add(**{"": "ad"})
    desk.add("GPU-1", vae="ab")
    desk.add(domain="uid:2", vae="ab")
    page = desk.page()
    found = [
        (*row, pair.only_bytes, [(part.one, part.other, part.shared_bytes) for part in pair.components])
        for row, pair in zip(rows(page), page.pairs, strict=True)
    ]
    assert found[0][:4] == (1, 2, 3, 2)
    assert sorted(found[0][4]) == [("unet", "vae", 2), ("vae", "te", 1), ("vae", "vae", 2)]
    assert found[1:] == [(1, 3, 1, 0, [("vae", "", 1)]), (2, 3, 1, 0, [("te", "", 1)])]
    assert {pair.device for pair in page.pairs} == {"host"}
    plain = Desk()
    plain.add(**{"": "a"})
    plain.add(**{"": "a"})
    assert not plain.page().pairs[0].components


def test_pairs_are_counted_once_while_nothing_comes_or_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk()
    there = [desk.add(**{"": content}) for content in ("abc", "abc", "bc", "c", "c")]
    desk.add(domain="uid:2", **{"": "abc"})
    desk.add(domain="uid:2", **{"": "abc"})
    counted = 0

    class Counting(Partners):
        def count(self) -> Iterator[None]:
            nonlocal counted
            counted += 1
            return super().count()

    monkeypatch.setattr(sharing_list_module, "Partners", Counting)

    def counts(who: Principal = ADMIN, **request: Any) -> int:
        nonlocal counted
        counted = 0
        desk.page(who, **request)
        return counted

    reference = there[0].key.content_digest
    token, token_of_alice = desk.page(page_size=1).next_page_token, desk.page(ALICE, page_size=1).next_page_token
    assert counts(page_size=1) == 0
    assert counts(page_size=1, page_token=token) > 0, "from here on, more than a page is kept"
    for _ in range(4):
        page = desk.page(page_size=1, page_token=token)
        token = page.next_page_token
    assert counts(page_size=1, page_token=token) == 0
    assert counts(reference=reference) > 0
    assert counts(reference=reference) == 0
    desk.store.use(there[0], 1.0)
    desk.catalog.set(ALICE, "tuned", reference)
    assert counts(page_size=1, page_token=token) == 0, "an attach or a name changes no pair"
    assert "tuned" in [name.name for name in desk.page(reference=reference).checkpoints]
    assert rows(desk.page(ALICE, page_size=1, page_token=token_of_alice)) == [(1, 3, 6)]
    desk.store.evict(there[1], "removed")
    assert counts(page_size=1, page_token=token) > 0
    assert [row[:2] for row in rows(desk.page())] == [(6, 7), (1, 3), (1, 4), (1, 5), (3, 4), (3, 5), (4, 5)]
    desk.store.memories["host"] = SimpleNamespace(lose=lambda _: None)  # type: ignore[assignment]  # all that is asked
    desk.store.lose("host", "it fell")
    assert rows(desk.page()) == []


def test_few_lists_of_pairs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk()
    for checkpoint in [desk.add(**{"": "a"}) for _ in range(8)]:
        desk.page(reference=checkpoint.key.content_digest)
    assert len(desk.list._known) == sharing_list_module._KNOWN
    monkeypatch.setattr(sharing_list_module, "_KEPT", 3)
    whole = rows(desk.page())
    assert [row for page in pages(desk, 1) for row in page] == whole


def test_components_that_share_in_too_many_ways_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also few of them, if their names are long: what a page takes has a bound."""
    short, long = {f"c{at}": "a" for at in range(300)}, {"c" * 1000 + f"{at}": "a" for at in range(30)}
    for many, one_pair in (short, 10_000), (long, 40_000):
        desk = Desk()
        desk.add(**many)
        desk.add(**many)
        desk.add(vae="a")
        first, *rest = desk.page().pairs
        assert (first.shared_bytes, len(first.components)) == (1, 0)
        assert [len(pair.components) for pair in rest] == [len(many)] * 2
        whole = [row for page in pages(desk, 0) for row in page]
        with monkeypatch.context() as small:
            small.setattr(sharing_list_module, "_MOST_OF_PAGE", one_pair)
            assert pages(desk, 0) == [whole[:2], whole[2:]]


def test_a_checkpoint_of_many_components_is_counted_in_short_steps() -> None:
    desk = Desk()
    many = {f"c{number}": "a" for number in range(3000)}
    one, other = desk.add(**many), desk.add(**many)
    asyncio.run(desk.upkeep.caught_up())
    sharer = desk.store.sharing.sharer(other)
    assert sharer is not None
    asked = 0

    class Parts(list[Part]):
        def index(self, *arguments: Any) -> int:
            nonlocal asked
            asked += 1
            return super().index(*arguments)

    users = desk.store.sharing.of(one.components["c0"][0])
    assert users is not None
    users.parts = Parts(users.parts)
    for later in (False, True):
        asked = 0
        for _ in Partners(sharer, later=later).count():
            asked = 0
        assert asked <= 1, "to find each part among all takes the square of them"


def test_each_sees_what_it_may_see_of_the_device_that_it_names() -> None:
    desk = Desk()
    for device, domain in (("host", "uid:1"), ("host", "uid:2"), ("GPU-1", "uid:1")):
        for _ in range(2):
            desk.add(device, domain, **{"": "a"})
    assert rows(desk.page()) == [(1, 2, 1), (3, 4, 1), (5, 6, 1)]
    assert rows(desk.page(ALICE)) == [(1, 2, 1), (5, 6, 1)]
    assert rows(desk.page(ALICE, "GPU-1")) == [(5, 6, 1)]
    with pytest.raises(NotFoundError):
        desk.page(ALICE, reference=f"sha256:{3:064x}")


def test_a_page_is_named_by_what_is_called_first() -> None:
    desk = Desk()
    one = desk.add(**{"": "a"})
    desk.add(**{"": "a"})
    desk.catalog.set(ALICE, "tuned", one.key.content_digest)
    desk.catalog.set(ALICE, "/models/a", one.key.content_digest)
    page = desk.page()
    assert [name.name for name in page.checkpoints] == ["tuned", ""]
    assert page.revision == desk.store.revision.number
    desk.catalog.set(ALICE, "base", one.key.content_digest)
    assert desk.page().revision > page.revision


@pytest.mark.parametrize("request_", [{"page_size": 5001}, {"page_size": -1}, {"page_token": "AAAA"}])
def test_a_page_that_cannot_be_had_is_refused(request_: dict[str, Any]) -> None:
    with pytest.raises(InvalidReferenceError):
        Desk().page(**request_)


def run(steps: Callable[[Desk], Awaitable[None]]) -> None:
    async def within() -> None:
        desk = Desk()
        desk.upkeep.begin()
        try:
            await steps(desk)
        finally:
            await desk.upkeep.close()

    asyncio.run(within())


async def passes(until: Callable[[], bool]) -> None:
    """Let the loop go on until something is so."""
    async with asyncio.timeout(60):
        while not until():  # noqa: ASYNC110  # nothing tells of a step of the index
            await asyncio.sleep(0)


def test_the_index_catches_up_when_nobody_asks() -> None:
    async def steps(desk: Desk) -> None:
        one = desk.add(**{"": "ab"})
        assert desk.store.sharing.sharer(one) is None
        await passes(lambda: not desk.store.sharing.behind)
        assert desk.store.sharing.exclusive_bytes(one) == 3
        desk.store.evict(one, "removed")
        await passes(lambda: desk.store.sharing.sharer(one) is None)

    run(steps)


def test_the_index_does_not_change_while_somebody_reads_it() -> None:
    async def steps(desk: Desk) -> None:
        one = desk.add(**{"": "ab"})
        async with desk.upkeep.still() as index:
            desk.add(**{"": "a"})
            for _ in range(100):
                await asyncio.sleep(0)
            assert index.exclusive_bytes(one) == 3
            waiting = asyncio.ensure_future(desk.upkeep.caught_up())
            await asyncio.sleep(0)
            assert not waiting.done()
        await waiting
        assert desk.store.sharing.exclusive_bytes(one) == 2

    run(steps)


def test_a_reader_that_is_cancelled_holds_nobody_up() -> None:
    async def steps(desk: Desk) -> None:
        desk.add(**{"": "ab"})
        entered = asyncio.Event()

        async def read() -> None:
            async with desk.upkeep.still():
                entered.set()
                await asyncio.Event().wait()

        reader = asyncio.ensure_future(read())
        await entered.wait()
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        await asyncio.wait_for(desk.upkeep.caught_up(), 60)

    run(steps)
