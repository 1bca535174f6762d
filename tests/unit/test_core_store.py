"""The store, call by call: admission, room, sharing, refusals. Interleavings: tests/property/test_store.py."""

from __future__ import annotations

import time

import pytest

from weightd.errors import CapacityError, InUseError, NotFoundError
from weightd_daemon.core.blob import OWN_COPY_BELOW, Blob
from weightd_daemon.core.checkpoint import Checkpoint, Content
from weightd_daemon.core.digest import BlobIdentity
from weightd_daemon.core.events import Event, Evicted, Sealed
from weightd_daemon.core.lease import Holder, Lease, Leases
from weightd_daemon.core.manifest import Entry, ManifestFile, content_digest
from weightd_daemon.core.memory import DeviceMemory
from weightd_daemon.core.store import Store

PAGE = 4096
LARGE = OWN_COPY_BELOW
SMALL = PAGE
FILE = (ManifestFile("", "f", None),)


class Books:
    """A store over a device of 64 large tensors whose reclaims are done at once; digests are named by letters."""

    def __init__(self, budget: int = 64 * LARGE) -> None:
        self.events: list[Event] = []
        self.locked: set[int] = set()
        self.store = Store(leases=Leases(lambda lease: lease.number in self.locked), on_event=self.events.append)
        self.segments = 0
        self.memory = self.store.memories["host"] = DeviceMemory(
            budget=budget, page=PAGE, sparse=True, pool_limit=0, create=self.create
        )
        self.now = 0.0

    def create(self, size: int) -> int:
        assert size > 0
        self.segments += 1
        return self.segments

    def open(self, domain: str = "all") -> int:
        return self.store.open_load("host", domain, 1000)

    def reclaim(self) -> None:
        while reclaims := self.memory.take_reclaims():
            for reclaim in reclaims:
                self.memory.reclaimed(reclaim)

    def place(self, load: int, letter: str, length: int = LARGE) -> Blob:
        """A tensor whose bytes equal those of any other with its letter, as a loader brings it."""
        while (extent := self.store.grant(load, length, length)) is None:
            self.reclaim()
        placed, blob = self.store.settle(load, digest(letter), length, extent.segment, extent.offset)
        if placed:
            return blob
        used = self.store.share(load, blob.number, extent.segment, extent.offset)
        assert used is not None
        return used

    def seal(self, load: int, blobs: list[Blob]) -> Checkpoint:
        while pairs := self.store.rechecks(load):
            for blob, other in pairs:
                replaced = self.store.recheck(load, blob.number, other.number, equal=True)
                blobs = [replaced.get(b.number, b) for b in blobs]
        entries = [Entry("", f"t{at}", "U8", (b.length,), 0, b.length) for at, b in enumerate(blobs)]
        name = content_digest(entries, [b.identity for b in blobs], FILE)
        self.now += 1
        checkpoint = self.store.seal(load, Content(name, FILE, tuple(entries), tuple(blobs)), self.now)
        self.reclaim()
        return checkpoint

    def load(self, letters: str, length: int = LARGE, domain: str = "all") -> Checkpoint:
        number = self.open(domain)
        return self.seal(number, [self.place(number, letter, length) for letter in letters])

    def lease(self, checkpoint: Checkpoint) -> Lease:
        lease = self.store.leases.take(checkpoint.key, Holder(1, 4711, 1000, "python serve.py"), self.now)
        self.locked.add(lease.number)
        return lease

    @property
    def evicted(self) -> list[tuple[Checkpoint, str]]:
        return [(event.checkpoint, event.reason) for event in self.events if isinstance(event, Evicted)]


def digest(letter: str) -> bytes:
    return letter.encode() * 16


# -- sharing -----------------------------------------------------------------------------------------------------------


def test_equal_bytes_of_two_checkpoints_are_held_once() -> None:
    books = Books()
    first, second = books.load("abc"), books.load("abd")
    assert len(books.store.blobs()) == 4
    assert (first.exclusive_bytes, first.shared_bytes) == (LARGE, 2 * LARGE)
    assert second.total_bytes == 3 * LARGE
    assert books.memory.used == 4 * LARGE


