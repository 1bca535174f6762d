"""Disjoint half-open ranges of integers, kept sorted and coalesced."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


def gaps(start: int, end: int, parts: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """What is left of [start, end) without these parts of it, which ascend and do not overlap."""
    left, position = [], start
    for low, high in parts:
        if position < low:
            left.append((position, low))
        position = high
    if position < end:
        left.append((position, end))
    return left


class RangeSet:
    """A set of integers as maximal ranges [start, end). Every operation keeps neighbours joined."""

    __slots__ = ("_ends", "_starts", "total")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self.total = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(zip(self._starts, self._ends, strict=True))

    def __len__(self) -> int:
        return len(self._starts)

    def __repr__(self) -> str:
        return f"RangeSet({list(self)})"

    def copy(self) -> RangeSet:
        """An independent set with the same ranges."""
        other = RangeSet()
        other._starts, other._ends, other.total = self._starts[:], self._ends[:], self.total
        return other

    def add(self, start: int, end: int) -> None:
        """Add [start, end), which must not overlap what is there (ValueError)."""
        if start >= end:
            raise ValueError(f"empty range [{start}, {end})")
        at = bisect_right(self._starts, start)
        joins_left = at > 0 and self._ends[at - 1] >= start
        joins_right = at < len(self._starts) and self._starts[at] <= end
        if (joins_left and self._ends[at - 1] > start) or (joins_right and self._starts[at] < end):
            raise ValueError(f"[{start}, {end}) overlaps a range that is there")
        if joins_left and joins_right:
            self._ends[at - 1] = self._ends[at]
            del self._starts[at], self._ends[at]
        elif joins_left:
            self._ends[at - 1] = end
        elif joins_right:
            self._starts[at] = start
        else:
            self._starts.insert(at, start)
            self._ends.insert(at, end)
        self.total += end - start

    def remove(self, start: int, end: int) -> None:
        """Remove [start, end), all of which must be there (ValueError)."""
        at = bisect_right(self._starts, start) - 1
        if start >= end or at < 0 or self._ends[at] < end:
            raise ValueError(f"[{start}, {end}) is not all there")
        self._cut(at, start, end)

    def discard(self, start: int, end: int) -> None:
        """Remove whatever of [start, end) is there."""
        for low, high in self.within(start, end):
            self.remove(low, high)

    def within(self, start: int, end: int) -> list[tuple[int, int]]:
        """The parts of [start, end) that are there."""
        parts = []
        at = max(bisect_right(self._starts, start) - 1, 0)
        while at < len(self._starts) and self._starts[at] < end:
            low, high = max(start, self._starts[at]), min(end, self._ends[at])
            if low < high:
                parts.append((low, high))
            at += 1
        return parts

    def around(self, position: int) -> tuple[int, int] | None:
        """The range that holds `position`."""
        at = bisect_right(self._starts, position) - 1
        if at >= 0 and position < self._ends[at]:
            return self._starts[at], self._ends[at]
        return None

    def _cut(self, at: int, start: int, end: int) -> None:
        low, high = self._starts[at], self._ends[at]
        if low == start and high == end:
            del self._starts[at], self._ends[at]
        elif low == start:
            self._starts[at] = end
        elif high == end:
            self._ends[at] = start
        else:
            self._ends[at] = start
            where = bisect_left(self._starts, end, at + 1)
            self._starts.insert(where, end)
            self._ends.insert(where, high)
        self.total -= end - start
