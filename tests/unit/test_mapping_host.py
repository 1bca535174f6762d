"""Segments in host memory: where an attachment maps them."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from weightd._libc import reserve, unmap
from weightd._mapping import host
from weightd._mapping.host import HostMapping, MappedHostSegments
from weightd._mapping.segments import SegmentToMap
from weightd.errors import ResourceLimitError, ServerError, WeightdError

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


def noted_unmaps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Begin and end of everything that is unmapped from now on."""
    unmapped = []

    def noted(address: int, size: int) -> int:
        unmapped.append((address, address + size))
        return unmap(address, size)

    monkeypatch.setattr(host, "unmap", noted)
    return unmapped


def assert_each_once(unmapped: list[tuple[int, int]]) -> None:
    """By the second time the addresses may be somebody else's."""
    unmapped.sort()
    assert [end for _, end in unmapped[:-1]] == [start for start, _ in unmapped[1:]]


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
    wanted: list[SegmentToMap], size: int, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading it would kill the process."""
    unmapped = noted_unmaps(monkeypatch)
    lying = wanted[0]._replace(size=size)
    with pytest.raises(ServerError, match=why):
        MappedHostSegments([wanted[1], lying], Lease())
    assert mappings() == 0
    assert_each_once(unmapped)


def test_what_a_failure_unmaps_is_unmapped_once(wanted: list[SegmentToMap], monkeypatch: pytest.MonkeyPatch) -> None:
    unmapped, made = noted_unmaps(monkeypatch), []
    make_buffer = host.HostMapping.buffer

    def interrupted(mapping: host.HostMapping) -> memoryview:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(mapping.address)
        return make_buffer(mapping)

    monkeypatch.setattr(host.HostMapping, "buffer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        MappedHostSegments(wanted, Lease())
    assert mappings() == 0
    assert_each_once(unmapped)


def test_reserved_addresses_are_aligned() -> None:
    for alignment in (PAGE, 2 << 20):
        found = [reserve(3 * PAGE, alignment) for _ in range(5)]
        assert all(address % alignment == 0 for address in found)
        for address in found:
            assert unmap(address, 3 * PAGE) == 0


def test_more_bytes_than_there_are_addresses_are_a_limit(wanted: list[SegmentToMap]) -> None:
    """Also where the number of bytes does not fit into the kernel's: the rest of it might."""
    for size in (1 << 60, 1 << 63, 1 << 64):
        with pytest.raises(ResourceLimitError, match=f"mapping {size} bytes: "):
            MappedHostSegments([wanted[0]._replace(size=size, copies=1)], Lease())
        with pytest.raises(ResourceLimitError, match=f"mapping {size} bytes: "):
            HostMapping(0, size, writable=False)


def test_another_failure_to_reserve_addresses_is_no_limit(
    wanted: list[SegmentToMap], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(size: int, alignment: int) -> int:
        raise PermissionError(f"{size} bytes at {alignment}")

    monkeypatch.setattr(host, "reserve", refuse)
    with pytest.raises(PermissionError, match=f"{14 * PAGE} bytes at {PAGE}"):
        MappedHostSegments(wanted, Lease())


# -- populate ----------------------------------------------------------------------------------------------------------


def present(address: int, pages: int) -> list[int]:
    """Which pages of a mapping this process has mapped."""
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(address // PAGE * 8)
        entries = file.read(pages * 8)
    return [page for page in range(pages) if entries[page * 8 + 7] & 0x80]


@pytest.fixture
def sparse() -> Iterator[int]:
    """A memfd of 200 pages, of which 1, 2, 65 and 129 have memory: a fault maps what lies around it, up to 16 pages."""
    descriptor = os.memfd_create("t")
    os.ftruncate(descriptor, 200 * PAGE)
    for page in (1, 2, 65, 129):
        os.pwrite(descriptor, b"x" * PAGE, page * PAGE)
    yield descriptor
    os.close(descriptor)


def test_populate_maps_the_pages_of_ranges_and_allocates_none(sparse: int) -> None:
    mapping = HostMapping(sparse, 200 * PAGE, writable=True)
    at, before = mapping.address, os.fstat(sparse).st_blocks
    assert present(at, 200) == []
    host.populate([(at + PAGE, 10), (at + PAGE + 256, PAGE), (at + 65 * PAGE + 256, 256)])
    assert present(at, 200) == [1, 2, 65]
    assert os.fstat(sparse).st_blocks == before, "a hole has no memory now, either"


def test_populate_calls_once_for_what_lies_together(sparse: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(host, "populate_read", lambda address, size: calls.append((address, size)))
    host.populate((64 * PAGE + 256 * number, 256) for number in range(10_000))
    host.populate([(PAGE, 1), (3 * PAGE, 2 * PAGE)])
    host.populate([])
    assert calls == [(64 * PAGE, 625 * PAGE), (PAGE, PAGE), (3 * PAGE, 2 * PAGE)]
    calls.clear()
    host.populate([(PAGE, 600 << 20)])
    assert [size >> 20 for _, size in calls] == [256, 256, 88]
    assert [address for address, _ in calls] == [PAGE, PAGE + (256 << 20), PAGE + (512 << 20)]


def test_pages_beyond_the_end_of_a_file_cannot_be_populated(sparse: int) -> None:
    mapping = HostMapping(sparse, 202 * PAGE, writable=True)
    with pytest.raises(WeightdError, match=r"populating 8192 bytes failed: Bad address; attach without populate"):
        host.populate([(mapping.address + 200 * PAGE, 2 * PAGE)])


@pytest.mark.parametrize(
    ("code", "kind", "says"),
    [
        (errno.EINVAL, WeightdError, r"populate needs Linux 5\.14, and this is .*; attach without populate"),
        (errno.ENOMEM, ResourceLimitError, "populating 4096 bytes: "),
    ],
)
def test_an_old_kernel_and_a_full_one_are_named(
    monkeypatch: pytest.MonkeyPatch, code: int, kind: type[WeightdError], says: str
) -> None:
    def fail(address: int, size: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(host, "populate_read", fail)
    with pytest.raises(kind, match=says):
        host.populate([(PAGE, 1)])
