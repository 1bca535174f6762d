"""The interface of mapped segments, the same for every kind of device memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from .ranges import MappedRange

Memory = memoryview | Any
"""A memoryview on the host, a `cuda.core.Buffer` on a GPU; `Any` for that one, which is not installed everywhere."""


class SegmentToMap(NamedTuple):
    """Segment to map: its number in the manifest, its bytes, its descriptor or CUDA IPC handle, and how often.

    `copies` is how many names at most have one address in it: each needs an address of its own.
    """

    segment: int
    size: int
    handle: int | bytes
    copies: int


class MappedSegments(Protocol):
    """Segments mapped into the client. Buffers keep alive the mappings that they need, and the lease."""

    @property
    def torch_device(self) -> str:
        """What torch calls the device in this process: "cpu", "cuda:1"."""

    @property
    def peers(self) -> tuple[str, ...]:
        """What torch calls the other devices that were allowed to access the memory."""

    def ranges(self) -> list[MappedRange]:
        """Everything that is mapped."""

    def places(self) -> dict[tuple[int, int], tuple[int, int]]:
        """Address and length of each mapping, by segment and copy."""

    def buffer(self, segment: int, copy: int, offset: int, length: int) -> Memory:
        """`length` bytes, not 0, at an offset of a segment; `copy` is less than the segment's `copies`.

        Errors: KeyError (the segment is not mapped), DeviceError, ForkedError (the GPU's memory is the parent's).
        """
