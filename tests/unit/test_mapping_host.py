"""Segments in host memory: where an attachment maps them."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from weightd._libc import reserve, unmap
from weightd._mapping import host
from weightd._mapping.host import MappedHostSegments
from weightd._mapping.segments import SegmentToMap
from weightd.errors import ServerError

PAGE = mmap.PAGESIZE


class Lease:
    """What the mappings keep."""


@pytest.fixture
def wanted() -> Iterator[list[SegmentToMap]]:
    """Segments of 1 to 4 pages, each full of its number; even ones are to be mapped twice."""
    found = []
    for number in range(4):
        descriptor = os.memfd_create("segment")
        size = (number + 1) * PAGE
        os.write(descriptor, bytes([number]) * size)
        found.append(SegmentToMap(number, size, descriptor, 2 - number % 2))
    yield found
    for one in found:
        assert isinstance(one.handle, int)
        os.close(one.handle)


def mappings() -> int:
    return sum("memfd:segment" in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_all_segments_lie_in_one_range_of_addresses(wanted: list[SegmentToMap]) -> None:
    segments = MappedHostSegments(wanted, Lease())
    places = sorted(segments.places().values())
    assert len(places) == 6
    for (address, size), (following, _) in pairwise(places):
        assert address + size == following
    for (number, _), (_, size) in segments.places().items():
        assert bytes(segments.buffer(number, 0, 0, size)) == bytes([number]) * size
    assert {(one.address, one.size) for one in segments.ranges()} == set(places)


def test_each_segment_is_unmapped_with_its_last_buffer(wanted: list[SegmentToMap]) -> None:
    before = mappings()
    segments = MappedHostSegments(wanted, Lease())
    assert mappings() == before + 6
    kept = segments.buffer(2, 1, 0, 3)
    del segments
    assert mappings() == before + 1
    assert bytes(kept) == b"\2\2\2"
    del kept
    assert mappings() == before


def test_a_failure_leaves_neither_mappings_nor_reserved_addresses(wanted: list[SegmentToMap]) -> None:
    MappedHostSegments(wanted, Lease())  # what is allocated at first is there now
    before = Path("/proc/self/maps").read_text().count("---p 00000000 00:00 0")
    broken = [*wanted, SegmentToMap(4, PAGE, 1 << 20, 1), SegmentToMap(5, 4096 * PAGE, 1 << 20, 1)]
    with pytest.raises(OSError, match=r"mapping .* bytes failed: Bad file descriptor"):
        MappedHostSegments(broken, Lease())
    assert mappings() == 0
    assert Path("/proc/self/maps").read_text().count("---p 00000000 00:00 0") == before


@pytest.mark.parametrize(
    ("size", "why"), [(2 * PAGE, "lacks some of the"), (0, "without bytes"), (-PAGE, "without bytes")]
)
def test_a_segment_that_is_not_as_long_as_it_says_is_not_mapped(
    wanted: list[SegmentToMap], size: int, why: str
) -> None:
    """Reading it would kill the process."""
    lying = wanted[0]._replace(size=size)
    with pytest.raises(ServerError, match=why):
        MappedHostSegments([wanted[1], lying], Lease())
    assert mappings() == 0


def test_what_a_failure_unmaps_is_unmapped_once(wanted: list[SegmentToMap], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the second time the addresses may be somebody else's."""
    unmapped, made = [], []
    make_buffer = host.HostMapping.buffer

    def noted(address: int, size: int) -> int:
        unmapped.append((address, address + size))
        return unmap(address, size)

    def interrupted(mapping: host.HostMapping) -> memoryview:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(mapping.address)
        return make_buffer(mapping)

    monkeypatch.setattr(host, "unmap", noted)
    monkeypatch.setattr(host.HostMapping, "buffer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        MappedHostSegments(wanted, Lease())
    assert mappings() == 0
    unmapped.sort()
    assert [end for _, end in unmapped[:-1]] == [start for start, _ in unmapped[1:]]


def test_reserved_addresses_are_aligned() -> None:
    for alignment in (PAGE, 2 << 20):
        found = [reserve(3 * PAGE, alignment) for _ in range(5)]
        assert all(address % alignment == 0 for address in found)
        for address in found:
            assert unmap(address, 3 * PAGE) == 0
