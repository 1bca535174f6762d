"""Host memory: maps the daemon's read-only descriptors with libc's mmap.

Segments are mapped MAP_PRIVATE, so a write makes a private copy of its page, and MAP_NORESERVE, so the mapping is not
counted as memory that might be needed.

Who keeps whom: a tensor keeps its segment's buffer, the buffer keeps the mapping, the mapping keeps the lease. Each
goes when the last thing that needs it is gone, in whatever order things are dropped.
"""

from __future__ import annotations

import errno
import mmap
import os
import weakref
from typing import TYPE_CHECKING, Final

from weightd._libc import map_private, populate_read, reserve, unmap, view_at
from weightd._limits import limit_error
from weightd.errors import ServerError, WeightdError

from .ranges import MappedRange

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from .segments import SegmentToMap


_ALIGNMENT: Final = 2 << 20
"""Bytes: the kernel maps huge pages at multiples of it only."""
_POPULATED_AT_ONCE: Final = 256 << 20
"""Bytes; between two calls Python may deliver a signal."""


class HostMapping:
    """Private mapping of a whole file; unmapped when nothing refers to it. `keeps` is what must outlive it.

    Errors: ResourceLimitError (no address space or mapping left), OSError.
    """

    def __init__(
        self, descriptor: int, size: int, *, writable: bool, keeps: object = None, at: int | None = None
    ) -> None:
        self._address: int | None = None
        self.size = size
        self._keeps = keeps
        # Bound here: at the interpreter's end module globals may be gone before the last tensor.
        self._unmap = unmap
        try:
            self._address = map_private(descriptor, size, writable=writable, at=at)
        except OSError as error:
            if limit := limit_error(error, f"mapping {size} bytes"):
                raise limit from error
            raise

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Unmap now; nobody may use a buffer of it any more."""
        if self._address is not None:
            self._unmap(self._address, self.size)
            self._address = None

    @property
    def address(self) -> int:
        """Where it is mapped; 0 once it is closed."""
        return self._address or 0

    def buffer(self) -> memoryview:
        """The mapped bytes. The view, and every slice of it, keeps the mapping."""
        return view_at(self.address, self.size, self)


def map_lease(descriptor: int, size: int) -> HostMapping:
    """Map what is locked: as long as the mapping lives, so does the kernel lock that is this process's lease."""
    return HostMapping(descriptor, size, writable=False)


def map_segment(descriptor: int, size: int, lease: object, at: int) -> HostMapping:
    """Map a segment at a reserved address, copy-on-write; the mapping keeps the lease."""
    return HostMapping(descriptor, size, writable=True, keeps=lease, at=at)


def populate(ranges: Iterable[tuple[int, int]]) -> None:
    """Have the kernel map the pages of attached ranges (address, bytes; by address) now, and not at the first access.

    Nothing beside these ranges is touched: to read a hole of a segment would allocate a page for it. Errors:
    ResourceLimitError, WeightdError (the kernel is older than Linux 5.14, or a page cannot be read).
    """
    for start, stop in _page_runs(ranges):
        for address in range(start, stop, _POPULATED_AT_ONCE):
            size = min(_POPULATED_AT_ONCE, stop - address)
            try:
                populate_read(address, size)
            except OSError as error:
                if error.errno == errno.EINVAL:
                    raise WeightdError(
                        f"populate needs Linux 5.14, and this is {os.uname().release}; attach without populate"
                    ) from error
                if limit := limit_error(error, f"populating {size} bytes"):
                    raise limit from error
                raise WeightdError(
                    f"populating {size} bytes failed: {error.strerror}; attach without populate"
                ) from error


def _page_runs(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The pages of ranges that are in order, joined where they touch: begin and end of each run."""
    begin = end = 0
    for address, length in ranges:
        first = address // mmap.PAGESIZE * mmap.PAGESIZE
        if first > end:
            if end:
                yield begin, end
            begin = first
        end = max(end, first + _whole_pages(address + length - first))
    if end:
        yield begin, end


class MappedHostSegments:
    """Map the segments of one attachment in host memory; see `segments.MappedSegments`."""

    torch_device = "cpu"
    peers = ()

    def __init__(self, wanted: Sequence[SegmentToMap], lease: object) -> None:
        self._buffers: dict[tuple[int, int], memoryview] = {}
        self._ranges: dict[tuple[int, int], MappedRange] = {}
        if min((one.size for one in wanted), default=1) <= 0:
            raise ServerError("the daemon sent a segment without bytes")
        size = sum(_whole_pages(one.size) * one.copies for one in wanted)
        if not size:
            return
        try:
            place = reserve(size, _ALIGNMENT if size >= _ALIGNMENT else mmap.PAGESIZE)
        except OSError as error:
            if limit := limit_error(error, f"mapping {size} bytes"):
                raise limit from error
            raise
        end = place + size
        try:
            for one in wanted:
                assert isinstance(one.handle, int)  # `open_segments` has looked
                for copy in range(one.copies):
                    mapping = map_segment(one.handle, one.size, lease, place)
                    place += _whole_pages(one.size)  # at once: what is mapped is unmapped by its mapping
                    if os.fstat(one.handle).st_size < one.size:  # reading past a file's end kills the process
                        raise ServerError(f"the daemon sent a segment that lacks some of the {one.size} bytes it says")
                    self._ranges[one.segment, copy] = MappedRange(mapping.address, one.size, weakref.ref(mapping))
                    self._buffers[one.segment, copy] = mapping.buffer()
        except BaseException:
            unmap(place, end - place)
            raise

    def ranges(self) -> list[MappedRange]:
        """One for each mapping."""
        return list(self._ranges.values())

    def places(self) -> dict[tuple[int, int], tuple[int, int]]:
        """Address and length of each mapping, by segment and copy."""
        return {key: (one.address, one.size) for key, one in self._ranges.items()}

    def buffer(self, segment: int, copy: int, offset: int, length: int) -> memoryview:
        """The bytes, copy-on-write."""
        return self._buffers[segment, copy][offset : offset + length]


def _whole_pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
