"""What would break the books of an arena is refused and changes nothing. The rest: tests/property/test_arena.py."""

from __future__ import annotations

import pytest

from weightd_daemon.core.arena import Arena, Extent
from weightd_daemon.core.ranges import RangeSet

PAGE = 4096


@pytest.fixture
def arena() -> Arena:
    """Segment 1 has four pages, of which the first two are taken."""
    made = Arena(PAGE)
    made.add_segment(1, 4 * PAGE, sparse=False)
    made.occupy(Extent(1, 0, 2 * PAGE))
    return made


def state(arena: Arena) -> tuple[object, ...]:
    return [*arena], arena.used, arena.empty_bytes, [*arena.free_ranges(1)], arena.populated_hole_bytes()


@pytest.mark.parametrize(("segment", "size"), [(1, 4 * PAGE), (2, 0), (2, -PAGE), (2, PAGE + 256)])
def test_a_segment_is_entered_once_and_has_whole_pages(arena: Arena, segment: int, size: int) -> None:
    before = state(arena)
    with pytest.raises(ValueError, match=f"segment {segment} of {size} bytes cannot be added"):
        arena.add_segment(segment, size, sparse=False)
    assert state(arena) == before


def test_a_segment_goes_only_when_nothing_lies_in_it(arena: Arena) -> None:
    before = state(arena)
    with pytest.raises(ValueError, match="segment 1 is not empty"):
        arena.remove_segment(1)
    assert state(arena) == before
    arena.give_back(Extent(1, 0, 2 * PAGE))
    arena.remove_segment(1)
    assert ([*arena], arena.used, arena.empty_bytes) == ([], 0, 0)


@pytest.mark.parametrize(
    ("extent", "why"),
    [
        (Extent(1, 2 * PAGE + 256, PAGE), "not page-aligned"),
        (Extent(1, 2 * PAGE, PAGE - 256), "not page-aligned"),
        (Extent(1, PAGE, 2 * PAGE), "not all there"),
        (Extent(1, 3 * PAGE, 2 * PAGE), "not all there"),
    ],
    ids=["begins in a page", "ends in a page", "in part taken", "past the end"],
)
def test_only_whole_free_pages_are_handed_out(arena: Arena, extent: Extent, why: str) -> None:
    before = state(arena)
    with pytest.raises(ValueError, match=why):
        arena.occupy(extent)
    assert state(arena) == before


def test_a_page_without_memory_counts_as_such_only_where_no_blob_has_a_part_of_it() -> None:
    """Bytes of the blob are promised memory, though its page was never written to: they are all zero."""
    arena, taken = Arena(PAGE), RangeSet()
    taken.add(PAGE, PAGE + 256)
    arena.adopt_segment(1, 4 * PAGE, taken, [(PAGE, 2 * PAGE), (3 * PAGE, 4 * PAGE)], frozen=False)
    assert arena.used == 3 * PAGE
    assert arena.unused(1, 0, 4 * PAGE).hollow == [(3 * PAGE, 4 * PAGE)]
