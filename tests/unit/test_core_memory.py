"""MemoryAccounting: in which order memory is granted, what a promise is worth, and how memory goes back."""

from __future__ import annotations

import pytest

from support.prompt_memory import PromptMemory
from weightd_daemon.core import memory as memory_module
from weightd_daemon.core.arena import Extent
from weightd_daemon.core.creations import Creation
from weightd_daemon.core.memory import MemoryAccounting
from weightd_daemon.core.prospect import EvictionTrial
from weightd_daemon.core.ranges import RangeSet
from weightd_daemon.core.reclaims import ExtentReclaim, SegmentReclaim

PAGE = 4096


class Fixture:
    """A device of 32 pages, segments of at most 16, whose reclaims are carried out by hand."""

    def __init__(self, *, sparse: bool = True, pool_pages: int = 32) -> None:
        self.sizes: list[int] = []
        self.most: int | None = None
        self.kicks = 0
        self.memory = PromptMemory(
            budget=32 * PAGE,
            page=PAGE,
            sparse=sparse,
            pool_limit=pool_pages * PAGE,
            create=self.create,
            on_reclaim=self.kick,
        )

    def create(self, size: int) -> int:
        if self.most is not None and size > self.most:
            raise MemoryError("out of memory")
        self.sizes.append(size)
        return len(self.sizes)

    def kick(self) -> None:
        self.kicks += 1

    def grant(
        self, pages: int, *, need: int | None = None, load: int = 1, domain: str = "all", ends: tuple[int, ...] = ()
    ) -> Extent | None:
        least = pages if need is None else need
        return self.memory.grant(load, domain, pages * PAGE, least * PAGE, [end * PAGE for end in ends])

    def give_back(self, *extents: Extent, pool: bool = True, domain: str = "all") -> None:
        self.memory.give_back(domain, extents, pool=pool)

    def reclaim(self) -> list[ExtentReclaim | SegmentReclaim]:
        reclaims = self.memory.next_reclaims()
        for reclaim in reclaims:
            self.memory.reclaimed(reclaim)
        return reclaims


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_module, "SEGMENT_BYTES", 16 * PAGE)
    monkeypatch.setattr(memory_module, "_SMALLEST_PIECE", 2 * PAGE)


def pages(segment: int, first: int, count: int) -> Extent:
    return Extent(segment, first * PAGE, count * PAGE)


def test_a_new_segment_is_as_large_as_is_wanted_but_no_larger_than_a_segment_may_be() -> None:
    device = Fixture()
    assert device.grant(3) == pages(1, 0, 3)
    assert device.grant(20, need=1) == pages(2, 0, 16)
    assert device.sizes == [3 * PAGE, 16 * PAGE]


def test_one_large_tensor_gets_a_segment_beyond_the_limit() -> None:
    assert Fixture().grant(20) == pages(1, 0, 20)


def test_wants_are_cut_to_what_the_budget_allows() -> None:
    device = Fixture()
    device.grant(16)
    device.grant(10)
    assert device.grant(16, need=2) == pages(3, 0, 6)
    assert device.memory.used == 32 * PAGE


def test_memory_backed_holes_come_before_new_segments() -> None:
    device = Fixture()
    extent = device.grant(8)
    assert extent is not None
    device.give_back(extent)
    assert device.memory.pooled_bytes() == 8 * PAGE
    assert device.grant(5) == pages(1, 0, 5)
    assert len(device.sizes) == 1


def test_a_good_piece_with_memory_comes_before_a_new_segment_and_a_crumb_does_not() -> None:
    device = Fixture(sparse=False)
    extent = device.grant(8)
    assert extent is not None
    device.give_back(pages(1, 0, 3), pages(1, 7, 1))
    assert device.grant(6, need=1) == pages(1, 0, 3)
    assert device.grant(6, need=1) == pages(2, 0, 6)


def test_punched_holes_are_refilled_before_a_new_segment_when_they_take_all() -> None:
    device = Fixture()
    device.grant(8)
    device.give_back(pages(1, 2, 4))
    assert device.reclaim() == [ExtentReclaim("all", pages(1, 2, 4))]
    assert device.memory.used == 4 * PAGE
    assert device.grant(4) == pages(1, 2, 4)
    assert device.sizes == [8 * PAGE]


