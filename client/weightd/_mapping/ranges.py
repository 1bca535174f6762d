"""The address ranges of attached memory in this process, and the pages of them that it has written to."""

from __future__ import annotations

import os
import resource
import sys
from bisect import bisect_right
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    import weakref
    from collections.abc import Iterable

_PAGE: Final = resource.getpagesize()
_ENTRY: Final = 8
_CHUNK: Final = 1 << 20
"""Pages that are asked about at a time."""
_FLAGS: Final = 7 if sys.byteorder == "little" else 0
"""Which byte of an entry of /proc/self/pagemap has the flags."""
_PRESENT, _SWAPPED, _OF_FILE = 0x80, 0x40, 0x20
_OWN: Final = bytes(bool(flags & (_PRESENT | _SWAPPED)) and not flags & _OF_FILE for flags in range(256))
"""For each value of that byte, whether the page is this process's own copy and no longer the file's."""


class MappedRange(NamedTuple):
    """Address range of attached memory. It is valid while `owner` exists; afterwards other memory may lie there."""

    address: int
    size: int
    owner: weakref.ref[Any]


class MappedExtents:
    """Sorted, joined address ranges of attached memory. `hold` is a lookup, however many ranges there are."""

    def __init__(self, ranges: Iterable[MappedRange]) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        for start, end in sorted((address, address + size) for address, size, _ in ranges):
            if self._ends and start <= self._ends[-1]:
                self._ends[-1] = max(self._ends[-1], end)
            else:
                self._starts.append(start)
                self._ends.append(end)

    def hold(self, address: int, length: int) -> bool:
        """Whether `length` bytes at an address lie in the ranges, all of them."""
        at = bisect_right(self._starts, address) - 1
        return at >= 0 and address + length <= self._ends[at]


def written(address: int, length: int) -> int | None:
    """How many bytes of host memory that is mapped copy-on-write lie in pages that a write has made private.

    The kernel copies pages, so bytes beside what was written count as well. It takes some 20 ms for a GiB. None where
    the kernel does not tell (no /proc/self/pagemap).
    """
    first, last = address // _PAGE, (address + length - 1) // _PAGE
    found = 0
    try:
        descriptor = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        for start in range(first, last + 1, _CHUNK):
            count = min(_CHUNK, last + 1 - start)
            entries = os.pread(descriptor, count * _ENTRY, start * _ENTRY)
            if len(entries) != count * _ENTRY:
                return None
            own = entries[_FLAGS::_ENTRY].translate(_OWN)
            found += own.count(1) * _PAGE
            if start == first and own[0]:
                found -= address - first * _PAGE
            if start + count == last + 1 and own[-1]:
                found -= (last + 1) * _PAGE - (address + length)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return found
