"""The protocol of a device. One contract suite (tests/contract/test_device.py) tests its three implementations."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

Handle = int | bytes
"""What opens a segment in another process: a descriptor (host, cuda_vmm), or the 64 bytes of CUDA IPC (cuda_ipc)."""


class DeviceSegment(NamedTuple):
    """A device's segment as a loader opens it: its number, its length in bytes, and its descriptor or IPC handle."""

    number: int
    size: int
    handle: Handle


class Calls(Protocol):
    """Takes steps of a device off the loop, for they may take long; on the loop's thread."""

    problem: str
    """What the device does not answer, and since when, for people; empty while it answers."""
    on_change: Callable[[], None]
    """Told when `problem` has changed."""

    async def run(self, call: str, step: Callable[[], T]) -> T:
        """Take a step on another thread. `call` names it, for people. Errors: those of the step."""

    def check(self) -> None:
        """Errors: DeviceAbsentError, while the device does not answer."""


class Device(Protocol):
    """A kind of memory: creates, exports and frees segments. Segments go by number; sizes and offsets are bytes.

    `create`, `punch` and `release` may take long, and are steps for `calls`; the daemon calls the rest on its loop.
    """

    uuid: str
    """How clients name the device: the driver's UUID, or "host"."""
    kind: str
    """"host", "cuda_vmm" or "cuda_ipc"."""
    name: str
    """Name for people."""
    note: str
    """What people must know of this kind of sharing; empty where there is nothing to say."""
    page: int
    """Bytes in which memory is had and returned; segments are whole pages."""
    sparse: bool
    """Whether a segment takes memory only as it is written, and pages can be punched out of it."""
    lasting: bool
    """Whether a segment lives as long as anybody holds its descriptor, so that the next daemon can adopt it."""
    default_share: float
    """The part of the device that a daemon may use where nobody says."""
    creates_by: str
    """What `create` calls, for people, and what `release` and `punch` do."""
    releases_by: str

    @property
    def calls(self) -> Calls:
        """Where its steps are taken."""

    loader_bytes: int
    """Bytes of the device that a loader may take for itself, beside the segments: its context. An estimate."""

    def open_node(self) -> int | None:
        """Open the device file, which keeps the device initialised as long as it is open; a step for `calls`.

        None where there is none, or nobody knows which it is. The descriptor is the caller's. Errors: OSError.
        """

    def capacity(self) -> int:
        """Bytes that the device has, or may have under the limits of this process."""

    def available(self) -> int | None:
        """Bytes that were free on the device at the last look, whoever uses the rest; None where nobody knows."""

    async def refresh(self) -> None:
        """Look anew what is free. That takes a moment at most, or what was seen last stands."""

    def create(self, size: int) -> int:
        """Make a segment of `size` bytes and return its number. Errors: MemoryError, DeviceError."""

    def adopt(self, descriptor: int, size: int) -> int:
        """Take over a segment that an earlier daemon made, by its `writable` descriptor. Returns its number here.

        The descriptor is the device's own from then on; on an error it stays the caller's. Errors: DeviceError (it is
        no segment of this device, or of that size, or the device cannot take segments over).
        """

    def hollow(self, segment: int) -> list[tuple[int, int]]:
        """The ranges of a segment that have no memory, as (start, end); none where it is not `sparse`."""

    def writable(self, segment: int) -> Handle:
        """What a loader opens the segment with, to write. A descriptor stays the device's own."""

    def shared(self, segment: int) -> Handle:
        """What clients open the segment with, to read. A descriptor stays the device's own."""

    def allocated(self, segment: int) -> int:
        """Bytes of memory behind the segment now."""

    def punch(self, segment: int, offset: int, length: int) -> None:
        """Give whole pages back; they read as zero from then on. Only where `sparse`."""

    def release(self, segment: int) -> None:
        """Give the segment up. Its memory goes when no client maps it any more. Errors: DeviceError."""

    def close(self) -> None:
        """Give everything up."""