def test_any_hole_will_do_when_the_budget_takes_no_new_segment() -> None:
    device = Fixture(sparse=False)
    device.grant(16)
    device.grant(16)
    device.give_back(pages(1, 4, 1))
    assert device.grant(8, need=1) == pages(1, 4, 1)


def test_domains_do_not_share_segments_or_holes() -> None:
    device = Fixture()
    extent = device.grant(4, domain="a")
    assert extent is not None
    device.give_back(extent, domain="a")
    other = device.grant(4, domain="b")
    assert other == pages(2, 0, 4)
    assert [device.memory.domain_of(number) for number in (1, 2)] == ["a", "b"]


def test_empty_segments_are_released_when_the_budget_is_short() -> None:
    device = Fixture()
    for domain in ("a", "b"):
        extent = device.grant(16, domain=domain)
        assert extent is not None
        device.give_back(extent, domain=domain)
    assert device.grant(20, domain="c") is None
    assert device.memory.reclaiming
    assert device.memory.used == 32 * PAGE, "it counts until it is gone"
    assert [reclaim.size for reclaim in device.reclaim() if isinstance(reclaim, SegmentReclaim)] == [
        16 * PAGE,
        16 * PAGE,
    ]
    assert not device.memory.reclaiming
    assert device.grant(20, domain="c") == pages(3, 0, 20)


def test_nothing_is_released_when_that_would_not_help() -> None:
    device = Fixture()
    device.grant(16)
    device.grant(16)
    assert device.grant(1) is None
    assert not device.memory.reclaiming


def test_the_pool_is_bounded() -> None:
    device = Fixture(pool_pages=8)
    first, second = device.grant(8), device.grant(8)
    assert first is not None
    assert second is not None
    device.give_back(first)
    assert (device.memory.pooled_bytes(), device.kicks) == (8 * PAGE, 0)
    device.give_back(second)
    assert device.reclaim() == [SegmentReclaim(2, 8 * PAGE)]
    assert (device.memory.used, device.kicks) == (8 * PAGE, 1)


def test_what_a_load_never_used_is_not_pooled() -> None:
    device = Fixture()
    extent = device.grant(8)
    assert extent is not None
    device.give_back(extent, pool=False)
    assert device.reclaim() == [SegmentReclaim(1, 8 * PAGE)]
    assert device.memory.segments == 0


def test_a_page_with_a_live_byte_is_not_punched_until_that_byte_is_free() -> None:
    device = Fixture()
    device.grant(2)
    device.give_back(Extent(1, 256, PAGE))
    assert device.reclaim() == []
    device.give_back(Extent(1, 0, 256))
    assert device.reclaim() == [ExtentReclaim("all", pages(1, 0, 1))]
    assert device.memory.used == PAGE


def test_a_segment_whose_last_hole_was_being_punched_is_released_after_that() -> None:
    device = Fixture()
    device.grant(2)
    device.give_back(pages(1, 0, 1))
    punches = device.memory.next_reclaims()
    device.give_back(pages(1, 1, 1))
    punches += device.memory.next_reclaims()
    assert punches == [ExtentReclaim("all", pages(1, 0, 1)), ExtentReclaim("all", pages(1, 1, 1))]
    for punch in punches:
        device.memory.reclaimed(punch)
    assert device.reclaim() == [SegmentReclaim(1, 0)]
    assert (device.memory.used, device.memory.segments, device.memory.reclaiming) == (0, 0, False)


def test_a_promise_binds_others_and_shrinks_as_it_is_used() -> None:
    device = Fixture()
    device.memory.promise(1, "all", 20 * PAGE)
    assert device.memory.obtainable("all", 2) == 12 * PAGE
    assert device.memory.obtainable("all", 1) == 32 * PAGE
    assert device.grant(16, need=13, load=2) is None
    device.grant(16, load=1)
    assert device.memory.obtainable("all", 2) == 12 * PAGE
    device.memory.withdraw(1)
    assert device.memory.obtainable("all", 2) == 16 * PAGE


