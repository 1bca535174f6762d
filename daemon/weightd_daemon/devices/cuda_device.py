"""The part that all GPU devices have in common, whichever transport shares their memory."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Never

from weightd._mapping import cuda_driver as driver
from weightd.errors import DeviceError

from .cuda_errors import OUT_OF_MEMORY, code_of
from .cuda_node import open_node
from .cuda_nvml import free_bytes
from .driver_thread import DriverThread
from .opening_thread import next_call

if TYPE_CHECKING:
    from collections.abc import Iterator

_LOOKS_BY = "nvmlDeviceGetMemoryInfo"
_LOOK_SECONDS = 0.5
"""How long somebody who looks on waits for NVML."""
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
        next_call("cuDeviceGetUuid")
        self.uuid = driver.uuid_of(ordinal)
        next_call("cuDeviceGetName")
        self.name = driver.name_of(ordinal)
        next_call("cuDeviceTotalMem")
        self._capacity = driver.total_memory(ordinal)
        self.calls = DriverThread(self.uuid)
        self._looking: asyncio.Future[None] | None = None
        self._free: int | None = None
        next_call(_LOOKS_BY)
        self.look()  # NVML opens what it keeps open, and what takes it time, before the daemon is ready
        self.loader_bytes = min(_CONTEXT_BYTES, self._capacity // _CONTEXT_SHARE)

    def open_node(self) -> int | None:
        """Open /dev/nvidiaN. Errors: OSError."""
        return open_node(self.uuid)

    def capacity(self) -> int:
        """The GPU's memory."""
        return self._capacity

    def available(self) -> int | None:
        """What NVML has said last; nobody knows while the GPU does not answer."""
        return None if self.calls.problem else self._free

    async def refresh(self) -> None:
        """Ask NVML anew, once at a time: a monitor may ask while it does not answer."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.ensure_future(self.calls.run(_LOOKS_BY, self.look))
        await asyncio.wait([self._looking], timeout=_LOOK_SECONDS)

    def look(self) -> None:
        """Ask NVML what is free; a step for `calls`."""
        self._free = free_bytes(self.uuid)

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
            self.look()
            free = self._free
            known = "" if free is None else f", {free} bytes are free on it"
            raise MemoryError(
                f"no segment of {size} bytes: {self.uuid} is full{known} ({error.metadata['call']})"
            ) from error
