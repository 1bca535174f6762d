"""The part that all GPU devices have in common, whichever transport shares their memory."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Never

from weightd._mapping import cuda_driver as driver
from weightd.errors import DeviceError

from .cuda_errors import OUT_OF_MEMORY, code_of
from .cuda_nvml import free_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator


_CONTEXT_BYTES = 640 << 20
"""What is reported of contexts is 100 to 620 MiB."""
_CONTEXT_SHARE = 16
"""The contexts of small GPUs are smaller: assumed is this part of the GPU."""


class CudaDevice:
    """Base of GPU devices. `ordinal` is this process's number of the GPU.

    For the methods see devices/device.py.
    """

    kind: str
    sparse = False
    lasting: bool
    default_share = 0.8

    def __init__(self, ordinal: driver.Ordinal) -> None:
        """Errors: DeviceMismatchError (no such GPU), DeviceError."""
        self.uuid = driver.uuid_of(ordinal)
        self.name = driver.name_of(ordinal)
        self._capacity = driver.total_memory(ordinal)
        free_bytes(self.uuid)  # NVML opens what it keeps open, and what takes it time, before the daemon is ready
        self.loader_bytes = min(_CONTEXT_BYTES, self._capacity // _CONTEXT_SHARE)

    def capacity(self) -> int:
        """The GPU's memory."""
        return self._capacity

    def available(self) -> int | None:
        """What NVML says."""
        return free_bytes(self.uuid)

    def hollow(self, segment: int) -> list[tuple[int, int]]:
        """None: an allocation is all or nothing."""
        return []

    def punch(self, segment: int, offset: int, length: int) -> Never:
        """An allocation is all or nothing."""
        raise NotImplementedError(f"{self.kind} memory has no holes")

    @contextlib.contextmanager
    def _allocating(self, size: int) -> Iterator[None]:
        """Turn the driver's word that it has no `size` bytes left, although the budget may, into MemoryError."""
        try:
            yield
        except DeviceError as error:
            if code_of(error) != OUT_OF_MEMORY:
                raise
            free = self.available()
            known = "" if free is None else f", {free} bytes are free on it"
            raise MemoryError(
                f"no segment of {size} bytes: {self.uuid} is full{known} ({error.metadata['call']})"
            ) from error
