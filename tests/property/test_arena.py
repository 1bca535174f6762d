"""RangeSet against a set, and the memory of a device against a model that knows every 256 bytes and every page."""

from __future__ import annotations

from typing import TYPE_CHECKING

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from weightd.types import ALIGNMENT
from weightd_daemon.core import memory as memory_module
from weightd_daemon.core.arena import Arena, Extent
from weightd_daemon.core.creations import Creation
from weightd_daemon.core.memory import MemoryAccounting
from weightd_daemon.core.prospect import _Prospect, prospect
from weightd_daemon.core.ranges import RangeSet
from weightd_daemon.core.reclaims import ExtentReclaim, Reclaim, SegmentReclaim

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PAGE = 1024
UNITS = PAGE // ALIGNMENT
BUDGET = 24 * PAGE
SEGMENT = 8 * PAGE
POOL = 10 * PAGE
DOMAINS = ("one", "two")


def runs(members: set[int]) -> list[tuple[int, int]]:
    """The maximal runs [start, end) of a set of integers."""
    found: list[tuple[int, int]] = []
    for member in sorted(members):
        if found and found[-1][1] == member:
            found[-1] = (found[-1][0], member + 1)
        else:
            found.append((member, member + 1))
    return found


class RangesMachine(RuleBasedStateMachine):
    """Every operation on RangeSet, and the same on a set."""

    def __init__(self) -> None:
        super().__init__()
        self.ranges = RangeSet()
        self.model: set[int] = set()

    spans = st.tuples(st.integers(0, 60), st.integers(1, 12)).map(lambda span: (span[0], span[0] + span[1]))

    @rule(span=spans)
    def add(self, span: tuple[int, int]) -> None:
        wanted = set(range(*span))
        if wanted & self.model:
            with pytest.raises(ValueError, match="overlaps"):
                self.ranges.add(*span)
        else:
            self.ranges.add(*span)
            self.model |= wanted

    @rule(span=spans)
    def remove(self, span: tuple[int, int]) -> None:
        gone = set(range(*span))
        if gone <= self.model:
            self.ranges.remove(*span)
            self.model -= gone
        else:
            with pytest.raises(ValueError, match="not all there"):
                self.ranges.remove(*span)

    @rule(span=spans)
    def discard(self, span: tuple[int, int]) -> None:
        self.ranges.discard(*span)
        self.model -= set(range(*span))

    @rule(span=spans, position=st.integers(0, 80))
    def ask(self, span: tuple[int, int], position: int) -> None:
        assert self.ranges.within(*span) == runs(self.model & set(range(*span)))
        around = next(((start, end) for start, end in runs(self.model) if start <= position < end), None)
        assert self.ranges.around(position) == around

    @rule()
    def go_on_with_a_copy(self) -> None:
        before = self.ranges
        self.ranges = before.copy()
        before.discard(0, 100)

    @rule(position=st.integers(0, 60), length=st.integers(-3, 0))
    def nothing_is_refused(self, position: int, length: int) -> None:
        for change in (self.ranges.add, self.ranges.remove):
            with pytest.raises(ValueError, match=r"\["):
                change(position, position + length)

    @invariant()
    def equal(self) -> None:
        assert list(self.ranges) == runs(self.model)
        assert (self.ranges.total, len(self.ranges)) == (len(self.model), len(runs(self.model)))


