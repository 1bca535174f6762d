"""What a checkpoint of many tensors needs is done in steps: each is small, and the books are right after each."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest

from support.counting import operations
from support.prompt_memory import PromptMemory
from support.sealed import sealed_blobs
from weightd_daemon.core.arena import slot_bytes
from weightd_daemon.core.blob import Blob
from weightd_daemon.core.checkpoint import Checkpoint, Content
from weightd_daemon.core.lease import LeasePeer, LeaseTable
from weightd_daemon.core.loading import ENDED_AT_ONCE, StoreTransaction
from weightd_daemon.core.manifest import ContentFile, ContentTensor
from weightd_daemon.core.reclaims import ExtentReclaim, Reclaim
from weightd_daemon.core.sharing import WORK_IN_A_STEP
from weightd_daemon.core.store import FREED_IN_A_STEP, ContentStore

PAGE = 4096
SLOT = slot_bytes(8)
MANY = 16 * FREED_IN_A_STEP + 10


class Desk:
    """A store over a device that has room for `tensors` tensors of `length` bytes, as its budget."""

    def __init__(self, tensors: int = 4 * MANY, length: int = 8) -> None:
        self.length, self.slot = length, slot_bytes(length)
        self.is_held = False
        self.store = ContentStore(leases=LeaseTable(lambda _: self.is_held), on_event=lambda _: None)
        self.segments = 0
        self.memory = self.store.memories["host"] = PromptMemory(
            budget=-(-tensors * self.slot // PAGE) * PAGE, page=PAGE, sparse=True, pool_limit=0, create=self.create
        )

    def create(self, _: int) -> int:
        self.segments += 1
        return self.segments

    def open(self) -> StoreTransaction:
        return StoreTransaction(self.store, "host", "all", 1000)

    def place(self, load: StoreTransaction, seed: int, count: int) -> list[Blob]:
        size = -(-count * self.slot // PAGE) * PAGE
        while (extent := load.grant(size, size)) is None:
            self.reclaim()
        digests = [(seed + at).to_bytes(16, "little") for at in range(count)]
        return [
            load.settle(digest, self.length, extent.segment, extent.offset + at * self.slot)[1]
            for at, digest in enumerate(digests)
        ]

    def content(self, name: str, blobs: list[Blob]) -> Content:
        entries = tuple(ContentTensor("", f"t{at}", "U8", (self.length,), 0, self.length) for at in range(len(blobs)))
        return Content(name, (ContentFile("", "f", None),), entries, tuple(blobs))

    def load(self, name: str, seed: int = 0, count: int = MANY) -> Checkpoint:
        load = self.open()
        checkpoint = load.seal(self.content(name, self.place(load, seed, count)), 1.0)
        load.end()
        self.reclaim()
        return checkpoint

    def reclaim(self) -> None:
        while self.memory.freeing.go_on():
            pass
        while reclaims := self.memory.next_reclaims():
            for reclaim in reclaims:
                self.memory.reclaimed(reclaim)


def test_what_a_checkpoint_leaves_is_freed_in_steps_and_counts_as_used_until_then() -> None:
    desk = Desk()
    checkpoint = desk.load("a")
    used = desk.memory.used
    assert desk.store.remove(checkpoint) == 8 * MANY
    assert desk.store.checkpoints == {}
    left = [desk.store.blobs.sealed]
    while desk.memory.freeing.go_on():
        left.append(desk.store.blobs.sealed)
        assert desk.memory.reclaiming
        assert desk.memory.used == used, "law 8: until it is reported that it has gone"
        assert desk.store.live_bytes("host") == 8 * left[-1]
    assert (left[0], left[-1]) == (MANY, 0)
    assert all(before - after <= FREED_IN_A_STEP for before, after in pairwise(left))
    desk.reclaim()
    assert desk.memory.used == 0


def test_a_segment_of_hundreds_of_blobs_goes_to_the_pool_with_its_pages() -> None:
    """As a usual model has: freed in several steps, its pages would go back to the system one part after the other."""
    desk = Desk(length=PAGE)
    desk.memory.resize(desk.memory.budget, desk.memory.budget)
    desk.store.remove(desk.load("a", count=FREED_IN_A_STEP + 50))
    assert not desk.memory.freeing
    assert desk.memory.next_reclaims() == []
    assert desk.memory.pooled_bytes() == (FREED_IN_A_STEP + 50) * PAGE


@pytest.mark.parametrize("length", [8, PAGE])
def test_freeing_costs_little_for_each_tensor_and_returns_whole_runs_of_pages(length: int) -> None:
    """Each blob of a page would otherwise be a system call, and all of them are reported in one step."""
    desk = Desk(length=length)
    desk.store.remove(desk.load("a"))
    costs, reclaims = [], list[Reclaim]()
    while desk.memory.freeing:
        costs.append(operations(desk.memory.freeing.go_on))
        reclaims += desk.memory.next_reclaims()
    assert max(costs) < 450 * FREED_IN_A_STEP
    assert 0 < len(reclaims) <= len(costs)
    assert (
        sum(extent.length for extent in (r.extent for r in reclaims if isinstance(r, ExtentReclaim)))
        == desk.memory.used
    )


def test_what_a_smaller_budget_does_not_hold_goes_in_steps() -> None:
    desk = Desk()
    gone, kept = desk.load("gone"), desk.load("kept", seed=1 << 32)
    few = [desk.load(f"few {number}", seed=(number + 2) << 32, count=100) for number in range(5)]
    for checkpoint in (kept, gone, *few):
        desk.store.use(checkpoint, 2.0)
    desk.store.use(kept, 3.0)
    desk.memory.resize(MANY * SLOT + PAGE, 0)
    costs, steps = [], desk.store.fit("host")
    first = operations(lambda: next(steps))
    while desk.memory.freeing:
        costs.append(operations(lambda: next(steps, None)))
    assert list(steps) == []
    assert max(costs) < 450 * FREED_IN_A_STEP
    assert first < 100 * MANY, "the choice, and an eviction"
    assert [*desk.store.checkpoints.values()] == [kept]
    desk.reclaim()
    assert desk.memory.used <= desk.memory.budget
    assert desk.memory.excess() == 0


def test_what_is_being_freed_already_is_waited_for_before_anybody_goes_for_a_smaller_budget() -> None:
    desk = Desk(tensors=2 * MANY)
    kept, gone = desk.load("kept", seed=1 << 32), desk.load("gone")
    desk.store.remove(gone)
    desk.memory.resize(MANY * SLOT + PAGE, 0)
    steps = 0
    for _ in desk.store.fit("host"):
        steps += 1
        assert desk.memory.used > desk.memory.budget, "law 8: until its return is reported"
    assert steps > MANY // FREED_IN_A_STEP
    assert ([*desk.store.checkpoints.values()], desk.memory.excess()) == ([kept], 0)
    desk.reclaim()
    assert desk.memory.used <= desk.memory.budget


def test_who_is_leased_or_pinned_between_two_steps_is_replaced_by_others() -> None:
    """Else memory beyond the budget stays, which nobody holds; see `excess`."""
    desk = Desk(tensors=5 * PAGE // SLOT)
    first, leased, pinned, *others = (desk.load(f"{n}", n << 32, PAGE // SLOT) for n in range(5))
    for checkpoint in (first, leased, pinned, *others):
        desk.store.use(checkpoint, 2.0)
    desk.memory.resize(2 * PAGE, 0)
    steps = desk.store.fit("host")
    next(steps)
    assert first.key not in desk.store.checkpoints
    desk.is_held = True
    desk.store.leases.begin(leased.key, LeasePeer(1, 1, 1000, "holder"), 0.0)
    pinned.pins.add(1000)
    assert len(list(steps)) == 2
    assert [*desk.store.checkpoints.values()] == [leased, pinned]
    assert desk.memory.excess() == 0


def test_who_has_to_stay_is_asked_for_once() -> None:
    desk = Desk(tensors=2 * PAGE // SLOT)
    for number in range(2):
        desk.load(f"{number}", number << 32, PAGE // SLOT).pins.add(1000)
    desk.memory.resize(PAGE, 0)
    assert list(desk.store.fit("host")) == []
    assert desk.memory.excess() == PAGE


def test_a_load_waits_for_what_is_being_freed_and_evicts_nobody_else() -> None:
    desk = Desk(tensors=2 * MANY)
    kept, gone = desk.load("kept", seed=1 << 32, count=MANY), desk.load("gone")
    desk.store.remove(gone)
    load = desk.open()
    size = MANY * SLOT // PAGE * PAGE
    assert load.grant(size, size) is None
    desk.reclaim()
    assert load.grant(size, size) is not None
    assert [*desk.store.checkpoints.values()] == [kept]


def test_what_waits_to_be_freed_may_be_used_again_and_stays_then() -> None:
    desk = Desk()
    desk.store.remove(desk.load("a"))
    held, again = desk.open(), desk.open()
    first, *rest = (desk.store.blobs.get(number) for number in range(1, 12))
    assert first is not None
    assert held.share_known(first.number, first.identity) is first
    shared = [again.share_known(blob.number, blob.identity) for blob in rest if blob is not None]
    second = again.seal(desk.content("b", [blob for blob in shared if blob is not None]), 2.0)
    again.end()
    desk.reclaim()
    assert {blob.number for blob in sealed_blobs(desk.store)} == {first.number, *second.unique}
    held.end()
    assert {blob.number for blob in sealed_blobs(desk.store)} == {*second.unique}
    desk.store.remove(second)
    desk.reclaim()
    assert sealed_blobs(desk.store) == []


def test_what_is_evicted_again_before_its_turn_is_freed_once() -> None:
    desk = Desk()
    desk.store.remove(desk.load("a"))
    load = desk.open()
    blobs = [load.share_known(blob.number, blob.identity) for blob in sealed_blobs(desk.store)]
    again = load.seal(desk.content("b", [blob for blob in blobs if blob is not None]), 2.0)
    load.end()
    desk.store.remove(again)
    desk.reclaim()
    assert (desk.store.blobs.sealed, desk.memory.used) == (0, 0)


def test_nothing_is_freed_of_a_device_that_has_lost_its_memory() -> None:
    desk = Desk()
    desk.store.remove(desk.load("a"))
    desk.store.lose("host", "it fell off the bus")
    assert not desk.memory.freeing.go_on()
    assert (desk.store.blobs.sealed, desk.memory.used) == (0, 0)


@pytest.mark.parametrize("sealed", [False, True])
def test_a_load_of_many_tensors_ends_in_small_steps(sealed: bool) -> None:
    desk = Desk()
    load = desk.open()
    blobs = desk.place(load, 0, 10 * ENDED_AT_ONCE)
    if sealed:
        load.seal(desk.content("a", blobs), 1.0)
    costs, steps = [], load.ending()
    while load.number in desk.store.open_loads:
        costs.append(operations(lambda: next(steps, None)))
    assert max(costs) < 200 * ENDED_AT_ONCE
    assert len(costs) >= 20
    assert desk.store.blobs.sealed == (10 * ENDED_AT_ONCE if sealed else 0)
    assert all(not blob.holds for blob in desk.store.blobs)
    desk.reclaim()
    assert (desk.memory.used > 0) == sealed


def test_a_seal_costs_little_for_each_tensor() -> None:
    costs = []
    for count in (1000, 3000):
        desk = Desk()
        load = desk.open()
        content = desk.content("a", desk.place(load, 0, count))
        load.prepare(content)
        costs.append(operations(partial(load.seal, content, 1.0)))
    assert (costs[1] - costs[0]) / 2000 < 60, "instructions of Python for each tensor"


def test_only_a_load_that_places_the_same_keys_has_to_recheck() -> None:
    desk = Desk()
    mine, other, alike = desk.open(), desk.open(), desk.open()
    blobs = desk.place(mine, 0, 50)
    others, same = desk.place(other, 1 << 32, 50), desk.place(alike, 0, 40)
    other.seal(desk.content("other", others), 1.0)
    assert mine.rechecked, "there is nothing to look at"
    assert mine.rechecks() == []
    alike.seal(desk.content("alike", same), 2.0)
    assert not mine.rechecked
    pairs = mine.rechecks()
    assert {(one.number, two.number) for one, two in pairs} == {
        (one.number, two.number) for one, two in zip(blobs, same, strict=False)
    }


def test_a_load_rechecks_some_keys_at_a_time_until_none_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightd_daemon.core.loading.AT_ONCE", 7)
    desk = Desk()
    mine, alike = desk.open(), desk.open()
    blobs, same = desk.place(mine, 0, 50), desk.place(alike, 0, 50)
    alike.seal(desk.content("alike", same), 1.0)
    rounds = 0
    while not mine.rechecked:
        pairs = mine.rechecks()
        assert len(pairs) <= 7
        rounds += bool(pairs)
        for one, two in pairs:
            mine.recheck(one.number, two.number, equal=True)
    assert rounds >= 8
    assert {blob.load for blob in desk.store.blobs} == {alike.number}, "each has given way"
    assert len(blobs) == 50


def test_what_others_seal_meanwhile_does_not_make_a_load_look_at_its_keys_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("weightd_daemon.core.loading.AT_ONCE", 7)
    desk = Desk()
    mine, alike = desk.open(), desk.open()
    desk.place(mine, 0, 50)
    alike.seal(desk.content("alike", desk.place(alike, 0, 50)), 1.0)
    for number in range(50):
        if mine.rechecked:
            break
        for one, two in mine.rechecks():
            mine.recheck(one.number, two.number, equal=False)
        desk.load(f"another {number}", (number + 1) << 32, 1)
    assert mine.rechecked
    assert number <= 20


def catch_up(store: ContentStore) -> list[int]:
    """What each step of the sharing index costs, in operations, until it has caught up."""
    costs = []
    while store.sharing.behind:
        costs.append(operations(store.sharing.go_on))
    return costs


def share(desk: Desk, name: str, blobs: list[Blob]) -> Checkpoint:
    """A checkpoint that has the same blobs."""
    load = desk.open()
    shared = [load.share_known(blob.number, blob.identity) for blob in blobs]
    checkpoint = load.seal(desk.content(name, [blob for blob in shared if blob is not None]), 2.0)
    load.end()
    return checkpoint


def test_what_a_checkpoint_has_for_itself_follows_those_that_come_and_go() -> None:
    desk = Desk()
    sharing, first = desk.store.sharing, desk.load("a", count=1000)
    assert sharing.exclusive_bytes(first) == 0, "it is not looked at in the step of the seal"
    catch_up(desk.store)
    assert sharing.exclusive_bytes(first) == 8000
    second = share(desk, "b", [*first.unique.values()][:10])
    catch_up(desk.store)
    assert (sharing.exclusive_bytes(first), sharing.exclusive_bytes(second)) == (7920, 0)
    desk.store.remove(second)
    catch_up(desk.store)
    assert (sharing.exclusive_bytes(first), sharing.exclusive_bytes(second)) == (8000, 0)


def test_who_shares_is_found_in_steps() -> None:
    desk = Desk(tensors=8 * WORK_IN_A_STEP)
    first = desk.load("a", count=3 * WORK_IN_A_STEP)
    coming = catch_up(desk.store)
    second = share(desk, "b", [*first.unique.values()][::2])
    splitting = catch_up(desk.store)
    desk.store.index.pin(first, 1000)
    pinning = catch_up(desk.store)
    desk.store.remove(second)
    going = catch_up(desk.store)
    assert min(map(len, (coming, splitting, going))) >= 2
    assert max(coming + splitting + pinning + going) < 50 * WORK_IN_A_STEP
    assert len(desk.store.sharing.on("host").sets) == 1


def test_one_of_many_sets_is_counted_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightd_daemon.core.sharing.WORK_IN_A_STEP", 50)
    desk = Desk()
    first = desk.load("a", count=256)
    blobs = [*first.unique.values()]
    others = [share(desk, f"b{bit}", [b for at, b in enumerate(blobs) if at >> bit & 1]) for bit in range(8)]
    catch_up(desk.store)
    assert len(desk.store.sharing.on("host").sets) == 256, "each blob has users of its own"
    desk.store.index.pin(first, 1000)
    pinning = catch_up(desk.store)
    desk.store.remove(first)
    going = catch_up(desk.store)
    assert min(len(pinning), len(going)) > 4
    assert max(pinning + going) < 200 * 50
    for other in others:
        desk.store.remove(other)
    catch_up(desk.store)
    assert desk.store.sharing.on("host").sets == {}


def test_sets_of_checkpoints_that_have_one_key_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are then not merged with what becomes equal, and the sums are right all the same."""
    monkeypatch.setattr("weightd_daemon.core.sharing.xxh3_128_intdigest", lambda _: 1)
    desk = Desk()
    first, second = desk.load("a", count=10), desk.load("b", seed=1 << 32, count=10)
    both = share(desk, "c", [*first.unique.values()][:5] + [*second.unique.values()][:3])

    def figures() -> tuple[int, ...]:
        sharing = desk.store.sharing
        while sharing.go_on():
            pass
        return sharing.on("host").used_bytes // 8, *(sharing.exclusive_bytes(one) // 8 for one in (first, second, both))

    assert figures() == (20, 5, 7, 0)
    desk.store.remove(both)
    assert figures() == (20, 10, 10, 0)
    desk.store.remove(second)
    assert figures() == (10, 10, 0, 0)
    (left,) = desk.store.sharing.on("host").sets.values()
    assert left.checkpoints() == [first], "it is not taken for the one that has gone"
    desk.store.remove(first)
    assert figures() == (0, 0, 0, 0)
    assert desk.store.sharing.on("host").sets == {}


def test_what_comes_and_goes_unseen_costs_nothing_and_is_not_kept() -> None:
    desk = Desk()
    first = desk.load("a", count=1000)
    desk.store.remove(first)
    assert not desk.store.sharing.behind
    assert desk.store.sharing.sharer(first) is None


def test_a_device_that_is_lost_while_the_index_goes_through_it_is_left_alone() -> None:
    desk = Desk(tensors=8 * WORK_IN_A_STEP)
    desk.load("a", count=3 * WORK_IN_A_STEP)
    assert desk.store.sharing.go_on()
    (lost,) = desk.store.lose("host", "it fell off the bus")
    assert not desk.store.sharing.behind
    catch_up(desk.store)
    assert desk.store.sharing.on("host").used_bytes == desk.store.sharing.exclusive_bytes(lost) == 0


def test_for_the_index_a_seal_and_an_eviction_leave_a_note_however_many_tensors_there_are() -> None:
    desk = Desk()
    first = desk.load("a")
    sharing = desk.store.sharing
    catch_up(desk.store)
    assert operations(lambda: sharing.went(first)) < 50
    catch_up(desk.store)
    assert operations(lambda: sharing.came(first)) < 50
    assert operations(lambda: sharing.marked(first)) < 50