def pool_of(device: Fixture, count: int) -> None:
    extents = [device.grant(count, load=9) for _ in range(32 // count)]
    for extent in extents:
        assert extent is not None
        device.give_back(extent)
    assert device.memory.pooled_bytes() == 32 * PAGE


def test_two_promises_that_rest_on_the_pool_are_both_kept_from_it() -> None:
    device = Fixture()
    pool_of(device, 16)
    device.memory.promise(1, "all", 16 * PAGE)
    device.memory.promise(2, "all", 16 * PAGE)
    for load in (1, 2):
        extent = device.grant(4, need=1, load=load)
        assert extent is not None, "the pool was released instead of used"
        assert extent.length == 4 * PAGE
    assert device.kicks == 0


def test_nobody_takes_the_pool_that_was_promised_to_another() -> None:
    device = Fixture()
    pool_of(device, 16)
    device.memory.promise(1, "all", 32 * PAGE)
    assert device.grant(2, load=2) is None
    assert not device.memory.reclaiming
    assert device.grant(16, load=1) is not None
    assert device.grant(16, load=1) is not None


def test_a_grant_is_cut_to_what_was_not_promised_to_others() -> None:
    device = Fixture()
    pool_of(device, 16)
    device.memory.promise(1, "all", 20 * PAGE)
    assert device.grant(16, need=1, load=2) == pages(1, 0, 12)


def test_a_promise_to_another_domain_is_kept_from_new_segments_but_holes_are_ones_own() -> None:
    device = Fixture(sparse=False, pool_pages=0)
    device.grant(16)
    device.give_back(pages(1, 0, 4), pages(1, 8, 4))
    device.memory.promise(2, "other", 12 * PAGE)
    assert device.memory.obtainable("all", 1) == 12 * PAGE
    assert device.grant(6) is None, "no hole takes it, and four pages are all that may become a segment"
    assert device.grant(4) is not None
    assert device.grant(4) is not None
    assert device.sizes == [16 * PAGE]


def test_a_promise_rests_on_the_holes_of_its_domain_first() -> None:
    device = Fixture(sparse=False, pool_pages=0)
    device.grant(16)
    device.give_back(pages(1, 0, 8))
    device.memory.promise(2, "all", 8 * PAGE)
    assert device.memory.obtainable("other", 1) == 16 * PAGE
    assert device.memory.assured(1) == 8 * PAGE, "the holes may not fit"
    assert device.grant(16, domain="other") == pages(2, 0, 16)


def test_free_pages_in_used_segments_are_punched_for_whoever_needs_room() -> None:
    device = Fixture()
    pool_of(device, 16)
    assert device.grant(2) == pages(1, 0, 2)
    assert device.memory.obtainable("other") == 30 * PAGE
    assert device.grant(20, domain="other") is None
    assert device.reclaim() == [SegmentReclaim(2, 16 * PAGE), ExtentReclaim("all", pages(1, 2, 14))]
    assert device.grant(20, domain="other") == pages(3, 0, 20)


def test_a_freed_segment_is_released_at_once_without_a_pool() -> None:
    device = Fixture(sparse=False, pool_pages=0)
    device.grant(8)
    device.give_back(pages(1, 0, 5))
    assert device.reclaim() == []
    device.give_back(pages(1, 5, 3))
    assert device.reclaim() == [SegmentReclaim(1, 8 * PAGE)]
    assert (device.memory.used, device.memory.segments) == (0, 0)


# -- a device that is full though the budget is not --------------------------------------------------------------------


def test_a_device_without_room_for_a_large_segment_gives_a_smaller_one() -> None:
    device = Fixture(sparse=False)
    device.most = 5 * PAGE
    assert device.grant(16, need=3) == pages(1, 0, 4)
    assert device.grant(16, need=5) == pages(2, 0, 5)
    assert device.memory.used == 9 * PAGE


def test_a_small_hole_is_used_where_the_device_has_no_room() -> None:
    device = Fixture(sparse=False)
    device.grant(8)
    device.give_back(pages(1, 3, 1))
    device.most = 0
    assert device.grant(4, need=1) == pages(1, 3, 1)


def test_a_device_without_room_gets_back_what_is_unused_and_says_so() -> None:
    device = Fixture(sparse=False)
    extent = device.grant(8, domain="other")
    assert extent is not None
    device.give_back(extent, domain="other")
    device.most = 0
    with pytest.raises(MemoryError, match="out of memory"):
        device.grant(4, need=2)
    assert device.reclaim() == [SegmentReclaim(1, 8 * PAGE)]
    assert device.memory.used == 0


# -- what is to stay in one piece --------------------------------------------------------------------------------------


def test_less_than_is_wanted_ends_where_something_ends() -> None:
    device = Fixture(sparse=False)
    device.grant(16)
    device.give_back(pages(1, 3, 7))
    assert device.grant(9, need=1, ends=(2, 5, 9)) == pages(1, 3, 5)
    device.grant(8)
    assert device.grant(9, need=1, ends=(3, 6, 7, 9)) == pages(3, 0, 7), "what the budget still has is 8 pages"


def test_a_piece_that_is_too_small_for_the_first_is_left_while_there_is_more() -> None:
    device = Fixture(sparse=False)
    device.grant(12)
    device.give_back(pages(1, 0, 4))
    assert device.grant(6, need=2, ends=(6,)) == pages(2, 0, 6)
    device.grant(13, need=13)
    assert device.grant(6, need=2, ends=(6,)) == pages(1, 0, 4), "there is no more"


def test_a_segment_is_as_large_as_what_stays_together() -> None:
    assert Fixture().grant(30, need=2, ends=(20, 30)) == pages(1, 0, 20)
    assert Fixture().grant(30, need=2, ends=(10, 14, 18, 30)) == pages(1, 0, 14)


def test_what_cannot_be_had_in_one_piece_is_had_in_several() -> None:
    device = Fixture(sparse=False)
    device.grant(16)
    device.grant(10)
    assert device.grant(8, need=2, ends=(8,)) == pages(3, 0, 6)
    assert device.grant(2, need=2, ends=(2,)) is None


def test_ends_need_not_be_whole_pages() -> None:
    device = Fixture(sparse=False)
    device.grant(16)
    device.give_back(pages(1, 0, 5))
    extent = device.memory.grant(1, "all", 9 * PAGE, 1, [256, 2 * PAGE + 256, 9 * PAGE])
    assert extent == pages(1, 0, 3)


# -- a device that lost everything -------------------------------------------------------------------------------------


def test_a_lost_device_begins_again_with_nothing_and_returns_nothing() -> None:
    device = Fixture(pool_pages=0)
    extents = [device.grant(8) for _ in range(3)]
    device.memory.promise(1, "all", 4 * PAGE)
    device.give_back(*filter(None, extents[:1]))
    handed_out = device.memory.next_reclaims()
    device.give_back(*filter(None, extents[1:2]))
    device.memory.lose()
    assert device.memory.next_reclaims() == []
    assert (device.memory.used, device.memory.segments, device.memory.reclaiming) == (0, 0, False)
    assert device.memory.obtainable("all", 2) == 32 * PAGE
    new = device.grant(16)
    assert new == pages(4, 0, 16)
    device.give_back(new)
    for reclaim in handed_out:
        device.memory.reclaimed(reclaim)
    assert (device.memory.used, device.memory.reclaiming) == (16 * PAGE, True)
    assert device.reclaim() == [SegmentReclaim(4, 16 * PAGE)]
    assert device.memory.used == 0


def test_another_budget_and_pool_hold_from_then_on() -> None:
    device = Fixture(pool_pages=0)
    first, second = device.grant(16), device.grant(16)
    assert device.grant(4) is None
    device.memory.resize(40 * PAGE, 16 * PAGE)
    third = device.grant(8)
    assert third == pages(3, 0, 8)
    assert device.grant(1) is None
    for extent in (first, second, third):
        assert extent is not None
        device.give_back(extent)
    device.reclaim()
    assert device.memory.pooled_bytes() == device.memory.used == 16 * PAGE


def test_a_pool_that_is_made_smaller_gives_back_what_is_beyond_it() -> None:
    device = Fixture(pool_pages=32)
    for extent in (device.grant(16), device.grant(16)):
        assert extent is not None
        device.give_back(extent)
    assert device.memory.pooled_bytes() == 32 * PAGE
    device.memory.resize(32 * PAGE, 16 * PAGE)
    device.reclaim()
    assert device.memory.pooled_bytes() == device.memory.used == 16 * PAGE
    device.memory.resize(32 * PAGE, 0)
    assert device.reclaim() == [SegmentReclaim(2, 16 * PAGE)]
    assert device.memory.used == 0


def adopted(device: Fixture, *, frozen: bool = False) -> None:
    """Adopt segment 7 of 8 pages in quarantine: page 0 is a blob's, pages 1 to 5 are unused, pages 6 and 7 hollow."""
    taken = RangeSet()
    taken.add(0, PAGE)
    device.memory.quarantine = True
    device.memory.adopt("all", 7, 8 * PAGE, taken, [(6 * PAGE, 8 * PAGE)], frozen=frozen)


@pytest.mark.parametrize("sparse", [True, False])
def test_what_may_still_be_written_to_is_neither_granted_nor_punched_nor_counted_on(*, sparse: bool) -> None:
    device = Fixture(sparse=sparse)
    adopted(device)
    assert device.memory.quarantined() == [7]
    assert device.reclaim() == []
    assert device.memory.used == 6 * PAGE
    assert device.memory.obtainable("all") == 26 * PAGE
    assert device.grant(2) == pages(1, 0, 2), "a new segment"
    device.give_back(pages(7, 0, 1))
    assert device.reclaim() == ([ExtentReclaim("all", pages(7, 0, 1), 0)] if sparse else []), (
        "no process writes to a blob"
    )
    assert 7 in device.memory.arena("all"), "it is not released before the process has ended"


def test_thawed_memory_is_used_again() -> None:
    device = Fixture(sparse=False)
    adopted(device)
    device.memory.thaw(7, [])
    assert device.memory.quarantined() == []
    assert device.grant(7) == pages(7, 1, 7)


def test_thawed_pages_go_back_also_those_that_were_written_to_meanwhile() -> None:
    device = Fixture()
    adopted(device)
    device.memory.thaw(7, [(7 * PAGE, 8 * PAGE)])
    assert device.memory.used == 7 * PAGE
    assert device.reclaim() == [ExtentReclaim("all", pages(7, 1, 6), 0)]
    assert device.memory.used == PAGE


@pytest.mark.parametrize("frozen", [True, False])
def test_a_segment_in_which_nothing_lies_any_more_goes_when_it_is_thawed(*, frozen: bool) -> None:
    device = Fixture()
    adopted(device, frozen=frozen)
    device.give_back(pages(7, 0, 1))
    device.reclaim()
    device.memory.thaw(7, [])
    assert [type(reclaim) for reclaim in device.reclaim()] == [SegmentReclaim]
    device.reclaim()
    assert device.memory.used == 0
    device.memory.thaw(7, [])  # it has gone


def test_a_closed_pool_returns_what_it_has_and_keeps_nothing_until_it_is_opened() -> None:
    fixture = Fixture()
    first, second, third = (fixture.grant(4) for _ in range(3))
    assert first is not None
    assert second is not None
    assert third is not None
    fixture.give_back(first)
    assert fixture.memory.pooled_bytes() == 4 * PAGE
    fixture.memory.close_pool()
    assert [reclaim.segment for reclaim in fixture.reclaim() if isinstance(reclaim, SegmentReclaim)] == [first.segment]
    fixture.give_back(second)
    assert fixture.memory.pooled_bytes() == 0
    fixture.reclaim()
    fixture.memory.open_pool()
    fixture.give_back(third)
    assert fixture.memory.pooled_bytes() == fixture.memory.used == 4 * PAGE


def test_what_frees_bytes_is_settled_before_they_are_granted_or_returned() -> None:
    fixture = Fixture(pool_pages=0)
    calls: list[int] = []
    fixture.memory._before_use = lambda: calls.append(fixture.memory.used)
    extent = fixture.grant(4)
    assert extent is not None
    assert len(calls) == 1
    assert fixture.memory.next_reclaims() == []
    assert len(calls) == 1, "nothing leaves"
    fixture.give_back(extent)
    assert len(calls) == 1
    assert fixture.reclaim()
    assert len(calls) == 2
    assert fixture.grant(64) is None
    assert len(calls) == 2


# -- segments that are made later --------------------------------------------------------------------------------------


class Slow:
    """A device of 32 pages, whose segments are made when the test says so."""

    def __init__(self, *, pool_pages: int = 32) -> None:
        self.asked: list[Creation] = []
        self.memory = MemoryAccounting(
            budget=32 * PAGE, page=PAGE, sparse=False, pool_limit=pool_pages * PAGE, create=self.asked.append
        )


def test_who_asks_for_more_than_was_made_gets_another_segment_and_gives_both_back() -> None:
    device = Slow(pool_pages=0)
    assert device.memory.grant(1, "all", 4 * PAGE, 4 * PAGE) is None
    assert device.memory.made(device.asked.pop(), 1)
    assert device.memory.grant(1, "all", 8 * PAGE, 8 * PAGE) is None
    assert device.memory.made(device.asked.pop(), 2)
    assert device.memory.grant(1, "all", 8 * PAGE, 8 * PAGE) == pages(2, 0, 8)
    assert device.memory.granted(1) == [pages(1, 0, 4), pages(2, 0, 8)]
    device.memory.return_grants(1)
    assert {type(reclaim) for reclaim in device.memory.next_reclaims()} == {SegmentReclaim}
    assert device.memory.segments == 0


@pytest.mark.parametrize("pool_pages", [0, 32])
def test_what_is_made_for_a_load_that_has_ended_is_pooled_as_far_as_that_is_allowed(pool_pages: int) -> None:
    device = Slow(pool_pages=pool_pages)
    assert device.memory.grant(1, "all", 4 * PAGE, 4 * PAGE) is None
    device.memory.return_grants(1)
    assert device.memory.used == 4 * PAGE, "law 8: it may be there by now"
    assert device.memory.made(device.asked.pop(), 1)
    assert (device.memory.granted(1), device.memory.pooled_bytes()) == ([], min(pool_pages, 4) * PAGE)
    assert (device.memory.grant(2, "all", PAGE, PAGE) == pages(1, 0, 1)) == bool(pool_pages)


def test_nothing_smaller_is_made_for_a_load_that_has_ended() -> None:
    device = Slow()
    assert device.memory.grant(1, "all", 8 * PAGE, PAGE) is None
    device.memory.return_grants(1)
    device.memory.failed(device.asked.pop(), MemoryError("it is full"))
    assert device.asked == []
    assert (device.memory.used, device.memory.reclaiming) == (0, False)


def test_why_a_segment_could_not_be_made_is_told_once() -> None:
    device = Slow()
    assert device.memory.grant(1, "all", 4 * PAGE, PAGE) is None
    device.memory.failed(device.asked.pop(), OSError("the driver is gone"))
    with pytest.raises(OSError, match="the driver is gone"):
        device.memory.grant(1, "all", 4 * PAGE, PAGE)
    assert device.memory.grant(1, "all", 4 * PAGE, PAGE) is None
    assert len(device.asked) == 1, "it was asked for again"


@pytest.mark.parametrize("fails", [True, False])
def test_what_was_being_made_when_the_memory_was_lost_is_no_part_of_the_new_one(fails: bool) -> None:
    device = Slow()
    assert device.memory.grant(1, "all", 4 * PAGE, 4 * PAGE) is None
    creation = device.asked.pop()
    device.memory.lose("it fell off the bus")
    assert (creation.wanted, device.memory.used, device.memory.reclaiming) == (False, 0, False)
    if fails:
        device.memory.failed(creation, MemoryError())
    else:
        assert not device.memory.made(creation, 1), "whoever made it has to release it"
    assert (device.asked, device.memory.segments, device.memory.used) == ([], 0, 0)
    assert device.memory.grant(1, "all", 4 * PAGE, 4 * PAGE) is None
    assert len(device.asked) == 1


# -- what an eviction would give back ----------------------------------------------------------------------------------


def test_of_a_frozen_segment_an_eviction_gives_all_or_nothing() -> None:
    """It is not punched (law 10); where nothing that the books know is left in it, it goes with its memory."""
    device, taken = Fixture(), RangeSet()
    taken.add(0, PAGE)
    taken.add(4 * PAGE, 5 * PAGE)
    device.memory.adopt("all", 7, 8 * PAGE, taken, [(6 * PAGE, 8 * PAGE)], frozen=True)
    trial = EvictionTrial(device.memory, "all", None)
    before = trial.outcome().total
    trial.free(pages(7, 0, 1))
    assert (trial.common, trial.outcome().total) == (0, before)
    trial.free(pages(7, 4, 1))
    assert (trial.common, trial.outcome().total) == (6 * PAGE, before + 6 * PAGE), "the last two pages have no memory"
    trial.keep(pages(7, 0, 1))
    assert (trial.common, trial.outcome().total) == (0, before)