def test_the_same_content_is_one_checkpoint() -> None:
    books = Books()
    first = books.load("ab")
    assert books.load("ab") is first
    assert books.memory.used == books.store.live_bytes("host") == 2 * LARGE
    assert [type(event) for event in books.events] == [Sealed]
    assert first.last_used == 2.0


def test_domains_share_nothing() -> None:
    books = Books()
    first, second = books.load("a", domain="uid:1"), books.load("a", domain="uid:2")
    assert first is not second
    assert first.key.content_digest == second.key.content_digest
    assert not {*first.segments} & {*second.segments}


def test_large_duplicates_in_one_checkpoint_are_one_blob_and_small_ones_are_not() -> None:
    books = Books()
    large, small = books.load("aaa"), books.load("aaa", SMALL)
    assert len(large.unique) == 1
    assert len(small.unique) == 3
    assert {blob.identity for blob in small.unique.values()} == {BlobIdentity(digest("a"), SMALL, 0)}


def test_a_second_checkpoint_shares_all_the_small_duplicates() -> None:
    books = Books()
    first = books.load("aaa", SMALL)
    second = books.load("aab", SMALL)
    assert len({*first.unique} & {*second.unique}) == 2


def test_known_blobs_are_shared_without_bytes_but_a_small_one_once() -> None:
    books = Books()
    small, large = books.load("a", SMALL), books.load("b")
    (small_number,), (large_number,) = small.unique, large.unique
    tiny, huge = small.unique[small_number], large.unique[large_number]
    load = books.open()
    assert books.store.share_known(load, small_number, tiny.identity) is tiny
    assert books.store.share_known(load, small_number, tiny.identity) is None
    assert books.store.share_known(load, large_number, huge.identity) is huge
    assert books.store.share_known(load, large_number, huge.identity) is huge
    assert books.store.share_known(load, large_number, tiny.identity) is None
    assert books.store.share_known(load, 999, huge.identity) is None
    assert books.store.share_known(books.open("uid:7"), large_number, huge.identity) is None


def test_different_bytes_of_one_digest_get_variants() -> None:
    books = Books()
    (there,) = books.load("a").unique.values()
    load = books.open()
    extent = books.store.grant(load, LARGE, LARGE)
    assert extent is not None
    placed, candidate = books.store.settle(load, digest("a"), LARGE, extent.segment, extent.offset)
    assert (placed, candidate) == (False, there)
    placed, blob = books.store.settle(load, digest("a"), LARGE, extent.segment, extent.offset, {there.number})
    assert (placed, blob.variant, books.store.collisions) == (True, 1, 1)
    assert {b.variant for b in books.seal(load, [blob]).unique.values()} == {1}


@pytest.mark.parametrize("length", [SMALL, LARGE])
def test_what_else_is_being_loaded_does_not_change_a_content_digest(length: int) -> None:
    alone = Books().load("aab", length).key
    books = Books()
    first, second, third = books.open(), books.open(), books.open()
    blobs = {load: [books.place(load, letter, length) for letter in "aab"] for load in (first, second, third)}
    books.store.abort(first)
    sealed = books.seal(third, blobs[third])
    assert sealed.key == alone
    assert books.seal(second, blobs[second]) is sealed
    assert books.store.live_bytes("host") == len(sealed.unique) * length


@pytest.mark.parametrize("equal", [True, False])
def test_a_tensor_that_another_load_seals_meanwhile_is_compared_with_it(equal: bool) -> None:
    """Of small ones, as many give way as there are sealed copies; the others stay as copies of their own."""
    books = Books()
    mine, other = books.open(), books.open()
    copies = [books.place(mine, "a", SMALL) for _ in range(2)]
    (there,) = books.seal(other, [books.place(other, "a", SMALL)]).unique.values()
    assert books.store.rechecks(mine) == [(copies[0], there)]
    replaced = books.store.recheck(mine, copies[0].number, there.number, equal=equal)
    assert replaced == ({copies[0].number: there} if equal else {})
    assert copies[1].variant == (0 if equal else 1)
    assert books.store.collisions == (not equal)
    assert books.store.rechecks(mine) == []


