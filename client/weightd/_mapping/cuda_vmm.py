"""GPU memory shared by CUDA's virtual memory management: imports the daemon's descriptors and maps them read-only.

Who keeps whom: a tensor keeps its `cuda.core.Buffer`, that keeps `MappedVmmSegments`, and they keep the lease. When the
last buffer is gone the device is synchronised, everything is unmapped, and only then does the lease go: what no lease
covers may be refilled, and a kernel may still be reading it.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from typing import TYPE_CHECKING, Any

from weightd.errors import DeviceError

from . import cuda_driver
from .cuda_segments import MappedCudaSegments
from .ranges import MappedRange

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .segments import SegmentToMap


class MappedVmmSegments(MappedCudaSegments):
    """Map the segments of one attachment into one range of GPU addresses; see `segments.MappedSegments`."""

    def __init__(self, uuid: str, wanted: Sequence[SegmentToMap], lease: object) -> None:
        super().__init__(uuid)
        self._range: cuda_driver.MappedAddressRange | None = None
        self._offsets: dict[tuple[int, int], tuple[int, int]] = {}
        if not wanted:
            return
        self._lease = lease
        try:
            cuda_driver.finish_postponed(self._ordinal)
            with cuda_driver.on_device(self._ordinal):  # torch's own context must be there before anything is mapped
                size = sum(one.size * one.copies for one in wanted)
                self._range = cuda_driver.MappedAddressRange(self._ordinal, size)
                self._map(self._range, wanted)
        except BaseException:
            if self._range is not None:
                with contextlib.suppress(DeviceError):
                    self._range.close()
                self._range = None
            raise

    def __del__(self, at_exit: Callable[[], bool] = sys.is_finalizing) -> None:
        # At the interpreter's end the driver may be gone before us, and the end of the process unmaps everything.
        if self._range is not None and not at_exit():
            cuda_driver.finish(self._ordinal, self._range.close, keeps=self._lease)

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
        addresses.allow(writable=False)
