"""The protocol of a device. Three implementations, one contract suite (tests/contract/test_device.py)."""

from __future__ import annotations

from typing import Protocol


class Device(Protocol):
    """Makes segments, hands them out, takes their memory back. Segments go by number; sizes and offsets are bytes.

    The daemon calls `create`, `writable` and `shared` on its loop; `punch` and `release` may take long (0.15 s per GB
    on the host) and are called on another thread.
    """

    uuid: str
    """How clients name the device: the driver's UUID, or "host"."""
    kind: str
    """"host", "cuda_vmm" or "cuda_ipc"."""
    name: str
    """Name for people."""
    page: int
    """Bytes in which memory is had and returned; segments are whole pages."""
    sparse: bool
    """Whether a segment takes memory only as it is written, and pages can be punched out of it."""

    def capacity(self) -> int:
        """Bytes that the device has, or may have under the limits of this process."""

    def create(self, size: int) -> int:
        """Make a segment of `size` bytes and return its number. Errors: MemoryError."""

    def writable(self, segment: int) -> int:
        """A descriptor for a loader, to write through. It stays the device's own."""

    def shared(self, segment: int) -> int:
        """A descriptor for clients, read-only. It stays the device's own."""

    def allocated(self, segment: int) -> int:
        """Bytes of memory behind the segment now."""

    def punch(self, segment: int, offset: int, length: int) -> None:
        """Give whole pages back; they read as zero from then on."""

    def release(self, segment: int) -> None:
        """Give the segment up. Its memory goes when no client maps it any more."""

    def close(self) -> None:
        """Give everything up."""
