"""Computes how much memory a load could get if given blobs were freed, before anything is evicted."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from .arena import Extent, round_up
from .promises import ArenaHoles

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from .memory import MemoryAccounting
    from .ranges import RangeSet


class _Prospect(NamedTuple):
    """What a load can get, in bytes: all together, and in one extent."""

    total: int
    largest: int


class _Segment:
    """A segment of which bytes are freed: its free ranges, their whole pages in bytes, and those at the beginning."""

    __slots__ = ("before", "domain", "frozen", "populated", "ranges", "size", "whole")

    def __init__(self, ranges: RangeSet, page: int, domain: str, size: int, populated: int, *, frozen: bool) -> None:
        self.ranges = ranges
        self.whole = self.before = sum(_whole_pages(ranges, page))
        self.domain = domain
        self.size = size
        self.populated = populated
        self.frozen = frozen


class EvictionTrial:
    """Simulates an eviction: frees bytes on paper and says what a load could get then. The books stay as they are.

    `room` bounds what new segments may take besides memory that goes back: the bytes free on the device itself.
    A step takes time in proportion to the logarithm of the free ranges of its segment; on a device that is not sparse
    `outcome` also looks at the segments of the domain with holes, and through those that have changed since.
    """

    def __init__(self, memory: MemoryAccounting, domain: str, load: int | None, room: int | None = None) -> None:
        self._memory = memory
        self._domain = domain
        self._load = load
        self._room = room
        self._holes = memory.holes()
        self._segments: dict[int, _Segment] = {}
        self._largest: dict[int, int] | None = None
        """By segment of the domain, its largest hole, once that was asked for; those in `_stale` have changed."""
        self._stale: set[int] = set()

    def free(self, extent: Extent) -> None:
        """These bytes, which are taken, are free."""
        segment = self._segment(extent.segment)
        self._change(segment, -1)
        ranges = segment.ranges
        left = ranges.around(extent.offset - 1) or (extent.offset, extent.offset)
        right = ranges.around(extent.end) or (extent.end, extent.end)
        segment.whole += self._pages(left[0], right[1]) - self._pages(*left) - self._pages(*right)
        ranges.add(extent.offset, extent.end)
        self._change(segment, 1)
        self._stale.add(extent.segment)

    def keep(self, extent: Extent) -> None:
        """Bytes that were freed here are taken again."""
        segment = self._segment(extent.segment)
        self._change(segment, -1)
        around = segment.ranges.around(extent.offset)
        assert around is not None  # they were freed
        low, high = around
        segment.whole += self._pages(low, extent.offset) + self._pages(extent.end, high) - self._pages(low, high)
        segment.ranges.remove(extent.offset, extent.end)
        self._change(segment, 1)
        self._stale.add(extent.segment)

    @property
    def common(self) -> int:
        """Populated bytes that could go back to the system."""
        return sum(holes.common for holes in self._holes.values())

    def outcome(self) -> _Prospect:
        """What the load could get."""
        spare, total = self._memory.shares(self._domain, self._load, self._holes)
        if self._room is not None:
            spare = min(spare, self._room + self.common)
        return _Prospect(total, min(total, max(spare, self._largest_hole())))

    def _segment(self, number: int) -> _Segment:
        if number not in self._segments:
            memory, domain = self._memory, self._memory.domain_of(number)
            arena = memory.arena(domain)
            self._segments[number] = _Segment(
                arena.free_ranges(number), memory.page, domain, arena.size(number), arena.populated(number),
                frozen=arena.is_frozen(number),
            )  # fmt: skip
        return self._segments[number]

    def _change(self, segment: _Segment, sign: int) -> None:
        """Count what a segment has become, or no longer count what it was."""
        own = common = 0
        whole_segment = segment.ranges.total == segment.size
        if segment.frozen:
            common = segment.populated if whole_segment else 0
        elif self._memory.sparse:
            common = segment.whole - segment.before
        elif whole_segment:
            own, common = -segment.before, segment.size
        else:
            own = segment.whole - segment.before
        before = self._holes[segment.domain]
        self._holes[segment.domain] = ArenaHoles(before.own + sign * own, before.common + sign * common)

    def _largest_hole(self) -> int:
        """The largest hole in a segment of the domain; where segments are sparse, holes are as good as new ones."""
        if self._memory.sparse:
            return 0
        if self._largest is None:
            self._largest = self._memory.arena(self._domain).largest_holes()
        for number in self._stale:
            segment = self._segments[number]
            if segment.domain == self._domain and not segment.frozen:
                self._largest[number] = max(_whole_pages(segment.ranges, self._memory.page), default=0)
        self._stale.clear()
        return max(self._largest.values(), default=0)

    def _pages(self, start: int, end: int) -> int:
        page = self._memory.page
        return max(0, end // page * page - round_up(start, page))


def prospect(
    memory: MemoryAccounting, domain: str, load: int, without: Iterable[Extent] = (), room: int | None = None
) -> _Prospect:
    """What a load could get if the bytes `without` were free: those of blobs that may be evicted."""
    trial = EvictionTrial(memory, domain, load, room)
    for extent in without:
        trial.free(extent)
    return trial.outcome()


def _whole_pages(ranges: RangeSet, page: int) -> Iterator[int]:
    """Length of the whole pages in each range, in bytes."""
    return (max(0, end // page * page - round_up(start, page)) for start, end in ranges)
