"""Host memory: segments are memfds, sealed against resizing and exported read-only.

Other users get a descriptor that they can neither write, re-open for writing nor chmod: the file has mode 0400 and the
descriptor is a second one, opened O_RDONLY (docs/security.md says against whom that holds). A client maps it
MAP_PRIVATE, so a write makes a private copy.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
from itertools import count
from pathlib import Path

from weightd import _failpoints
from weightd._limits import DAEMON, limit_error
from weightd.errors import DeviceError, ResourceLimitError
from weightd_daemon.libc import punch_hole

from .cgroup import memory_limit
from .driver_thread import AnyThread

_HUGE_PAGES = "/sys/kernel/mm/transparent_hugepage"
_NO_DESCRIPTORS = {errno.EMFILE, errno.ENFILE}
_EXHAUSTED = {errno.ENOMEM, errno.ENOSPC, *_NO_DESCRIPTORS}
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class _NoDescriptorsError(ResourceLimitError, MemoryError):
    """There are no descriptors for a segment. An eviction may free some, as with any MemoryError of a device."""


class HostDevice:
    """The machine's memory as a device.

    For the methods see devices/device.py.
    """

    uuid = "host"
    kind = "host"
    name = "host memory"
    note = ""
    sparse = True
    lasting = True
    default_share = 0.5
    creates_by = "memfd_create"
    releases_by = "fallocate"
    loader_bytes = 0

    def __init__(self) -> None:
        self.calls = AnyThread()
        self.page = _page_size()
        self._numbers = count(1)
        self._writable: dict[int, int] = {}
        self._shared: dict[int, int] = {}

    def open_node(self) -> None:
        """Host memory has none."""

    def capacity(self) -> int:
        """The machine's memory, or the limit of this process's cgroups where that is lower."""
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        limit = memory_limit()
        return total if limit is None else min(total, limit)

    def available(self) -> int | None:
        """What the kernel would give without swapping."""
        try:
            text = Path("/proc/meminfo").read_text()
        except OSError:
            return None
        match = re.search(r"^MemAvailable:\s+(\d+) kB$", text, re.MULTILINE)
        return int(match[1]) * 1024 if match else None

    async def refresh(self) -> None:
        """The kernel is asked each time."""

    def create(self, size: int) -> int:
        """Make a memfd of `size` bytes; it takes memory only as it is written."""
        segment = next(self._numbers)
        descriptor = -1
        try:
            _failpoints.reach("load.segment")
            descriptor = os.memfd_create(f"weightd-{segment}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(descriptor, size)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
            os.fchmod(descriptor, 0o400)
            shared = _reopened(descriptor)
        except OSError as error:
            if descriptor >= 0:
                os.close(descriptor)
            if error.errno in _EXHAUSTED:
                if error.errno in _NO_DESCRIPTORS and (limit := limit_error(error, "making a segment", DAEMON)):
                    raise _NoDescriptorsError(limit.message, limit.metadata) from error
                raise MemoryError(f"no segment of {size} bytes: {error.strerror}") from error
            raise
        self._writable[segment], self._shared[segment] = descriptor, shared
        return segment

    def adopt(self, descriptor: int, size: int) -> int:
        """Take over a memfd that `create` made. Errors: DeviceError."""
        try:
            status = os.fstat(descriptor)
            sealed = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & (_SEALS | fcntl.F_SEAL_WRITE) == _SEALS
            to_write = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
            if not (sealed and to_write and stat.S_IMODE(status.st_mode) == 0o400 and status.st_size == size):
                raise DeviceError(f"descriptor {descriptor} is no segment of {size} bytes of host memory")
            shared = _reopened(descriptor)
        except OSError as error:  # F_GET_SEALS: it is no memfd
            raise DeviceError(f"descriptor {descriptor} cannot be taken over: {error.strerror}") from error
        segment = next(self._numbers)
        self._writable[segment], self._shared[segment] = descriptor, shared
        return segment

    def hollow(self, segment: int) -> list[tuple[int, int]]:
        """What the kernel calls holes."""
        descriptor, position = self._writable[segment], 0
        size = os.fstat(descriptor).st_size
        found: list[tuple[int, int]] = []
        while position < size:
            try:
                start = os.lseek(descriptor, position, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                start = size  # no data from here on
            if position < start:
                found.append((position, start))
            position = os.lseek(descriptor, start, os.SEEK_HOLE) if start < size else size
        return found

    def writable(self, segment: int) -> int:
        """The descriptor that the segment was made with."""
        return self._writable[segment]

    def shared(self, segment: int) -> int:
        """The read-only descriptor."""
        return self._shared[segment]

    def allocated(self, segment: int) -> int:
        """Allocated blocks, as the kernel counts them."""
        return os.fstat(self._writable[segment]).st_blocks * 512

    def punch(self, segment: int, offset: int, length: int) -> None:
        """Punch a hole of whole pages. Errors: OSError."""
        try:
            punch_hole(self._writable[segment], offset, length)
        except OSError as error:
            error.filename = f"segment {segment}"
            raise

    def release(self, segment: int) -> None:
        """Close both descriptors; the kernel frees the pages when nobody maps them."""
        os.close(self._shared.pop(segment))
        os.close(self._writable.pop(segment))

    def close(self) -> None:
        """Release every segment."""
        for segment in list(self._writable):
            self.release(segment)


def _reopened(descriptor: int) -> int:
    """A second descriptor of a file, for reading only."""
    return os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)


def _page_size() -> int:
    """Bytes in which the kernel gives shared memory: huge pages where it may use them, so that the books stay exact."""
    try:
        enabled = Path(f"{_HUGE_PAGES}/shmem_enabled").read_text()
        huge = int(Path(f"{_HUGE_PAGES}/hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE")
    return os.sysconf("SC_PAGE_SIZE") if "[never]" in enabled or "[deny]" in enabled else huge
