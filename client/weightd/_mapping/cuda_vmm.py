"""GPU memory shared by CUDA's virtual memory management: imports the daemon's descriptors and maps them read-only.

Who keeps whom: a tensor keeps its `cuda.core.Buffer`, that keeps the `MappedVmmSegments`, which keep the lease. When
the last buffer is gone, `cuda_release` waits for the work that may read the memory, everything is unmapped, and only
then does the lease go: what no lease covers may be refilled.
"""

from __future__ import annotations

import sys
import weakref
from typing import TYPE_CHECKING, Any

from . import cuda_driver, cuda_release, cuda_streams
from .cuda_segments import MappedCudaSegments
from .ranges import MappedRange

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .segments import SegmentToMap


class MappedVmmSegments(MappedCudaSegments):
    """Map the segments of one attachment into one range of GPU addresses; see `segments.MappedSegments`."""

    def __init__(self, uuid: str, wanted: Sequence[SegmentToMap], lease: object, *, peers: bool) -> None:
        super().__init__(uuid)
        self._range: cuda_driver.MappedAddressRange | None = None
        self._offsets: dict[tuple[int, int], tuple[int, int]] = {}
        if not wanted:
            return
        self._lease = lease
        self._size = sum(one.size for one in wanted)
        """Bytes of memory, however often it is mapped."""
        try:
            # torch's own context must be there before anything is mapped.
            with cuda_driver.on_device(self._ordinal), cuda_streams.relaxed():
                cuda_release.prepare(self._ordinal)
                if peers:
                    self._peers = tuple(cuda_driver.peers_of(self._ordinal))
                addresses = sum(one.size * one.copies for one in wanted)
                self._range = cuda_driver.MappedAddressRange(self._ordinal, addresses)
                self._map(self._range, wanted)
        except BaseException:
            self._give_back()
            raise

    def __del__(self, at_exit: Callable[[], bool] = sys.is_finalizing) -> None:
        # At the interpreter's end the driver may be gone before us, and the end of the process unmaps everything.
        if not at_exit():
            self._give_back()

    def _give_back(self) -> None:
        mapped, self._range = self._range, None
        if mapped is not None:
            cuda_release.finish(
                self._ordinal,
                mapped.close,
                readers=self._readers,
                size=self._size,
                peers=self._peers,
                keeps=self._lease,
            )

    def ranges(self) -> list[MappedRange]:
        """One for all."""
        return [] if self._range is None else [MappedRange(self._range.address, self._range.size, weakref.ref(self))]

    def places(self) -> dict[tuple[int, int], tuple[int, int]]:
        """Address and length of each mapping, by segment and copy."""
        start = 0 if self._range is None else self._range.address
        return {key: (start + offset, size) for key, (offset, size) in self._offsets.items()}

    def buffer(self, segment: int, copy: int, offset: int, length: int) -> Any:
        """A `cuda.core.Buffer`. A write through it kills this process's CUDA context."""
        cuda_driver.initialise()  # before any lock, which another thread may have held when this process was forked
        place, _ = self._offsets[segment, copy]
        assert self._range is not None  # there is a place in it
        self._note_reader()
        return self._make_buffer(self._ordinal, self._range.address + place + offset, length, self)

    def _map(self, addresses: cuda_driver.MappedAddressRange, wanted: Sequence[SegmentToMap]) -> None:
        offset = 0
        for one in wanted:
            assert isinstance(one.handle, int)  # `open_segments` has looked
            allocation = cuda_driver.import_descriptor(one.handle)
            try:
                for copy in range(one.copies):
                    addresses.map(offset, one.size, allocation)
                    self._offsets[one.segment, copy] = offset, one.size
                    offset += one.size
            finally:
                cuda_driver.release(allocation)
        addresses.allow(writable=False, peers=self._peers)
