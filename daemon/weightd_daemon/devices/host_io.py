"""A loader's access to host memory: pieces go through a buffer that stays in the CPU cache.

`pwrite` is the fast way into a memfd: no page faults, no page tables; page allocation is what filling a fresh memfd
costs, a copy that stays in the cache costs nothing beside it (measured). With shmem_enabled = always or within_size the
kernel uses huge pages for it by itself. With `advise` it wants to be asked through a mapping, so there bytes are copied
into one that carries MADV_HUGEPAGE: the first touch of 1 GiB by a client then takes 12 ms instead of 74 (measured).
"""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from weightd._libc import address_of
from weightd_daemon.libc import copy

from .segment_io import PIECE, DeviceStagingBuffer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .device import DeviceSegment

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


def huge_pages_by_advice() -> bool:
    """Whether this kernel gives shared memory huge pages only where a mapping asks for them."""
    try:
        return "[advise]" in _SETTING.read_text()
    except OSError:
        return False


class _HostBuffer:
    """A page-aligned buffer of one piece."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, PIECE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.view = memoryview(self._map)
        self.address = address_of(self._map)


class HostSegmentIO:
    """Reads and writes host memory's segments, memfds. Nothing is asynchronous here.

    For the methods see devices/segment_io.py.
    """

    def __init__(self, segments: Mapping[int, DeviceSegment], *, by_mapping: bool | None = None) -> None:
        self._segments = segments
        self._by_mapping = huge_pages_by_advice() if by_mapping is None else by_mapping
        self._lock = threading.Lock()
        self._addresses: dict[int, int] = {}
        self._maps: list[mmap.mmap] = []

    def staging(self) -> _HostStaging:
        """Buffers for one thread."""
        return _HostStaging(self)

    def write(self, segment: int, view: memoryview, source: int, offset: int) -> None:
        """Write `view`, which lies at address `source`, to `offset` of a segment."""
        if self._by_mapping:
            copy(self._address(segment) + offset, source, len(view))
            return
        done = 0
        while done < len(view):
            done += os.pwrite(self._descriptor(segment), view[done:], offset + done)

    def read(self, segment: int, view: memoryview, offset: int) -> None:
        """Fill `view` from `offset` of a segment."""
        if os.preadv(self._descriptor(segment), [view], offset) != len(view):
            raise OSError(f"segment {segment} is shorter than its books")

    def close(self) -> None:
        """Let the mappings go; each goes with the last thing that uses it."""
        self._addresses.clear()
        self._maps.clear()

    def _descriptor(self, segment: int) -> int:
        handle = self._segments[segment].handle
        assert isinstance(handle, int)  # host memory is handed out by descriptor
        return handle

    def _address(self, segment: int) -> int:
        with self._lock:
            if segment not in self._addresses:
                mapped = mmap.mmap(self._descriptor(segment), 0)
                mapped.madvise(mmap.MADV_HUGEPAGE)
                self._maps.append(mapped)
                self._addresses[segment] = address_of(mapped)
            return self._addresses[segment]


class _HostStaging:
    """One thread's buffers. The one that was used last is given out first: it is still in the cache."""

    def __init__(self, io: HostSegmentIO) -> None:
        self._io = io
        self._free: list[DeviceStagingBuffer] = []

    def acquire(self) -> DeviceStagingBuffer:
        """A buffer."""
        return self._free.pop() if self._free else _HostBuffer()

    def put_back(self, buffer: DeviceStagingBuffer) -> None:
        """Keep it for the next `acquire`."""
        self._free.append(buffer)

    def write(self, buffer: DeviceStagingBuffer, size: int, segment: int, offset: int) -> None:
        """Write at once."""
        self._io.write(segment, buffer.view[:size], buffer.address, offset)
        self.put_back(buffer)

    def read(self, buffer: DeviceStagingBuffer, size: int, segment: int, offset: int) -> None:
        """Read at once."""
        self._io.read(segment, buffer.view[:size], offset)

    def synchronize(self) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """Let the buffers go."""
        self._free.clear()
