"""The store, call by call: admission, room, sharing, refusals. Interleavings: tests/property/test_store.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import count, pairwise

import pytest

from support.counting import operations
from support.prompt_memory import PromptMemory
from support.sealed import sealed_blobs
from weightd.errors import CapacityError, DeviceAbsentError, DeviceError, InUseError, NotFoundError, ResourceLimitError
from weightd_daemon.core.arena import slot_bytes
from weightd_daemon.core.blob import OWN_COPY_BELOW, Blob
from weightd_daemon.core.checkpoint import Checkpoint, Content
from weightd_daemon.core.digest import BlobIdentity
from weightd_daemon.core.events import CheckpointEvicted, CheckpointSealed, Event
from weightd_daemon.core.lease import Lease, LeasePeer, LeaseTable
from weightd_daemon.core.loading import StoreTransaction
from weightd_daemon.core.manifest import ContentFile, ContentTensor, content_digest
from weightd_daemon.core.store import ContentStore
from weightd_daemon.loader._proto import loader_pb2 as wire
from weightd_daemon.loader.slots import LoaderSlotRow, LoaderSlots

PAGE = 4096
MIB = 1 << 20
LARGE = OWN_COPY_BELOW
SMALL = PAGE
FILE = (ContentFile("", "f", None),)


class Books:
    """A store over a device of 64 large tensors whose reclaims are done at once; digests are named by letters."""

    def __init__(self, budget: int = 64 * LARGE, *, sparse: bool = True) -> None:
        self.events: list[Event] = []
        self.locked: set[int] = set()
        self.store = ContentStore(
            leases=LeaseTable(lambda lease: lease.number in self.locked), on_event=self.events.append
        )
        self.segments = 0
        self.memory = self.store.memories["host"] = PromptMemory(
            budget=budget, page=PAGE, sparse=sparse, pool_limit=0, create=self.create, available=lambda: self.available
        )
        self.available: int | None = None
        self.now = 0.0

    def create(self, size: int) -> int:
        assert size > 0
        self.segments += 1
        return self.segments

    def open(self, domain: str = "all") -> StoreTransaction:
        return StoreTransaction(self.store, "host", domain, 1000)

    def reclaim(self) -> None:
        while reclaims := self.memory.next_reclaims():
            for reclaim in reclaims:
                self.memory.reclaimed(reclaim)

    def place(self, load: StoreTransaction, letter: str, length: int = LARGE) -> Blob:
        """A tensor whose bytes equal those of any other with its letter, as a loader brings it."""
        while (extent := load.grant(length, length)) is None:
            self.reclaim()
        placed, blob = load.settle(digest(letter), length, extent.segment, extent.offset)
        if placed:
            return blob
        used = load.share(blob.number, extent.segment, extent.offset)
        assert used is not None
        return used

    def seal(self, load: StoreTransaction, blobs: list[Blob]) -> Checkpoint:
        """Seal and end a load."""
        checkpoint = self.seal_only(load, blobs)
        load.end()
        self.reclaim()
        return checkpoint

    def seal_only(self, load: StoreTransaction, blobs: list[Blob]) -> Checkpoint:
        """The loader has not put its segments down yet."""
        while pairs := load.rechecks():
            for blob, other in pairs:
                replaced = load.recheck(blob.number, other.number, equal=True)
                blobs = [replaced.get(b.number, b) for b in blobs]
        entries = [ContentTensor("", f"t{at}", "U8", (b.length,), 0, b.length) for at, b in enumerate(blobs)]
        name = content_digest(entries, [b.identity for b in blobs], FILE)
        self.now += 1
        return load.seal(Content(name, FILE, tuple(entries), tuple(blobs)), self.now)

    def load(self, letters: str, length: int = LARGE, domain: str = "all") -> Checkpoint:
        load = self.open(domain)
        return self.seal(load, [self.place(load, letter, length) for letter in letters])

    def load_into_one_segment(self, letters: str, domain: str = "all") -> Checkpoint:
        load = self.open(domain)
        extent = load.grant(len(letters) * LARGE, len(letters) * LARGE)
        assert extent is not None
        offsets = range(extent.offset, extent.end, LARGE)
        placed = [
            load.settle(digest(letter), LARGE, extent.segment, offset)
            for letter, offset in zip(letters, offsets, strict=True)
        ]
        return self.seal(load, [blob for _, blob in placed])

    def load_known(self, known: str, new: str = "", domain: str = "all") -> Checkpoint:
        """A checkpoint of tensors that are resident, which takes no memory for them, and others."""
        load = self.open(domain)
        blobs = []
        for letter in known:
            candidate = load.candidate(digest(letter), LARGE)
            assert candidate is not None
            blob = load.share(candidate.number, None, 0)
            assert blob is not None
            blobs.append(blob)
        return self.seal(load, blobs + [self.place(load, letter) for letter in new])

    def lease(self, checkpoint: Checkpoint) -> Lease:
        lease = self.store.leases.begin(checkpoint.key, LeasePeer(1, 4711, 1000, "python serve.py"), self.now)
        self.locked.add(lease.number)
        return lease

    def exclusive_bytes(self, checkpoint: Checkpoint) -> int:
        while self.store.sharing.go_on():
            pass
        return self.store.sharing.exclusive_bytes(checkpoint)

    @property
    def evicted(self) -> list[tuple[Checkpoint, str]]:
        return [(event.checkpoint, event.reason) for event in self.events if isinstance(event, CheckpointEvicted)]


def digest(letter: str) -> bytes:
    return letter.encode() * 16


# -- sharing -----------------------------------------------------------------------------------------------------------


def test_equal_bytes_of_two_checkpoints_are_held_once() -> None:
    books = Books()
    first, second = books.load("abc"), books.load("abd")
    assert len(sealed_blobs(books.store)) == 4
    assert (books.exclusive_bytes(first), first.total_bytes) == (LARGE, 3 * LARGE)
    assert second.total_bytes == 3 * LARGE
    assert books.memory.used == 4 * LARGE


def test_the_same_content_is_one_checkpoint() -> None:
    books = Books()
    first = books.load("ab")
    assert books.load("ab") is first
    assert books.memory.used == books.store.live_bytes("host") == 2 * LARGE
    assert [type(event) for event in books.events] == [CheckpointSealed]
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


def test_small_duplicates_whose_other_copies_are_evicted_meanwhile_are_compared_with_the_one_in_use() -> None:
    books = Books()
    first = books.load("aaa", SMALL)
    load = books.open()
    blobs = [books.place(load, "a", SMALL)]  # one of the three, which stays
    books.store.remove(first)
    blobs += [books.place(load, "a", SMALL) for _ in range(2)]
    assert {blob.variant for blob in blobs} == {0}
    assert len({blob.number for blob in blobs}) == 3


def test_known_blobs_are_shared_without_bytes_but_a_small_one_once() -> None:
    books = Books()
    small, large = books.load("a", SMALL), books.load("b")
    (small_number,), (large_number,) = small.unique, large.unique
    tiny, huge = small.unique[small_number], large.unique[large_number]
    load = books.open()
    assert load.share_known(small_number, tiny.identity) is tiny
    assert load.share_known(small_number, tiny.identity) is None
    assert load.share_known(large_number, huge.identity) is huge
    assert load.share_known(large_number, huge.identity) is huge
    assert load.share_known(large_number, tiny.identity) is None
    assert load.share_known(999, huge.identity) is None
    assert books.open("uid:7").share_known(large_number, huge.identity) is None


def test_resident_blobs_are_shared_by_number_and_small_ones_again_only_without_a_twin() -> None:
    books = Books()
    first, twin = books.load("aa", SMALL).unique.values()
    (large,) = books.load("b").unique.values()
    load = books.open()
    assert [load.share_resident(first.number) for _ in range(3)] == [first, twin, first]
    assert [load.share_resident(large.number) for _ in range(2)] == [large, large]
    assert load.share_resident(999) is None
    assert books.open("uid:7").share_resident(large.number) is None
    for checkpoint in list(books.store.checkpoints.values()):
        books.store.remove(checkpoint)
    assert set(sealed_blobs(books.store)) == {first, twin, large}
    load.end()
    assert sealed_blobs(books.store) == []


def test_different_bytes_of_one_digest_get_variants() -> None:
    books = Books()
    (there,) = books.load("a").unique.values()
    load = books.open()
    extent = load.grant(LARGE, LARGE)
    assert extent is not None
    placed, candidate = load.settle(digest("a"), LARGE, extent.segment, extent.offset)
    assert (placed, candidate) == (False, there)
    placed, blob = load.settle(digest("a"), LARGE, extent.segment, extent.offset, {there.number})
    assert (placed, blob.variant, books.store.collisions) == (True, 1, 1)
    assert {b.variant for b in books.seal(load, [blob]).unique.values()} == {1}


@pytest.mark.parametrize("length", [SMALL, LARGE])
def test_what_else_is_being_loaded_does_not_change_a_content_digest(length: int) -> None:
    alone = Books().load("aab", length).key
    books = Books()
    first, second, third = books.open(), books.open(), books.open()
    blobs = {load: [books.place(load, letter, length) for letter in "aab"] for load in (first, second, third)}
    first.end()
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
    assert mine.rechecks() == [(copies[0], there)]
    replaced = mine.recheck(copies[0].number, there.number, equal=equal)
    assert replaced == ({copies[0].number: there} if equal else {})
    assert copies[1].variant == (0 if equal else 1)
    assert books.store.collisions == (not equal)
    assert mine.rechecks() == []


def test_all_copies_of_a_small_tensor_move_to_the_new_variant_together() -> None:
    books = Books()
    mine, other = books.open(), books.open()
    copies = [books.place(mine, "a", SMALL) for _ in range(3)]
    (there,) = books.seal(other, [books.place(other, "a", SMALL)]).unique.values()
    for blob, sealed in mine.rechecks():
        assert mine.recheck(blob.number, sealed.number, equal=False) == {}
    assert len({blob.number for blob in copies}) == 3
    assert (there.variant, [blob.variant for blob in copies]) == (0, [1, 1, 1])
    assert (books.store.collisions, mine.rechecks()) == (1, [])


def test_what_was_evicted_since_a_load_met_its_digest_is_no_candidate_any_more() -> None:
    books = Books()
    (first,) = books.load("a").unique.values()
    other = books.open()
    extent = other.grant(LARGE, LARGE)
    assert extent is not None
    second = books.seal(other, [other.settle(digest("a"), LARGE, *extent[:2], {first.number})[1]])
    load = books.open()
    assert load.candidate(digest("a"), LARGE) is first
    books.store.remove(second)
    extent = load.grant(LARGE, LARGE)
    assert extent is not None
    placed, blob = load.settle(digest("a"), LARGE, *extent[:2], {first.number})
    assert (placed, blob.variant) == (True, 1), "it differs from all that are left"


def test_what_others_have_sealed_between_a_load_s_first_look_and_its_bytes_is_compared() -> None:
    books = Books()
    mine = books.open()
    assert mine.candidate(digest("a"), LARGE) is None
    (there,) = books.load("a").unique.values()
    blob = books.place(mine, "a")
    assert not mine.rechecked
    assert mine.rechecks() == [(blob, there)]
    assert mine.recheck(blob.number, there.number, equal=True) == {blob.number: there}
    assert mine.rechecks() == []
    assert mine.rechecked


def test_bytes_that_differ_from_each_of_several_are_one_collision_with_each_and_one_new_variant() -> None:
    """An outcome that comes twice changes nothing more."""
    books = Books()
    mine, other = books.open(), books.open()
    blob, first = books.place(mine, "a"), books.place(other, "a")
    extent = other.grant(LARGE, LARGE)
    assert extent is not None
    second = other.settle(digest("a"), LARGE, *extent[:2], {first.number})[1]
    books.seal(other, [first, second])
    before = books.store.collisions
    compared = []
    while not mine.rechecked:
        for placed, sealed in mine.rechecks():
            assert placed is blob
            compared.append(sealed)
            for _ in range(2):
                assert mine.recheck(blob.number, sealed.number, equal=False) == {}
    assert {one.number for one in compared} == {first.number, second.number}
    assert (blob.variant, books.store.collisions - before) == (2, 2)


# -- room --------------------------------------------------------------------------------------------------------------


def test_an_unknown_device_is_not_found() -> None:
    with pytest.raises(NotFoundError, match="host"):
        StoreTransaction(Books().store, "cuda:0", "all", 0)


def test_what_fits_is_admitted_and_promised() -> None:
    books = Books()
    first, second = books.open(), books.open()
    assert first.admit([LARGE] * 40)
    assert not second.admit([LARGE] * 40), "may fit if much of it is shared: hash first"
    first.end()
    assert second.admit([LARGE] * 40)


def test_a_tensor_larger_than_everything_is_refused_before_reading() -> None:
    books = Books()
    with pytest.raises(CapacityError, match="do not fit on host"):
        books.open().admit([65 * LARGE])


def test_what_matches_is_protected_and_only_the_rest_makes_room() -> None:
    books = Books(budget=8 * LARGE)
    old, shared = books.load("abcd"), books.load("efgh")
    load = books.open()
    assert not load.admit([LARGE] * 6)
    contents = [(digest(letter), LARGE) for letter in "efghijkl"]
    matched = load.match(Counter(contents).items())
    while not load.make_room():
        books.reclaim()
    assert matched == {(digest(letter), LARGE) for letter in "efgh"}
    assert books.evicted == [(old, "capacity")]
    for letter in "efgh":
        blob = load.candidate(digest(letter), LARGE)
        assert blob is not None
        assert load.share(blob.number, None, 0) is blob
    assert shared.key in books.store.checkpoints


def test_blobs_that_a_load_relies_on_outlive_their_checkpoint() -> None:
    books = Books()
    (blob,) = books.load("a").unique.values()
    load = books.open()
    assert load.share_known(blob.number, blob.identity) is blob
    books.store.remove(next(iter(books.store.checkpoints.values())))
    assert sealed_blobs(books.store) == [blob]
    load.end()
    assert sealed_blobs(books.store) == []


def test_nothing_is_evicted_for_a_load_that_cannot_fit() -> None:
    books = Books(budget=8 * LARGE)
    books.load("abcd")
    contents = [(digest(letter), LARGE) for letter in "ijklmnopq"]
    load = books.open()
    assert load.match(Counter(contents).items()) == set()
    with pytest.raises(CapacityError):
        load.make_room()
    assert books.evicted == []


def test_a_refusal_states_the_figures() -> None:
    books = Books(budget=8 * LARGE)
    leased, pinned, _ = books.load("aab"), books.load("bcd"), books.load("de")
    pinned.pins.add(1000)
    books.lease(leased)
    load = books.open()
    load.match(((digest(letter), LARGE), 1) for letter in "stuvwxyz")
    with pytest.raises(CapacityError) as caught:
        load.make_room()
    error = caught.value
    assert (error.requested_bytes, error.free_bytes) == (8 * LARGE, 3 * LARGE)
    assert error.leased_bytes == 2 * LARGE, "a and b"
    assert error.pinned_bytes == 2 * LARGE, "c and d: b is leased"
    assert error.evictable_bytes == LARGE, "e: d is pinned as well"
    assert "\n" not in str(error)


def test_the_least_recently_used_may_go_first_and_pins_and_leases_stay() -> None:
    books, other = Books(), 7 * LARGE
    books.store.memories["other"] = PromptMemory(
        budget=other, page=PAGE, sparse=True, pool_limit=0, create=books.create
    )
    pinned, first, leased, second, third = (books.load(letter) for letter in "abcde")
    elsewhere = StoreTransaction(books.store, "other", "all", 1000)
    there = elsewhere.seal(Content("empty", FILE, (), ()), 0.0)
    pinned.pins.add(1000)
    books.lease(leased)
    books.store.use(first, 0.0)  # by their numbers, whatever the clock says
    assert list(books.store.evictable("host")) == [second, third, first]
    assert list(books.store.evictable()) == [second, third, there, first]
    assert next(books.store.evictable()) is second


def test_a_grant_evicts_the_least_recently_used_that_nobody_keeps() -> None:
    books = Books(budget=4 * LARGE)
    leased, pinned, old, new = (books.load(letter) for letter in "abcd")
    books.lease(leased)
    pinned.pins.add(1000)
    books.store.use(old, 0.0)  # at a time before all others: a clock was stepped
    load = books.open()
    assert load.grant(LARGE, LARGE) is None
    assert books.memory.reclaiming
    assert books.evicted == [(new, "capacity")]
    books.reclaim()
    assert load.grant(LARGE, LARGE) is not None
    assert books.store.evictions == 1


def test_a_device_that_is_out_of_memory_makes_the_store_evict() -> None:
    books = Books()
    there = books.load("a")
    working, failing = books.create, iter([True])

    def create(size: int) -> int:
        if next(failing, False):
            raise MemoryError
        return working(size)

    books.memory.create = create
    assert books.open().grant(LARGE, LARGE) is not None
    assert books.evicted == [(there, "capacity")]


def test_a_full_device_is_named_in_the_refusal_once_nothing_can_be_evicted() -> None:
    books = Books(sparse=False)
    there = books.load("a")
    books.available = 4096

    def create(size: int) -> int:
        raise MemoryError("4 KiB free on the device")

    books.memory.create = create
    load = books.open()
    assert load.grant(LARGE, LARGE) is None
    assert books.evicted == [(there, "capacity")]
    books.reclaim()
    with pytest.raises(CapacityError, match="the device itself has no room: 4 KiB free on the device") as caught:
        load.grant(LARGE, LARGE)
    assert caught.value.metadata["device_free_bytes"] == "4096"
    assert caught.value.free_bytes == 64 * LARGE


def test_nothing_is_evicted_for_a_device_that_others_have_filled() -> None:
    books = Books(sparse=False)
    books.load("a")
    books.available = LARGE

    def create(size: int) -> int:
        raise MemoryError

    books.memory.create = create
    with pytest.raises(CapacityError, match="the device itself has no room; stop what else uses the device"):
        books.open().grant(3 * LARGE, 3 * LARGE)
    assert books.evicted == []
    assert books.open().grant(2 * LARGE, 2 * LARGE) is None
    assert len(books.evicted) == 1, "that may do"


def test_a_checkpoint_whose_bytes_are_all_shared_is_not_evicted_while_another_brings_bytes() -> None:
    books = Books(budget=4 * LARGE)
    shared, part = books.load("ab"), books.load_known("ab", "c")
    books.load("d")
    load = books.open()
    assert load.grant(LARGE, LARGE) is None
    assert books.evicted == [(part, "capacity")]
    assert shared.key in books.store.checkpoints


def test_whoever_gives_nothing_back_stays() -> None:
    """The bytes of the least recently used are pinned with another, so without it nothing would be won."""
    books = Books(budget=4 * LARGE)
    idle, pinned = books.load("ab"), books.load_known("ab", "c")
    pinned.pins.add(1000)
    last = books.load("d")
    assert books.open().grant(LARGE, LARGE) is None
    assert books.evicted == [(last, "capacity")]
    assert idle.key in books.store.checkpoints


@pytest.mark.parametrize(
    ("wanted", "gone"),
    [(1, "a"), (2, "b"), (3, "ab"), (4, "abc"), (5, "ad"), (6, "bd"), (7, "abd"), (8, "abcd")],
    ids=lambda value: str(value),
)
def test_nobody_goes_for_nothing_once_a_later_one_has_to(wanted: int, gone: str) -> None:
    """a, b and c give 1, 2 and 1; d, which was used last, gives 4: it goes where the others will not do, and spares."""
    books = Books(budget=8 * LARGE)
    there = {name: books.load(letters) for name, letters in zip("abcd", ("p", "qr", "s", "tuvw"), strict=True)}
    contents = [(digest(letter), LARGE) for letter in "ABCDEFGH"[:wanted]]
    load = books.open()
    load.match(Counter(contents).items())
    while not load.make_room():
        books.reclaim()
    assert {name for name, checkpoint in there.items() if (checkpoint, "capacity") in books.evicted} == {*gone}


def test_checkpoints_that_share_all_with_each_other_are_evicted_together() -> None:
    books = Books(budget=3 * LARGE)
    first, second, third = books.load("ab"), books.load_known("b", "c"), books.load_known("ca")
    load = books.open()
    while load.grant(3 * LARGE, 3 * LARGE) is None:
        books.reclaim()
    assert {checkpoint for checkpoint, _ in books.evicted} == {first, second, third}


@pytest.mark.parametrize("lengths", [[682 * MIB + 1] * 10, [1, 1023 * MIB] * 5, [3 << 30, 1, MIB + 1]])
@pytest.mark.parametrize("runs", [1, 2])
@pytest.mark.parametrize("hash_first", [True, False])
@pytest.mark.parametrize("grouped", [1, 3])
def test_what_was_promised_is_enough_wherever_segments_are_cut(
    lengths: list[int], runs: int, hash_first: bool, grouped: int
) -> None:
    """With the least budget that has room, every tensor gets its memory, and so many together lie so."""
    page = 2 * MIB
    store = ContentStore(leases=LeaseTable(lambda _: False), on_event=lambda _: None)
    numbers = count()
    memory = store.memories["GPU"] = PromptMemory(
        budget=page, page=page, sparse=False, pool_limit=0, create=lambda _: next(numbers)
    )
    load = StoreTransaction(store, "GPU", "all", 1000)
    load.match(((bytes([at]) * 16, length), 1) for at, length in enumerate(lengths))

    def has_room() -> bool:
        try:
            return load.make_room(runs) if hash_first else load.admit(lengths, runs)
        except CapacityError:
            return False

    while not has_room():
        memory.budget += page
    for run in range(runs):
        part = lengths[run::runs]
        groups = [part[at : at + grouped] for at in range(0, len(part), grouped)]
        sizes = [sum(map(slot_bytes, group)) for group in groups]
        slots = LoaderSlots(Granting(load), sizes)  # type: ignore[arg-type]  # what slots need of a channel
        for group, size in zip(groups, sizes, strict=True):
            together = LoaderSlotRow(size)
            taken = [slots.allocate(length, together) for length in group]
            assert all(before.end == slot[:2] for before, slot in pairwise(taken))


class Granting:
    """The daemon's end of a loader's channel, as far as slots need it."""

    def __init__(self, load: StoreTransaction) -> None:
        self._load = load

    def call(self, question: wire.ToDaemon) -> wire.ToLoader:
        ends = list(question.grant.ends)
        extent = self._load.grant(ends[-1], question.grant.need, ends)
        assert extent is not None
        return wire.ToLoader(grant=wire.Extent(segment=extent.segment, offset=extent.offset, length=extent.length))


def test_a_load_whose_tensors_are_all_resident_makes_no_room() -> None:
    """Not even where a restart has found more than the budget."""
    books = Books(budget=3 * LARGE)
    books.load("ab")
    books.load("c")
    books.memory.resize(2 * LARGE, 0)
    load = books.open()
    contents = [(digest(letter), LARGE) for letter in "ab"]
    assert load.match(Counter(contents).items()) == {*contents}
    assert load.make_room()
    assert (books.evicted, books.memory.obtainable("all")) == ([], -LARGE)


def test_a_lease_that_ends_while_room_is_looked_for_keeps_nobody_out() -> None:
    """It is held when it is asked what may go, and not any more when the figures of a refusal are reckoned."""
    books = Books(budget=2 * LARGE)
    there = books.load("ab")
    lease = books.lease(there)
    answers = iter([True])
    books.locked = Ending(answers, lease.number)
    load = books.open()
    load.match([((digest("c"), LARGE), 1)])
    while not load.make_room():
        books.reclaim()
    assert books.evicted == [(there, "capacity")]
    assert next(answers, None) is None, "it was asked while it was held"


class Ending(set[int]):
    """The lock of a lease that is there as long as there are answers."""

    def __init__(self, answers: Iterator[bool], *numbers: int) -> None:
        super().__init__(numbers)
        self._answers = answers

    def __contains__(self, number: object) -> bool:
        return super().__contains__(number) and next(self._answers, False)


def test_a_load_that_finds_no_room_on_a_device_that_has_become_absent_hears_so() -> None:
    """Nothing goes there to make room (law 12), so it would be wrong to call that evictable and full."""
    books = Books(budget=2 * LARGE)
    there = books.load("ab")
    load = books.open()
    load.match([((digest("c"), LARGE), 1)])
    books.store.set_absent("host", "it does not answer")
    for ask in (load.make_room, partial(load.grant, LARGE, LARGE)):
        with pytest.raises(DeviceAbsentError, match="device host is absent: it does not answer"):
            ask()
    assert books.evicted == []
    books.store.set_absent("host", "")
    while not load.make_room():
        books.reclaim()
    assert books.evicted == [(there, "capacity")]


def test_a_device_that_lacks_something_else_than_bytes_says_what() -> None:
    class NoDescriptorsError(ResourceLimitError, MemoryError):
        """As of devices/host.py."""

    def create(size: int) -> int:
        raise NoDescriptorsError("the daemon has no descriptors left")

    books = Books()
    books.memory.create = create
    with pytest.raises(ResourceLimitError, match="the daemon has no descriptors left"):
        books.open().grant(LARGE, LARGE)


# -- room where a segment is all or nothing ----------------------------------------------------------------------------


def test_one_tensor_may_need_a_segment_beyond_the_limit_of_segments() -> None:
    books = Books(budget=4 << 30, sparse=False)
    load = books.open()
    extent = load.grant(3 << 30, 3 << 30)
    assert extent is not None
    assert extent.length == 3 << 30
    load.end()
    books.reclaim()
    assert books.memory.used == 0


def test_scattered_holes_make_a_grant_evict_on() -> None:
    books = Books(budget=6 * LARGE, sparse=False)
    first, keeper = books.load_into_one_segment("abcdef"), books.load_known("bdf")
    books.store.remove(first)
    load = books.open()
    assert books.memory.obtainable("all", load) == 3 * LARGE
    assert load.grant(2 * LARGE, 2 * LARGE) is None
    assert books.evicted[1:] == [(keeper, "capacity")]
    books.reclaim()
    assert load.grant(2 * LARGE, 2 * LARGE) is not None


def test_a_refusal_says_that_what_is_free_lies_in_pieces_and_evicts_nothing() -> None:
    books = Books(budget=7 * LARGE, sparse=False)
    first, keeper = books.load_into_one_segment("abcdef"), books.load_known("bdf")
    books.store.remove(first)
    books.lease(keeper)
    bystander = books.load("g")
    with pytest.raises(CapacityError, match=r"in pieces, the largest of \d+(\.\d+)? KiB") as caught:
        books.open().grant(2 * LARGE, 2 * LARGE)
    error = caught.value
    assert (error.free_bytes, error.evictable_bytes) == (3 * LARGE, LARGE)
    assert error.metadata["largest_bytes"] == str(LARGE)
    assert bystander.key in books.store.checkpoints


def test_one_pass_is_not_promised_on_scattered_holes() -> None:
    books = Books(budget=6 * LARGE, sparse=False)
    first, _ = books.load_into_one_segment("abcdef"), books.load_known("bdf")
    books.store.remove(first)
    load = books.open()
    assert books.memory.obtainable("all", load) == 3 * LARGE
    assert not load.admit([LARGE])
    load.match([((digest("x"), LARGE), 1)])
    while not load.make_room():
        books.reclaim()
    assert load.grant(LARGE, LARGE) is not None
    assert len(books.evicted) == 1, "it fits into a hole"


def test_only_whole_segments_of_another_domain_are_evictable() -> None:
    books = Books(budget=6 * LARGE, sparse=False)
    _, whole = books.load_into_one_segment("abc", "uid:1"), books.load_into_one_segment("de", "uid:1")
    part = books.load_known("b", domain="uid:1")
    books.lease(part)
    other = books.open("uid:2")
    with pytest.raises(CapacityError) as caught:
        other.grant(4 * LARGE, 4 * LARGE)
    assert (caught.value.free_bytes, caught.value.evictable_bytes) == (LARGE, 2 * LARGE)
    assert books.evicted == []
    load = books.open("uid:1")
    load.match(((digest(letter), LARGE), 1) for letter in "pqrstu")
    with pytest.raises(CapacityError) as caught:
        load.make_room()
    assert (caught.value.free_bytes, caught.value.evictable_bytes) == (LARGE, 4 * LARGE)
    while other.grant(3 * LARGE, 3 * LARGE) is None:
        books.reclaim()
    assert [checkpoint for checkpoint, _ in books.evicted] == [whole], "the other gives another domain nothing"


# -- the ends of things ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prepared", ["", "a", "ab"])
def test_a_seal_keeps_what_its_content_has_whatever_was_prepared(prepared: str) -> None:
    books = Books()
    load = books.open()
    blobs = {letter: books.place(load, letter) for letter in "ab"}
    contents = {
        letters: Content(
            f"sha256:{letters}",
            FILE,
            tuple(ContentTensor("", letter, "U8", (LARGE,), 0, LARGE) for letter in letters),
            tuple(blobs[letter] for letter in letters),
        )
        for letters in ("a", "ab")
    }
    if prepared:
        load.prepare(contents[prepared])
    checkpoint = load.seal(contents["ab"], 1.0)
    load.end()
    books.reclaim()
    assert set(sealed_blobs(books.store)) == {*checkpoint.unique.values()} == {*blobs.values()}
    assert books.memory.used == books.store.live_bytes("host") == 2 * LARGE


def test_a_load_that_ends_without_a_checkpoint_leaves_nothing() -> None:
    books = Books()
    load = books.open()
    books.place(load, "a")
    books.place(load, "b", SMALL)
    assert books.store.in_flight_bytes("host") == LARGE + SMALL
    load.end()
    books.reclaim()
    assert (books.memory.used, books.memory.segments, books.store.in_flight_bytes("host")) == (0, 0, 0)


@pytest.mark.parametrize("sparse", [True, False])
def test_nothing_that_a_loader_may_have_open_goes_before_its_load_has_ended(sparse: bool) -> None:
    books = Books(sparse=sparse)
    load = books.open()
    spare = load.grant(4 * LARGE, 4 * LARGE)
    assert spare is not None
    checkpoint = books.seal_only(load, [books.place(load, "a")])
    assert (books.memory.next_reclaims(), books.store.in_flight_bytes("host")) == ([], 4 * LARGE)
    assert books.store.remove(checkpoint) == LARGE
    assert (books.memory.next_reclaims(), books.store.live_bytes("host")) == ([], LARGE)
    load.end()
    assert books.memory.segments == 0
    books.reclaim()
    assert (books.memory.used, books.store.live_bytes("host"), books.store.in_flight_bytes("host")) == (0, 0, 0)


def test_copies_of_what_is_resident_already_go_when_their_load_has_ended() -> None:
    books = Books(sparse=False)
    first, second = books.open(), books.open()
    blobs = {load: [books.place(load, letter) for letter in "ab"] for load in (first, second)}
    there = books.seal(first, blobs[first])
    assert books.seal_only(second, blobs[second]) is there
    books.reclaim()
    assert books.memory.used == 4 * LARGE
    second.end()
    books.reclaim()
    assert books.memory.used == books.store.live_bytes("host") == 2 * LARGE


def test_memory_of_a_sealed_load_is_waited_for() -> None:
    """It is neither refused nor made by evicting others, for it will be there in a moment."""
    woken: list[bool] = []
    books = Books(budget=8 * LARGE, sparse=False)
    books.memory._on_reclaim = lambda: woken.append(True)
    kept, load, other = books.load("k"), books.open(), books.open()
    checkpoint = books.seal_only(load, [books.place(load, letter) for letter in "abcd"])
    assert other.grant(8 * LARGE, 8 * LARGE) is None
    assert not other.admit([8 * LARGE])
    other.match([((digest("x"), 8 * LARGE), 1)])
    assert not other.make_room()
    assert books.evicted == []
    woken.clear()
    load.end()
    assert woken
    while not other.make_room():
        books.reclaim()
    assert {evicted for evicted, _ in books.evicted} == {kept, checkpoint}


def test_nobody_waits_for_a_loader_that_does_not_die() -> None:
    books = Books(budget=4 * LARGE)
    load = books.open()
    books.seal_only(load, [books.place(load, letter) for letter in "abcd"])
    load.quarantine()
    with pytest.raises(CapacityError):
        books.open().grant(LARGE, LARGE)


def test_a_device_may_be_lost_between_the_seal_and_the_end_of_a_load() -> None:
    books = Books(sparse=False)
    load = books.open()
    checkpoint = books.seal_only(load, [books.place(load, "a")])
    assert books.store.lose("host", "gone") == [checkpoint]
    assert not books.memory.reclaiming
    again = books.load("a")
    load.end()
    books.reclaim()
    assert books.memory.used == again.total_bytes == books.store.live_bytes("host")


def test_removing_what_is_held_names_the_holders_and_changes_nothing() -> None:
    books = Books()
    checkpoint = books.load("ab")
    lease = books.lease(checkpoint)
    with pytest.raises(InUseError, match=r"pid 4711 \(python serve.py\)"):
        books.store.remove(checkpoint)
    assert len(sealed_blobs(books.store)) == 2
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


def test_a_lost_device_takes_its_checkpoints_and_leaves_records_and_other_devices() -> None:
    books = Books(sparse=False)
    other = books.store.memories["GPU-2"] = PromptMemory(
        budget=LARGE, page=PAGE, sparse=False, pool_limit=0, create=books.create
    )
    elsewhere = StoreTransaction(books.store, "GPU-2", "all", 1000)
    first, second = books.load("ab"), books.load("bc")
    books.lease(first)
    second.pins.add(1000)
    assert books.store.lose("host", "the GPU was reset") == [first, second]
    assert books.store.checkpoints == {}
    assert sealed_blobs(books.store) == []
    assert books.evicted == [(first, "lost"), (second, "lost")]
    assert {key: lost.checkpoint for key, lost in books.store.lost.items()} == {first.key: first, second.key: second}
    assert str(books.store.lost[first.key].error("name")) == (
        "checkpoint name was lost: the GPU was reset; load it again"
    )
    assert list(books.store.leases) == []
    assert (books.memory.used, books.memory.next_reclaims()) == (0, [])
    assert (books.store.evictions, books.exclusive_bytes(first)) == (0, 0)
    assert elsewhere.grant(LARGE, LARGE) is not None
    assert other.used == LARGE


def test_a_load_on_a_lost_device_can_only_be_ended_and_gives_nothing_to_the_new_memory() -> None:
    books = Books(sparse=False)
    (there,) = books.load("a").unique.values()
    load = books.open()
    books.place(load, "b")
    assert load.candidate(digest("a"), LARGE) is there
    assert load.admit([LARGE])
    books.store.lose("host", "its holder died")
    assert books.store.in_flight_bytes("host") == 0
    with pytest.raises(DeviceError, match="device host: its holder died; load it again"):
        load.grant(LARGE, LARGE)
    again = books.load("ab")
    used = books.memory.used
    load.end()
    books.reclaim()
    assert (books.memory.used, books.store.live_bytes("host")) == (used, 2 * LARGE)
    assert len(again.unique) == 2


def test_loading_it_again_ends_the_loss() -> None:
    books = Books(sparse=False)
    old, other = books.load("ab"), books.load("c")
    books.store.lose("host", "gone")
    new = books.load("ab")
    assert new is not old
    assert new.key == old.key
    assert list(books.store.lost) == [other.key]


def test_what_may_be_shared_is_what_is_sealed_in_the_same_domain() -> None:
    books = Books()
    first, second = books.open(), books.open()
    blob = books.place(first, "a", 2 * LARGE)
    assert second.resident_lengths() == set()
    books.seal(first, [blob])
    assert second.resident_lengths() == {2 * LARGE}
    assert books.open("other").resident_lengths() == set()


def test_many_equal_small_tensors_are_not_quadratic() -> None:
    """Copies of one small tensor, in two loads at the same time: eight times as many cost eight times as much."""
    few, many = (operations(partial(load_copies, count)) for count in (250, 2_000))
    assert many < 9 * few, "quadratic would be 64"


def load_copies(count: int, size: int = 256) -> None:
    """Two loads of `count` equal tensors, as the books see them."""
    books = Books(budget=16 << 20)

    def copies(load: int) -> list[Blob]:
        extent = load.grant(count * size, count * size)
        assert extent is not None
        blobs = []
        for offset in range(extent.offset, extent.offset + count * size, size):
            placed, blob = load.settle(digest("a"), size, extent.segment, offset)
            own = blob if placed else load.share(blob.number, extent.segment, offset)
            assert own is not None
            blobs.append(own)
        return blobs

    one, two = books.open(), books.open()
    first, second = copies(one), copies(two)
    assert len({blob.number for blob in first}) == count
    sealed = books.seal(one, first)
    ((mine, theirs),) = two.rechecks()
    replaced = two.recheck(mine.number, theirs.number, equal=True)
    assert {blob.number for blob in replaced.values()} == set(sealed.unique)
    assert {blob.number for blob in second} == set(replaced)
    assert two.rechecks() == []
