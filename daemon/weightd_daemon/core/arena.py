"""The arena: tracks which bytes of which segments are free, and which free pages are backed by memory.

Blobs lie at 256-byte alignment, but memory comes and goes in pages. So the arena keeps byte-exact books and hands out
page-aligned *extents* only: a page that still holds a live byte is never part of one. On devices whose segments are
sparse (memfd), a free page may have been punched: it costs nothing until an extent takes it again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from weightd.types import ALIGNMENT

from .ranges import RangeSet

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


class _Segment:
    """Books of one segment: free bytes; those of them without memory; and those on their way back to the system.

    Bytes in `quarantined` are neither free nor taken: a process that nobody could end may still write to them.
    """

    __slots__ = ("free", "frozen", "holes", "leaving", "quarantined", "size", "sparse")

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
        self.holes: list[tuple[Extent, int]] | None = None
        """What Arena._holes has of it, until its free or sparse bytes change."""


class Arena:
    """Bookkeeping allocator for the segments of one device and one sharing domain. Sizes and offsets are bytes."""

    def __init__(self, page: int) -> None:
        self.page = page
        self._segments: dict[int, _Segment] = {}

    def __contains__(self, segment: int) -> bool:
        return segment in self._segments

    def __iter__(self) -> Iterator[int]:
        return iter(self._segments)

    def __len__(self) -> int:
        return len(self._segments)

    @property
    def used(self) -> int:
        """Bytes with memory behind them, or promised: segments less their punched or never written pages."""
        return sum(s.size - s.sparse.total for s in self._segments.values())

    @property
    def leaving(self) -> int:
        """Bytes of pages that are set aside to be punched."""
        return sum(s.leaving.total for s in self._segments.values())

    def size(self, segment: int) -> int:
        """Length of a segment."""
        return self._segments[segment].size

    def add_segment(self, segment: int, size: int, *, sparse: bool) -> None:
        """Take a new, wholly free segment into the books; `size` is a whole number of pages."""
        if segment in self._segments or size <= 0 or size % self.page:
            raise ValueError(f"segment {segment} of {size} bytes cannot be added")
        self._segments[segment] = _Segment(size, sparse=sparse)

    def change_page(self, page: int) -> None:
        """Have pages of another size. Every segment is whole pages of it, and nothing has been handed out by now."""
        self.page = page
        for books in self._segments.values():
            books.holes = None

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
        books.holes = None

    def is_quarantined(self, segment: int) -> bool:
        """Whether bytes of the segment are set aside until `thaw`."""
        return self._segments[segment].quarantined.total > 0

    def thaw(self, segment: int, hollow: Iterable[tuple[int, int]]) -> None:
        """Free the bytes that were set aside. `hollow` are the ranges of the segment without memory by now."""
        books = self._segments[segment]
        back, books.quarantined = books.quarantined, RangeSet()
        books.holes = None
        for start, end in back:
            books.free.add(start, end)
            books.sparse.discard(start, end)
        self._note_hollow(books, back, hollow)

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
        del self._segments[segment]

    def is_empty(self, segment: int) -> bool:
        """Whether nothing lies in the segment and nothing is on its way out of it."""
        books = self._segments[segment]
        return books.free.total == books.size

    def populated(self, segment: int) -> int:
        """Bytes of the segment with memory behind them, or promised."""
        books = self._segments[segment]
        return books.size - books.sparse.total

    def best_fit(self, length: int, budget: int) -> Extent | None:
        """The tightest hole that takes `length` bytes (a whole number of pages) and needs at most `budget` new memory.

        Holes with memory behind them come first: page allocation is what a load costs (docs/architecture.md).
        """
        best: tuple[int, int, Extent] | None = None
        for extent, whole in self._holes():
            if extent.length < length:
                continue
            cut = Extent(extent.segment, extent.offset, length)
            cost = self.cost(cut) if whole else 0
            rank = (cost, extent.length)
            if cost <= budget and (best is None or rank < best[:2]):
                best = (*rank, cut)
        return best[2] if best else None

    def largest(self, least: int, budget: int, *, populated: bool) -> Extent | None:
        """The largest hole of at least `least` bytes; with `populated`, among those that need no new memory."""
        best: Extent | None = None
        for extent, cost in self._holes():
            if extent.length < least or (best is not None and extent.length <= best.length):
                continue
            if cost <= (0 if populated else budget):
                best = extent
        return best

    def cost(self, extent: Extent) -> int:
        """Bytes of memory that taking the extent would add."""
        sparse = self._segments[extent.segment].sparse
        return sum(high - low for low, high in sparse.within(extent.offset, extent.end))

    def occupy(self, extent: Extent) -> None:
        """Hand out an extent that lies in a hole."""
        books = self._segments[extent.segment]
        if extent.offset % self.page or extent.length % self.page:
            raise ValueError(f"{extent} is not page-aligned")
        books.holes = None
        books.free.remove(extent.offset, extent.end)  # law 1: ValueError where a byte is not free
        books.sparse.discard(extent.offset, extent.end)

    def give_back(self, extent: Extent) -> None:
        """Return bytes: a whole extent, or what is left between the blobs in one."""
        books = self._segments[extent.segment]
        books.holes = None
        books.free.add(extent.offset, extent.end)

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
            position = first
            for sparse_start, sparse_end in [*hollow, (last, last)]:
                if position < sparse_start:
                    leaving.append(Extent(segment, position, sparse_start - position))
                position = sparse_end
        if leaving:
            books.holes = None
        for extent in leaving:
            books.free.remove(extent.offset, extent.end)
            books.leaving.add(extent.offset, extent.end)
        return leaving

    def left(self, extent: Extent) -> None:
        """The memory of an extent that was set aside has gone: it is a hole without memory now."""
        books = self._segments[extent.segment]
        books.holes = None
        books.leaving.remove(extent.offset, extent.end)
        books.free.add(extent.offset, extent.end)
        books.sparse.add(extent.offset, extent.end)

    def free_ranges(self, segment: int) -> RangeSet:
        """A copy of the segment's free bytes, those on their way out included."""
        books = self._segments[segment]
        ranges = books.free.copy()
        for start, end in books.leaving:
            ranges.add(start, end)
        return ranges

    def populated_hole_bytes(self) -> int:
        """Bytes of whole free pages that have memory behind them: what the next load can have at once."""
        return sum(extent.length - cost for extent, cost in self._holes())

    def empty_bytes(self) -> int:
        """Memory behind the segments in which nothing lies."""
        return sum(self.populated(segment) for segment in self._segments if self.is_empty(segment))

    def _holes(self) -> Iterator[tuple[Extent, int]]:
        """The whole free pages that can be handed out, and what taking them would cost. A grant asks several times."""
        for segment, books in self._segments.items():
            if books.holes is None:
                books.holes = self._holes_in(segment, books)
            yield from books.holes

    def _holes_in(self, segment: int, books: _Segment) -> list[tuple[Extent, int]]:
        found = []
        for start, end in books.free if not books.frozen else ():
            first, last = round_up(start, self.page), end // self.page * self.page
            if first < last:
                extent = Extent(segment, first, last - first)
                found.append((extent, self.cost(extent)))
        return found
