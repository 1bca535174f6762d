"""Writing into segments, with huge pages where the kernel gives them.

`pwrite` is the fast way into a memfd: no page faults, no page tables. With shmem_enabled = always or within_size the
kernel uses huge pages for it by itself. With `advise` it wants to be asked through a mapping, so there bytes are copied
into one that carries MADV_HUGEPAGE: the first touch of 1 GiB by a client then takes 12 ms instead of 74 (measured).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from pathlib import Path

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


def huge_pages_by_advice() -> bool:
    """Whether this kernel gives shared memory huge pages only where a mapping asks for them."""
    try:
        return "[advise]" in _SETTING.read_text()
    except OSError:
        return False


class Target:
    """The segments of a load, for writing. `segments` are their descriptors by number."""

    def __init__(self, segments: dict[int, int], *, by_mapping: bool) -> None:
        self._segments = segments
        self._by_mapping = by_mapping
        self._lock = threading.Lock()
        self._addresses: dict[int, int] = {}
        self._maps: list[mmap.mmap] = []

    def write(self, segment: int, view: memoryview, source: int, offset: int) -> None:
        """Write `view`, which lies at address `source`, to `offset` of a segment."""
        if self._by_mapping:
            ctypes.memmove(self._address(segment) + offset, source, len(view))  # releases the GIL; slices do not
            return
        done = 0
        while done < len(view):
            done += os.pwrite(self._segments[segment], view[done:], offset + done)

    def _address(self, segment: int) -> int:
        with self._lock:
            if segment not in self._addresses:
                mapped = mmap.mmap(self._segments[segment], 0)
                mapped.madvise(mmap.MADV_HUGEPAGE)
                self._maps.append(mapped)
                self._addresses[segment] = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
            return self._addresses[segment]