class MemoryMachine(RuleBasedStateMachine):
    """MemoryAccounting and its arenas; the model knows which units live, and which pages have memory or a promise."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(memory_module, "SEGMENT_BYTES", SEGMENT)
        self.patch.setattr(memory_module, "_SMALLEST_PIECE", 2 * PAGE)
        self.live: dict[int, set[int]] = {}
        self.populated: dict[int, set[int]] = {}
        self.sizes: dict[int, int] = {}
        self.slices: list[tuple[str, Extent]] = []
        self.promised: dict[int, tuple[str, int]] = {}
        self.pending: list[Reclaim] = []
        self.stale: list[Reclaim | Creation] = []
        self.most: int | None = None
        self.late = False
        self.creating: list[Creation] = []
        self.asked: dict[int, tuple[str, int, int]] = {}
        self.untaken: dict[int, Extent] = {}
        self.refused: dict[int, int] = {}

    @initialize(sparse=st.booleans(), pool=st.sampled_from([0, POOL]))
    def begin(self, sparse: bool, pool: int) -> None:
        self.sparse, self.pool = sparse, pool
        self.memory = MemoryAccounting(budget=BUDGET, page=PAGE, sparse=sparse, pool_limit=pool, create=self.create)

    def create(self, creation: Creation) -> None:
        assert creation.size % PAGE == 0
        assert self.memory.used <= BUDGET
        if creation.load in self.promised:
            domain, size = self.promised[creation.load]
            assert creation.promised == min(size, creation.size)
            self.promised[creation.load] = (domain, size - creation.promised)
        self.creating.append(creation)
        if not self.late:
            self.answer(creation)

    def answer(self, creation: Creation) -> None:
        """The device makes a segment, or says that it is full."""
        self.creating.remove(creation)
        domain, size = self.promised.get(creation.load, ("", 0))
        if self.most is not None and creation.size > self.most:
            if domain:
                self.promised[creation.load] = (domain, size + creation.promised)
            self.refused[creation.load] = self.most
            self.memory.failed(creation, MemoryError())
            return
        number = len(self.sizes) + 1
        self.sizes[number], self.live[number] = creation.size, set()
        self.untaken[creation.load] = Extent(number, 0, creation.size)
        self.populated[number] = set(range(creation.size // PAGE))
        self.live[number] = set(range(creation.size // ALIGNMENT))
        assert self.memory.made(creation, number)

    def punching(self) -> Iterator[tuple[int, int]]:
        for reclaim in self.pending:
            if isinstance(reclaim, ExtentReclaim):
                extent = reclaim.extent
                yield from ((extent.segment, page) for page in range(extent.offset // PAGE, extent.end // PAGE))

    @rule(load=st.integers(1, 3), domain=st.sampled_from(DOMAINS), want=st.integers(1, 12 * PAGE),
          need=st.integers(1, 6 * PAGE))  # fmt: skip
    def grant(self, load: int, domain: str, want: int, need: int) -> None:
        domain, want, need = self.asked.pop(load, (domain, want, need))  # who had to wait asks for the same
        possible = self.could_have(domain)
        alone = not any(size for number, (_, size) in self.promised.items() if number != load)
        try:
            extent = self.memory.grant(load, domain, want, need)
        except MemoryError:
            self.pending += self.memory.next_reclaims()
            assert need > self.refused[load]
            return
        self.pending += self.memory.next_reclaims()
        if extent is None:
            self.asked[load] = domain, want, need
            assert self.pending or self.creating or not alone or need > possible.largest, "there was room"
            return
        assert extent.offset % PAGE == 0
        assert extent.length % PAGE == 0
        assert need <= extent.length < max(need, want) + PAGE
        assert extent.offset >= 0
        assert extent.end <= self.sizes[extent.segment]
        assert self.memory.domain_of(extent.segment) == domain
        if extent == self.untaken.get(load):  # a new segment, which was the load's from the moment it was there
            self.slices.append((domain, self.untaken.pop(load)))
            return
        units = set(range(extent.offset // ALIGNMENT, extent.end // ALIGNMENT))
        assert not units & self.live[extent.segment], "overlaps bytes that live"
        pages = set(range(extent.offset // PAGE, extent.end // PAGE))
        assert not {(extent.segment, page) for page in pages} & set(self.punching()), "would be punched under the load"
        self.live[extent.segment] |= units
        self.populated[extent.segment] |= pages
        self.slices.append((domain, extent))
        if load in self.promised:
            whose, size = self.promised[load]
            self.promised[load] = (whose, max(0, size - extent.length))

    def could_have(self, domain: str, without: Sequence[Extent] = ()) -> _Prospect:
        """What a domain could get if these bytes were free, no promises to others considered."""
        freed: dict[int, set[int]] = {}
        for extent in without:
            units = range(extent.offset // ALIGNMENT, extent.end // ALIGNMENT)
            freed.setdefault(extent.segment, set()).update(units)
        punching, common, own, longest = set(self.punching()), 0, 0, 0
        for segment, live in self.live.items():
            if segment not in self.populated or segment in self.releasing():
                continue
            kept = {unit // UNITS for unit in live - freed.get(segment, set())}
            free = {p for p in self.populated[segment] - kept if (segment, p) not in punching}
            if self.sparse or not kept:
                common += len(free) * PAGE
            elif self.memory.domain_of(segment) == domain:
                own += len(free) * PAGE
                longest = max([longest, *((high - low) * PAGE for low, high in runs(free))])
        spare = BUDGET - self.memory.used + common
        return _Prospect(spare + own, max(spare, longest))

    def releasing(self) -> set[int]:
        return {reclaim.segment for reclaim in self.pending if isinstance(reclaim, SegmentReclaim)}

    @rule(domain=st.sampled_from(DOMAINS), data=st.data())
    def what_eviction_would_bring_is_known(self, domain: str, data: st.DataObject) -> None:
        """Exactly, with holes of several domains and whatever pages or segments become free."""
        without = data.draw(st.lists(st.sampled_from(self.slices), unique=True)) if self.slices else []
        load = 1
        if any(size for number, (_, size) in self.promised.items() if number != load):
            return
        extents = [extent for _, extent in without]
        assert prospect(self.memory, domain, load, extents) == self.could_have(domain, extents)
        assert self.memory.obtainable(domain, load) == self.could_have(domain).total

    @rule(most=st.none() | st.integers(0, 4))
    def the_device_fills_up_or_not(self, most: int | None) -> None:
        """Other processes take memory of the device: it has no room for larger segments than this many pages."""
        self.most = None if most is None else most * PAGE

    @rule(late=st.booleans())
    def the_driver_hangs_or_not(self, late: bool) -> None:
        """Segments are made later, or in the step that asks for them."""
        self.late = late

    @precondition(lambda self: self.creating)
    @rule(data=st.data())
    def the_driver_answers(self, data: st.DataObject) -> None:
        self.answer(data.draw(st.sampled_from(self.creating)))
        self.pending += self.memory.next_reclaims()

    @precondition(lambda self: len(self.slices) > 2)
    @rule()
    def lose(self) -> None:
        """Everything is gone, and nothing is to be returned; what was being returned may still be reported."""
        self.memory.lose()
        assert self.memory.next_reclaims() == []
        assert (self.memory.used, self.memory.segments, self.memory.reclaiming) == (0, 0, False)
        self.stale += [*self.pending, *self.creating]
        for books in (self.live, self.populated, self.promised, self.slices, self.pending, self.creating, self.asked):
            books.clear()
        self.untaken.clear()

    @precondition(lambda self: self.stale)
    @rule()
    def report_late(self) -> None:
        stale = self.stale.pop()
        if not isinstance(stale, Creation):
            self.memory.reclaimed(stale)
        elif self.most is None:
            self.sizes[len(self.sizes) + 1] = stale.size
            assert not self.memory.made(stale, len(self.sizes)), "nobody has it but who made it"
        else:
            self.memory.failed(stale, MemoryError())

    @rule(load=st.integers(1, 3), domain=st.sampled_from(DOMAINS), size=st.integers(0, 12 * PAGE))
    def promise(self, load: int, domain: str, size: int) -> None:
        if size <= self.memory.obtainable(domain, load):
            self.memory.promise(load, domain, size)
            self.promised[load] = (domain, size)

    @rule(load=st.integers(1, 3))
    def withdraw(self, load: int) -> None:
        self.memory.withdraw(load)
        self.promised.pop(load, None)

    @precondition(lambda self: self.slices)
    @rule(data=st.data(), pool=st.booleans())
    def give_back(self, data: st.DataObject, pool: bool) -> None:
        """Some slices of one domain, each whole or in part, as evicting blobs does."""
        domain = data.draw(st.sampled_from(sorted({domain for domain, _ in self.slices})))
        there = [at for at, (name, _) in enumerate(self.slices) if name == domain]
        chosen = data.draw(st.lists(st.sampled_from(there), unique=True, min_size=1))
        returned = []
        for at in sorted(chosen, reverse=True):
            _, extent = self.slices.pop(at)
            units = extent.length // ALIGNMENT
            low = data.draw(st.integers(0, units - 1))
            high = data.draw(st.integers(low + 1, units))
            part = Extent(extent.segment, extent.offset + low * ALIGNMENT, (high - low) * ALIGNMENT)
            returned.append(part)
            for start, end in ((extent.offset, part.offset), (part.end, extent.end)):
                if start < end:
                    self.slices.append((domain, Extent(extent.segment, start, end - start)))
        self.hand_back(domain, returned, pool=pool)

    def hand_back(self, domain: str, extents: list[Extent], *, pool: bool) -> None:
        for extent in extents:
            self.live[extent.segment] -= set(range(extent.offset // ALIGNMENT, extent.end // ALIGNMENT))
        self.memory.give_back(domain, extents, pool=pool)
        self.pending += self.memory.next_reclaims()

    @precondition(lambda self: self.pending)
    @rule(data=st.data())
    def carry_out(self, data: st.DataObject) -> None:
        self.reclaim(self.pending.pop(data.draw(st.integers(0, len(self.pending) - 1))))

    def reclaim(self, reclaim: Reclaim) -> None:
        if isinstance(reclaim, SegmentReclaim):
            assert not self.live[reclaim.segment], "releases bytes that live"
            assert reclaim.size == len(self.populated[reclaim.segment]) * PAGE
            del self.populated[reclaim.segment]
        else:
            extent = reclaim.extent
            assert self.sparse
            assert extent.length > 0
            assert extent.offset % PAGE == 0
            assert extent.length % PAGE == 0
            units = set(range(extent.offset // ALIGNMENT, extent.end // ALIGNMENT))
            assert not units & self.live[extent.segment], "punches bytes that live"
            pages = set(range(extent.offset // PAGE, extent.end // PAGE))
            assert pages <= self.populated[extent.segment], "punches what has no memory"
            self.populated[extent.segment] -= pages
        self.memory.reclaimed(reclaim)
        self.pending += self.memory.next_reclaims()

    @rule(domain=st.sampled_from(DOMAINS), pages=st.integers(1, 8), budget=st.integers(0, 8))
    def best_fit_is_the_tightest(self, domain: str, pages: int, budget: int) -> None:
        arena = self.memory.arena(domain)
        punching = set(self.punching())
        ranks: dict[Extent, tuple[int, int]] = {}
        for segment in arena:
            free = {
                page
                for page in range(self.sizes[segment] // PAGE)
                if not self.live[segment] & set(range(page * UNITS, (page + 1) * UNITS))
                and (segment, page) not in punching
            }
            for low, high in runs(free):
                cost = len(set(range(low, low + pages)) - self.populated[segment])
                if high - low >= pages and cost <= budget:
                    ranks[Extent(segment, low * PAGE, pages * PAGE)] = (cost, high - low)
        found = arena.best_fit(pages * PAGE, budget * PAGE)
        assert (found is None) == (not ranks)
        if found is not None:
            assert ranks[found] == min(ranks.values())

    @invariant()
    def books_agree(self) -> None:
        creating = sum(creation.size for creation in self.creating)
        assert self.memory.used == sum(map(len, self.populated.values())) * PAGE + creating
        assert self.memory.used <= BUDGET
        assert self.memory.reclaiming == bool(self.pending or self.creating)
        for domain in DOMAINS:
            arena = self.memory.arena(domain)
            for segment in arena:
                units = set(range(self.sizes[segment] // ALIGNMENT)) - self.live[segment]
                expected = [(low * ALIGNMENT, high * ALIGNMENT) for low, high in runs(units)]
                assert list(arena.free_ranges(segment)) == expected
                assert arena.is_empty(segment) <= (not self.live[segment])

    @invariant()
    def what_is_counted_as_it_changes_is_the_sum(self) -> None:
        for domain in DOMAINS:
            arena = self.memory.arena(domain)
            segments, empty = arena._segments, [segment for segment in arena if arena.is_empty(segment)]
            assert arena.used == sum(books.size - books.sparse.total for books in segments.values())
            assert arena.leaving == sum(books.leaving.total for books in segments.values())
            assert arena.empty_bytes == sum(map(arena.populated, empty))
            assert sorted(arena.empty_segments()) == sorted(empty)
            holes = {segment: arena._holes_in(segment, books) for segment, books in segments.items()}
            assert sorted(arena.segments_with_holes()) == sorted(segment for segment, found in holes.items() if found)
            there = (extent.length - cost for found in holes.values() for extent, cost in found)
            assert arena.populated_hole_bytes() == sum(there)

    @invariant()
    def promises_are_kept(self) -> None:
        """What is free, reusable or on its way back covers every promise."""
        if self.pool and not self.sparse:
            return  # who takes a part of an empty segment keeps other domains from the rest of it
        on_the_way = sum(r.size if isinstance(r, SegmentReclaim) else r.extent.length for r in self.pending)
        left = BUDGET - self.memory.used + on_the_way
        for domain in DOMAINS:
            holes = self.memory.arena(domain).populated_hole_bytes()
            promised = sum(size for name, size in self.promised.values() if name == domain)
            left -= promised - holes if self.sparse else max(0, promised - holes)
        assert left >= 0

    def teardown(self) -> None:
        try:
            if not hasattr(self, "memory"):
                return
            for creation in list(self.creating):
                self.answer(creation)
            self.late = False
            while self.creating:  # smaller ones
                self.answer(self.creating[0])
            self.slices += [(self.memory.domain_of(extent.segment), extent) for extent in self.untaken.values()]
            for domain in DOMAINS:
                self.hand_back(domain, [extent for name, extent in self.slices if name == domain], pool=True)
            while self.pending:
                self.reclaim(self.pending.pop(0))
            assert self.memory.used == self.memory.pooled_bytes() <= self.pool
            assert self.memory.segments == len(self.populated)
        finally:
            self.patch.undo()


TestRanges = RangesMachine.TestCase
TestRanges.settings = settings(max_examples=60, stateful_step_count=40)

TestMemory = MemoryMachine.TestCase
TestMemory.settings = settings(max_examples=300, stateful_step_count=40)


def test_an_extent_that_is_not_page_aligned_is_refused() -> None:
    arena = Arena(PAGE)
    arena.add_segment(1, SEGMENT, sparse=True)
    for extent in (Extent(1, ALIGNMENT, PAGE), Extent(1, 0, PAGE + ALIGNMENT)):
        with pytest.raises(ValueError, match="page-aligned"):
            arena.occupy(extent)
    assert arena.used == 0
