"""How a loader reads, writes and compares segments, for each kind of memory.

A copy between a buffer and a segment may be asynchronous: it counts as done after `synchronize`. So a thread reads and
hashes its next piece while the piece before is on its way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from weightd.errors import DeviceError

    OnFull = Callable[[DeviceError], None]
    """Called when the driver has no memory for what the loader itself needs. Returns when it is worth another try.

    Any thread may call it. Errors: CapacityError (there is no room to be had).
    """

PIECE = 1 << 20
"""Bytes of a buffer: large enough for the system calls, small enough for the second-level cache."""


class DeviceStagingBuffer(Protocol):
    """Page-aligned buffer of PIECE bytes from which memory is copied to a device."""

    view: memoryview
    address: int


class DeviceStaging(Protocol):
    """One thread's buffers and copies to and from a device. After an error of a copy only `close` may be called."""

    def acquire(self) -> DeviceStagingBuffer:
        """A buffer for the caller's use, until it is written or put back; waits for a copy where all are taken."""

    def put_back(self, buffer: DeviceStagingBuffer) -> None:
        """The buffer is not needed any more."""

    def write(self, buffer: DeviceStagingBuffer, size: int, segment: int, offset: int) -> None:
        """Copy the first `size` bytes to `offset` of a segment. The buffer is put back when that is done."""

    def read(self, buffer: DeviceStagingBuffer, size: int, segment: int, offset: int) -> None:
        """Fill the first `size` bytes from `offset` of a segment. The buffer stays the caller's."""

    def synchronize(self) -> None:
        """Wait until everything written and read is where it belongs. Errors: DeviceError."""

    def close(self) -> None:
        """Give the buffers up, whatever is under way."""


class DeviceSegmentIO(Protocol):
    """Reads and writes the segments of one device, which are opened as they are first used."""

    def staging(self) -> DeviceStaging:
        """Buffers for one thread: at least three."""

    def close(self) -> None:
        """Close the segments that were opened. All stagings must be closed before."""