def test_all_copies_of_a_small_tensor_move_to_the_new_variant_together() -> None:
    books = Books()
    mine, other = books.open(), books.open()
    copies = [books.place(mine, "a", SMALL) for _ in range(3)]
    (there,) = books.seal(other, [books.place(other, "a", SMALL)]).unique.values()
    for blob, sealed in books.store.rechecks(mine):
        assert books.store.recheck(mine, blob.number, sealed.number, equal=False) == {}
    assert len({blob.number for blob in copies}) == 3
    assert (there.variant, [blob.variant for blob in copies]) == (0, [1, 1, 1])
    assert (books.store.collisions, books.store.rechecks(mine)) == (1, [])


# -- room --------------------------------------------------------------------------------------------------------------


def test_an_unknown_device_is_not_found() -> None:
    with pytest.raises(NotFoundError, match="host"):
        Books().store.open_load("cuda:0", "all", 0)


def test_what_fits_is_admitted_and_promised() -> None:
    books = Books()
    first, second = books.open(), books.open()
    assert books.store.admit(first, [LARGE] * 40)
    assert not books.store.admit(second, [LARGE] * 40), "may fit if much of it is shared: hash first"
    books.store.abort(first)
    assert books.store.admit(second, [LARGE] * 40)


def test_a_tensor_larger_than_everything_is_refused_before_reading() -> None:
    books = Books()
    with pytest.raises(CapacityError, match="do not fit on host"):
        books.store.admit(books.open(), [65 * LARGE])


def test_what_matches_is_protected_and_only_the_rest_makes_room() -> None:
    books = Books(budget=8 * LARGE)
    old, shared = books.load("abcd"), books.load("efgh")
    load = books.open()
    assert not books.store.admit(load, [LARGE] * 6)
    contents = [(digest(letter), LARGE) for letter in "efghijkl"]
    while (matched := books.store.make_room(load, contents)) is None:
        books.reclaim()
    assert matched == {(digest(letter), LARGE) for letter in "efgh"}
    assert books.evicted == [(old, "capacity")]
    for letter in "efgh":
        blob = books.store.candidate(load, digest(letter), LARGE)
        assert blob is not None
        assert books.store.share(load, blob.number, None, 0) is blob
    assert shared.key in books.store.checkpoints


def test_blobs_that_a_load_relies_on_outlive_their_checkpoint() -> None:
    books = Books()
    (blob,) = books.load("a").unique.values()
    load = books.open()
    assert books.store.share_known(load, blob.number, blob.identity) is blob
    books.store.remove(next(iter(books.store.checkpoints.values())))
    assert books.store.blobs() == [blob]
    books.store.abort(load)
    assert books.store.blobs() == []


def test_nothing_is_evicted_for_a_load_that_cannot_fit() -> None:
    books = Books(budget=8 * LARGE)
    books.load("abcd")
    contents = [(digest(letter), LARGE) for letter in "ijklmnopq"]
    with pytest.raises(CapacityError):
        books.store.make_room(books.open(), contents)
    assert books.evicted == []


def test_a_refusal_states_the_figures() -> None:
    books = Books(budget=8 * LARGE)
    leased, pinned, _ = books.load("aab"), books.load("bcd"), books.load("de")
    pinned.pins.add(1000)
    books.lease(leased)
    with pytest.raises(CapacityError) as caught:
        books.store.make_room(books.open(), [(digest(letter), LARGE) for letter in "stuvwxyz"])
    error = caught.value
    assert (error.requested_bytes, error.free_bytes) == (8 * LARGE, 3 * LARGE)
    assert error.leased_bytes == 2 * LARGE, "a and b"
    assert error.pinned_bytes == 2 * LARGE, "c and d: b is leased"
    assert error.evictable_bytes == LARGE, "e: d is pinned as well"
    assert "\n" not in str(error)


