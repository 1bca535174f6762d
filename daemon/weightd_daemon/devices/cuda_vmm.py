"""GPU memory shared by CUDA's virtual memory management: a segment is one allocation, shared as a descriptor.

The daemon allocates and exports, and never has a context: that would take 100 to 600 MiB of the GPU and die with the
first error that sticks. The driver counts who maps, imports or holds a descriptor of an allocation, across processes,
and frees it after the last; so memory that was released lives on under a client's mapping.
"""

from __future__ import annotations

import logging
import os
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

from weightd._mapping import cuda_driver as driver
from weightd.errors import DeviceError

from .cuda_device import CudaDevice
from .opening_thread import next_call

if TYPE_CHECKING:
    from .absent import StandInDevice

log = logging.getLogger(__name__)


class _Segment(NamedTuple):
    size: int
    allocation: driver.Allocation
    descriptor: int


class CudaVmmDevice(CudaDevice):
    """A GPU whose memory is shared by VMM descriptors. `ordinal` is this process's number of it.

    For the methods see devices/device.py.
    """

    kind = "cuda_vmm"
    lasting = True
    note = ""
    creates_by = "cuMemCreate"
    releases_by = "cuMemRelease"

    def __init__(self, ordinal: int) -> None:
        """Errors: DeviceMismatchError (no such GPU), DeviceError."""
        super().__init__(ordinal)
        next_call("cuMemGetAllocationGranularity")
        self.page = driver.granularity(ordinal)
        self._ordinal = ordinal
        self._numbers = count(1)
        self._segments: dict[int, _Segment] = {}

    def create(self, size: int) -> int:
        """Allocate `size` bytes of zeroes and export them."""
        with self._allocating(size):
            allocation = driver.create(self._ordinal, size)
        try:
            descriptor = driver.export(allocation)
        except BaseException:
            driver.release(allocation)
            raise
        segment = next(self._numbers)
        self._segments[segment] = _Segment(size, allocation, descriptor)
        return segment

    def adopt(self, descriptor: int, size: int) -> int:
        """Import an allocation that an earlier daemon exported, and go on handing out that very descriptor.

        That `size` is its size is believed: no function of the driver tells. A wrong one fails where it is mapped.
        """
        allocation = self._imported(descriptor)
        segment = next(self._numbers)
        self._segments[segment] = _Segment(size, allocation, descriptor)
        return segment

    def import_held(self, held: StandInDevice) -> dict[int, driver.Allocation]:
        """Import every segment that a stand-in holds. Returns the allocations, by its numbers, for `take_over`.

        All or none; on any thread. Errors: DeviceError.
        """
        imported: dict[int, driver.Allocation] = {}
        try:
            for segment, size, descriptor in held.duplicates():
                try:
                    self.calls.next_call()
                    if size % self.page:
                        raise DeviceError(f"a segment of {size} bytes is no whole pages of {self.page} bytes")
                    imported[segment] = self._imported(descriptor)
                finally:
                    os.close(descriptor)
        except BaseException:
            self.release_imported(imported)
            raise
        return imported

    def take_over(self, held: StandInDevice, imported: dict[int, driver.Allocation]) -> None:
        """Have the segments of a stand-in, under its numbers, before any other. What it released meanwhile goes."""
        for segment, (descriptor, size) in held.hand_over().items():
            self._segments[segment] = _Segment(size, imported.pop(segment), descriptor)
        if imported:
            self.give_up(imported)
        self._numbers = count(max(self._segments, default=0) + 1)

    def give_up(self, imported: dict[int, driver.Allocation]) -> None:
        """Begin to release allocations that are not taken over."""
        self.calls.post(self.releases_by, partial(self.release_imported, imported))

    def release_imported(self, imported: dict[int, driver.Allocation]) -> None:
        """Release allocations that are not taken over; a step for `calls`. What is refused ends with this process."""
        while imported:
            _, allocation = imported.popitem()
            self.calls.next_call()
            try:
                driver.release(allocation)
            except DeviceError as error:
                log.warning("device %s: an imported segment is not given back: %s", self.uuid, error)

    def writable(self, segment: int) -> int:
        """The exported descriptor; how it is mapped is the importer's choice."""
        return self._segments[segment].descriptor

    shared = writable

    def allocated(self, segment: int) -> int:
        """All of it, always."""
        return self._segments[segment].size

    def _imported(self, descriptor: int) -> driver.Allocation:
        """The allocation of a descriptor, which must lie on this GPU. Errors: DeviceError."""
        allocation = driver.import_descriptor(descriptor)
        ordinal = driver.ordinal_of_allocation(allocation)
        if ordinal not in (None, self._ordinal):
            driver.release(allocation)
            raise DeviceError(f"a segment that is kept for {self.uuid} (cuda:{self._ordinal}) lies on cuda:{ordinal}")
        return allocation

    def release(self, segment: int) -> None:
        """Close the descriptor and give the allocation up."""
        _, allocation, descriptor = self._segments.pop(segment)
        os.close(descriptor)
        driver.release(allocation)

    def close(self) -> None:
        """Begin to release every segment. What the driver refuses, or does not answer, ends with this process."""
        self.calls.post(self.releases_by, self._release_all)
        self.calls.stop()

    def _release_all(self) -> None:
        for segment in list(self._segments):
            self.calls.next_call()
            try:
                self.release(segment)
            except DeviceError as error:
                log.warning("device %s: a segment is not given back before the end: %s", self.uuid, error)
