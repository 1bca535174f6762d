"""The arena: tracks which bytes of which segments are free, and which free pages are backed by memory.

Blobs lie at 256-byte alignment, but memory comes and goes in pages. So the arena keeps byte-exact books and hands out
page-aligned *extents* only: a page that still holds a live byte is never part of one. On devices whose segments are
sparse (memfd), a free page may have been punched: it costs nothing until an extent takes it again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from weightd.types import ALIGNMENT

from .ranges import RangeSet, gaps

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class Extent(NamedTuple):
    """Bytes [offset, offset + length) of a segment, as the arena allocates them."""

    segment: int
    offset: int
    length: int

    @property
    def end(self) -> int:
        return self.offset + self.length


def round_up(value: int, unit: int) -> int:
    """The next multiple of `unit`."""
    return -(-value // unit) * unit


def slot_bytes(length: int) -> int:
    """What a blob of `length` bytes takes: its length, rounded up so that the next blob is aligned."""
    return round_up(length, ALIGNMENT)


def without(granted: Iterable[Extent], keep: Iterable[Extent]) -> list[Extent]:
    """What is left of the granted extents without those to keep."""
    by_segment: dict[int, RangeSet] = {}
    for extent in granted:
        by_segment.setdefault(extent.segment, RangeSet()).add(extent.offset, extent.end)
    for extent in keep:
        by_segment[extent.segment].remove(extent.offset, extent.end)
    return [Extent(segment, start, end - start) for segment, ranges in by_segment.items() for start, end in ranges]


class UnusedRanges(NamedTuple):
    """Bytes of a part of a segment that hold nothing, as ranges [start, end) that ascend."""

    holes: list[tuple[int, int]]
    """Free, with memory behind them."""
    hollow: list[tuple[int, int]]
    """Free, without."""
    leaving: list[tuple[int, int]]
    """On their way back to the system."""
    set_aside: list[tuple[int, int]]
    """In quarantine, or free in a frozen segment: somebody else may still use them."""


class _Segment:
    """Books of one segment: free bytes; those of them without memory; and those on their way back to the system.

    Bytes in `quarantined` are neither free nor taken: a process that nobody could end may still write to them.
    """

    __slots__ = ("counted", "free", "frozen", "leaving", "quarantined", "size", "sparse")

    def __init__(self, size: int, *, sparse: bool) -> None:
        self.size = size
        self.free = RangeSet()
        self.free.add(0, size)
        self.sparse = RangeSet()
        if sparse:
            self.sparse.add(0, size)
        self.leaving = RangeSet()
        self.quarantined = RangeSet()
        self.frozen = False
        self.counted = _Counted(0, 0, 0)
        """What the sums of its arena have of it."""

    @property
    def populated(self) -> int:
        """Bytes with memory behind them, or promised."""
        return self.size - self.sparse.total

    @property
    def is_empty(self) -> bool:
        """Whether nothing lies in it and nothing is on its way out of it."""
        return self.free.total == self.size


class _Counted(NamedTuple):
    """Bytes of one segment that are populated, leaving, and populated in an empty segment."""

    used: int
    leaving: int
    empty: int


class Arena:
    """Bookkeeping allocator for the segments of one device and one sharing domain. Sizes and offsets are bytes.

    Sums over the segments are kept, and so are the segments with holes: a daemon has a segment for each checkpoint, and
    what is asked at each grant must not cost a walk through all of them.
    """

    def __init__(self, page: int) -> None:
        self.page = page
        self._segments: dict[int, _Segment] = {}
        self.used = 0
        """Bytes with memory behind them, or promised: segments less their punched or never written pages."""
        self.leaving = 0
        """Bytes of pages that are set aside to be punched."""
        self.empty_bytes = 0
        """Memory behind the segments in which nothing lies."""
        self._empty: dict[int, None] = {}
        self._holes: dict[int, list[tuple[Extent, int]]] = {}
        """By segment, if it has any: whole free pages that can be handed out, and what taking them would cost."""
        self._hole_bytes = 0
        self._stale: set[int] = set()
        """Segments whose holes have changed: they are looked for when somebody asks."""

    def __contains__(self, segment: int) -> bool:
        return segment in self._segments

    def __iter__(self) -> Iterator[int]:
        return iter(self._segments)

    def __len__(self) -> int:
        return len(self._segments)

    def size(self, segment: int) -> int:
        """Length of a segment."""
        return self._segments[segment].size

    def add_segment(self, segment: int, size: int, *, sparse: bool) -> None:
        """Take a new, wholly free segment into the books; `size` is a whole number of pages."""
        if segment in self._segments or size <= 0 or size % self.page:
            raise ValueError(f"segment {segment} of {size} bytes cannot be added")
        self._segments[segment] = _Segment(size, sparse=sparse)
        self._changed(segment)

    def change_page(self, page: int) -> None:
        """Have pages of another size. Every segment is whole pages of it, and nothing has been handed out by now."""
        self.page = page
        self._stale.update(self._segments)

    def adopt_segment(
        self,
        segment: int,
        size: int,
        taken: RangeSet,
        hollow: Iterable[tuple[int, int]],
        *,
        frozen: bool,
        quarantine: bool = False,
    ) -> None:
        """Take in a segment that an earlier daemon has filled: the bytes that are `taken`, the ranges without memory.

        A *frozen* one has other bytes as well, which somebody may still read: it is neither filled nor punched, and
        goes as a whole when nothing that the books know lies in it. With `quarantine` the bytes that are not taken are
        set aside until `thaw`.
        """
        self.add_segment(segment, size, sparse=False)
        books = self._segments[segment]
        books.frozen = frozen
        for start, end in taken:
            books.free.remove(start, end)
        self._note_hollow(books, books.free, hollow)
        if quarantine:
            books.quarantined, books.free = books.free, books.quarantined
        self._changed(segment)

    def is_quarantined(self, segment: int) -> bool:
        """Whether bytes of the segment are set aside until `thaw`."""
        return self._segments[segment].quarantined.total > 0

    def thaw(self, segment: int, hollow: Iterable[tuple[int, int]]) -> None:
        """Free the bytes that were set aside. `hollow` are the ranges of the segment without memory by now."""
        books = self._segments[segment]
        back, books.quarantined = books.quarantined, RangeSet()
        for start, end in back:
            books.free.add(start, end)
            books.sparse.discard(start, end)
        self._note_hollow(books, back, hollow)
        self._changed(segment)

    def _note_hollow(self, books: _Segment, within: RangeSet, hollow: Iterable[tuple[int, int]]) -> None:
        """Enter the whole pages of `within` that have no memory behind them."""
        for start, end in hollow:
            for low, high in within.within(start, end):
                first, last = round_up(low, self.page), high // self.page * self.page
                if first < last:
                    books.sparse.add(first, last)

    def is_frozen(self, segment: int) -> bool:
        """Whether the segment is neither filled nor punched any more."""
        return self._segments[segment].frozen

    def remove_segment(self, segment: int) -> None:
        """Strike a wholly free segment out of the books."""
        if not self.is_empty(segment):
            raise ValueError(f"segment {segment} is not empty")
        counted = self._segments.pop(segment).counted
        self.used -= counted.used
        self.empty_bytes -= counted.empty
        del self._empty[segment]
        self._set_holes(segment, [])
        self._stale.discard(segment)

    def is_empty(self, segment: int) -> bool:
        """Whether nothing lies in the segment and nothing is on its way out of it."""
        return self._segments[segment].is_empty

    def empty_segments(self) -> list[int]:
        """The segments in which nothing lies."""
        return list(self._empty)

    def segments_with_holes(self) -> list[int]:
        """The segments with whole free pages, with memory or without, that can be handed out."""
        self._find_holes()
        return list(self._holes)

    def largest_holes(self) -> dict[int, int]:
        """The bytes of the largest of these pieces, by segment."""
        self._find_holes()
        return {segment: max(extent.length for extent, _ in holes) for segment, holes in self._holes.items()}

    def populated(self, segment: int) -> int:
        """Bytes of the segment with memory behind them, or promised."""
        return self._segments[segment].populated

    def best_fit(self, length: int, budget: int) -> Extent | None:
        """The tightest hole that takes `length` bytes (a whole number of pages) and needs at most `budget` new memory.

        Holes with memory behind them come first: page allocation is what a load costs (docs/architecture.md).
        """
        best: tuple[int, int, Extent] | None = None
        for extent, whole in self._all_holes():
            if extent.length < length:
                continue
            cut = Extent(extent.segment, extent.offset, length)
            cost = self.cost(cut) if whole else 0
            rank = (cost, extent.length, cut)
            if cost <= budget and (best is None or rank < best):
                best = rank
        return best[2] if best else None

    def largest(self, least: int, budget: int, *, populated: bool) -> Extent | None:
        """The largest hole of at least `least` bytes; with `populated`, among those that need no new memory."""
        most = 0 if populated else budget
        fitting = (extent for extent, cost in self._all_holes() if extent.length >= least and cost <= most)
        return min(fitting, key=lambda extent: (-extent.length, extent), default=None)

    def cost(self, extent: Extent) -> int:
        """Bytes of memory that taking the extent would add."""
        sparse = self._segments[extent.segment].sparse
        return sum(high - low for low, high in sparse.within(extent.offset, extent.end))

    def occupy(self, extent: Extent) -> None:
        """Hand out an extent that lies in a hole."""
        books = self._segments[extent.segment]
        if extent.offset % self.page or extent.length % self.page:
            raise ValueError(f"{extent} is not page-aligned")
        books.free.remove(extent.offset, extent.end)  # law 1: ValueError where a byte is not free
        books.sparse.discard(extent.offset, extent.end)
        self._changed(extent.segment)

    def give_back(self, extent: Extent) -> None:
        """Return bytes: a whole extent, or what is left between the blobs in one."""
        self._segments[extent.segment].free.add(extent.offset, extent.end)
        self._changed(extent.segment)

    def start_leaving(self, segment: int, start: int = 0, end: int | None = None) -> list[Extent]:
        """Set aside the whole free pages of [start, end) that have memory, so that they can be punched.

        Pages at the edges count when all of their bytes are free, even where these bytes lie outside [start, end).
        """
        books = self._segments[segment]
        leaving: list[Extent] = []
        if books.frozen:  # law 10
            return leaving
        low = start // self.page * self.page
        high = round_up(books.size if end is None else end, self.page)
        for free_start, free_end in books.free.within(low, high):
            first, last = round_up(free_start, self.page), free_end // self.page * self.page
            hollow = books.sparse.within(first, last)
            leaving += [Extent(segment, position, sparse - position) for position, sparse in gaps(first, last, hollow)]
        for extent in leaving:
            books.free.remove(extent.offset, extent.end)
            books.leaving.add(extent.offset, extent.end)
        if leaving:
            self._changed(segment)
        return leaving

    def left(self, extent: Extent) -> None:
        """The memory of an extent that was set aside has gone: it is a hole without memory now."""
        books = self._segments[extent.segment]
        books.leaving.remove(extent.offset, extent.end)
        books.free.add(extent.offset, extent.end)
        books.sparse.add(extent.offset, extent.end)
        self._changed(extent.segment)

    def free_ranges(self, segment: int) -> RangeSet:
        """A copy of the segment's free bytes, those on their way out included."""
        books = self._segments[segment]
        ranges = books.free.copy()
        for start, end in books.leaving:
            ranges.add(start, end)
        return ranges

    def unused(self, segment: int, start: int, end: int) -> UnusedRanges:
        """What of [start, end) holds nothing."""
        books = self._segments[segment]
        holes: list[tuple[int, int]] = []
        hollow: list[tuple[int, int]] = []
        for low, high in books.free.within(start, end):
            without_memory = books.sparse.within(low, high)
            holes += gaps(low, high, without_memory)
            hollow += without_memory
        set_aside = books.quarantined.within(start, end)
        if books.frozen:
            holes, set_aside = [], sorted(holes + set_aside)
        return UnusedRanges(holes, hollow, books.leaving.within(start, end), set_aside)

    def populated_hole_bytes(self) -> int:
        """Bytes of whole free pages that have memory behind them: what the next load can have at once."""
        self._find_holes()
        return self._hole_bytes

    def _changed(self, segment: int) -> None:
        """Bring the sums up to date with a segment that has changed."""
        books = self._segments[segment]
        populated = books.populated
        before, now = books.counted, _Counted(populated, books.leaving.total, populated if books.is_empty else 0)
        books.counted = now
        self.used += now.used - before.used
        self.leaving += now.leaving - before.leaving
        self.empty_bytes += now.empty - before.empty
        if books.is_empty:
            self._empty[segment] = None
        else:
            self._empty.pop(segment, None)
        self._stale.add(segment)

    def _all_holes(self) -> Iterator[tuple[Extent, int]]:
        self._find_holes()
        for holes in self._holes.values():
            yield from holes

    def _find_holes(self) -> None:
        for segment in self._stale:
            self._set_holes(segment, self._holes_in(segment, self._segments[segment]))
        self._stale.clear()

    def _set_holes(self, segment: int, holes: list[tuple[Extent, int]]) -> None:
        before = self._holes.pop(segment, ())
        if holes:
            self._holes[segment] = holes
        self._hole_bytes += sum(e.length - cost for e, cost in holes) - sum(e.length - cost for e, cost in before)

    def _holes_in(self, segment: int, books: _Segment) -> list[tuple[Extent, int]]:
        found = []
        for start, end in books.free if not books.frozen else ():
            first, last = round_up(start, self.page), end // self.page * self.page
            if first < last:
                extent = Extent(segment, first, last - first)
                found.append((extent, self.cost(extent)))
        return found