def test_a_grant_evicts_the_least_recently_used_that_nobody_keeps() -> None:
    books = Books(budget=4 * LARGE)
    leased, pinned, old, new = (books.load(letter) for letter in "abcd")
    books.lease(leased)
    pinned.pins.add(1000)
    old.last_used = 99.0
    load = books.open()
    assert books.store.grant(load, LARGE, LARGE) is None
    assert books.memory.reclaiming
    assert books.evicted == [(new, "capacity")]
    books.reclaim()
    assert books.store.grant(load, LARGE, LARGE) is not None
    assert books.store.evictions == 1


def test_a_device_that_is_out_of_memory_makes_the_store_evict() -> None:
    books = Books()
    there = books.load("a")
    working, failing = books.create, iter([True])

    def create(size: int) -> int:
        if next(failing, False):
            raise MemoryError
        return working(size)

    books.memory._create = create
    assert books.store.grant(books.open(), LARGE, LARGE) is not None
    assert books.evicted == [(there, "capacity")]


# -- the ends of things ------------------------------------------------------------------------------------------------


def test_an_aborted_load_leaves_nothing() -> None:
    books = Books()
    load = books.open()
    books.place(load, "a")
    books.place(load, "b", SMALL)
    assert books.store.in_flight_bytes("host") == LARGE + SMALL
    books.store.abort(load)
    books.reclaim()
    assert (books.memory.used, books.memory.segments, books.store.in_flight_bytes("host")) == (0, 0, 0)


def test_removing_what_is_held_names_the_holders_and_changes_nothing() -> None:
    books = Books()
    checkpoint = books.load("ab")
    lease = books.lease(checkpoint)
    with pytest.raises(InUseError, match=r"pid 4711 \(python serve.py\)"):
        books.store.remove(checkpoint)
    assert len(books.store.blobs()) == 2
    books.locked.discard(lease.number)
    assert books.store.remove(checkpoint) == 2 * LARGE
    assert books.evicted == [(checkpoint, "removed")]


def test_removing_gives_up_only_what_nobody_else_needs() -> None:
    books = Books()
    first, second = books.load("abc"), books.load("cd")
    assert books.store.remove(first) == 2 * LARGE
    assert sorted(blob.references for blob in second.unique.values()) == [1, 1]
    books.reclaim()
    assert books.memory.used == 2 * LARGE


def test_many_equal_small_tensors_are_not_quadratic() -> None:
    """Copies of one small tensor, in two loads at the same time: four times as many cost about four times as much."""
    few, many = (copies_cost(count) for count in (5_000, 20_000))
    assert many < 10 * few  # quadratic would be 16


def copies_cost(count: int, size: int = 256) -> float:
    """CPU seconds that two loads of `count` equal tensors cost in the books."""
    books = Books(budget=16 << 20)

    def copies(load: int) -> list[Blob]:
        extent = books.store.grant(load, count * size, count * size)
        assert extent is not None
        blobs = []
        for offset in range(extent.offset, extent.offset + count * size, size):
            placed, blob = books.store.settle(load, digest("a"), size, extent.segment, offset)
            own = blob if placed else books.store.share(load, blob.number, extent.segment, offset)
            assert own is not None
            blobs.append(own)
        return blobs

    began = time.process_time()
    one, two = books.open(), books.open()
    first, second = copies(one), copies(two)
    assert len({blob.number for blob in first}) == count
    sealed = books.seal(one, first)
    ((mine, theirs),) = books.store.rechecks(two)
    replaced = books.store.recheck(two, mine.number, theirs.number, equal=True)
    assert {blob.number for blob in replaced.values()} == set(sealed.unique)
    assert {blob.number for blob in second} == set(replaced)
    assert books.store.rechecks(two) == []
    return time.process_time() - began
