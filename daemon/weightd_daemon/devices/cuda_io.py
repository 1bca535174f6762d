"""A loader's access to GPU memory: pinned buffers, with each copy running while the next piece is read.

Each thread has a stream and a few buffers of its own, so threads never wait for each other's copies. A buffer that was
written is free again when the event behind its copy has passed. Nothing goes through the legacy default stream, which
would make all streams wait for one another.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, TypeVar

from weightd._libc import view_at
from weightd._mapping import cuda_driver as driver
from weightd.errors import DeviceError

from .cuda_errors import OUT_OF_MEMORY
from .segment_io import PIECE, DeviceStagingBuffer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from types import TracebackType

    from .device import DeviceSegment
    from .segment_io import OnFull

_T = TypeVar("_T")

RING = 6
"""Buffers of a thread. It holds two at most, to pack or to compare; the others are on their way."""
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_WAITING_SLEEPS = 1 | 2  # CU_EVENT_BLOCKING_SYNC, CU_EVENT_DISABLE_TIMING: the other threads have use for the core


class _Errors:
    """Notes whether a call of the driver has failed, so that closing does not hide that error under a later one."""

    def __init__(self) -> None:
        self._noted = False

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, DeviceError):
            self._noted = True

    def do_all(self, steps: Iterable[Callable[[], object]]) -> None:
        """Do every step, whichever fail. Raises the first error, unless there was one before."""
        first = None
        for step in steps:
            try:
                step()
            except DeviceError as error:
                first = first or error
        if first and not self._noted:
            self._noted = True
            raise first


class CudaSegmentIO:
    """Reads and writes one GPU's segments, by VMM descriptors or CUDA IPC handles.

    For the methods see devices/segment_io.py. A loader also needs memory of the GPU for itself; if there is none,
    `on_full` is asked to make room.
    """

    def __init__(self, kind: str, uuid: str, segments: Mapping[int, DeviceSegment], on_full: OnFull) -> None:
        """Errors: DeviceMismatchError (this process does not see the GPU), DeviceError, those of `on_full`."""
        self._on_full = on_full
        self._open = {"cuda_vmm": self._open_vmm, "cuda_ipc": self._open_ipc}[kind]
        self._segments = segments
        self._ordinal = driver.ordinal_of(uuid)
        self._context = self._with_room(self._make_context)
        self._lock = threading.Lock()
        self._addresses: dict[int, int] = {}
        self._closers: list[Callable[[], object]] = []
        self.errors = _Errors()
        self.copy_in = driver.bound("cuMemcpyHtoDAsync")
        self.copy_out = driver.bound("cuMemcpyDtoHAsync")
        self.record = driver.bound("cuEventRecord")
        self.wait_for = driver.bound("cuEventSynchronize")

    def staging(self) -> _CudaStaging:
        """Buffers for the thread that calls. Errors: DeviceError, those of `on_full`."""
        with self.errors:
            self.enter()
            return self._with_room(lambda: _CudaStaging(self))

    def enter(self) -> None:
        """Make the GPU's context current in this thread for good: to push and pop it around each call costs more.

        So a thread works with one GPU at a time.
        """
        driver.call("cuCtxSetCurrent", self._context)

    def address(self, segment: int) -> int:
        """Where the segment begins; opens it at first use. Errors: DeviceError, those of `on_full`."""
        found = self._addresses.get(segment)
        if found is not None:
            return found
        with self._lock:
            if segment not in self._addresses:
                self._addresses[segment] = self._with_room(lambda: self._open(self._segments[segment]))
            return self._addresses[segment]

    def close(self) -> None:
        """Close every segment. Errors: DeviceError, if it is the first."""
        closers, self._closers = self._closers[::-1], []
        self._addresses.clear()
        if closers:
            self.errors.do_all([self.enter, *closers])

    def _with_room(self, step: Callable[[], _T]) -> _T:
        """Take a step, again and again while the driver has no memory for it and `on_full` makes room."""
        while True:
            try:
                return step()
            except DeviceError as error:
                if error.code != OUT_OF_MEMORY:
                    raise
                self._on_full(error)

    def _make_context(self) -> Any:
        with driver.on_device(self._ordinal):
            return driver.call("cuCtxGetCurrent")

    def _open_vmm(self, segment: DeviceSegment) -> int:
        assert isinstance(segment.handle, int)  # VMM memory is handed out by descriptor
        allocation = driver.import_descriptor(segment.handle)
        try:
            addresses = driver.MappedAddressRange(self._ordinal, segment.size)
            self._closers.append(addresses.close)  # before it is complete: a part is closed like the whole
            addresses.map(0, segment.size, allocation)
            addresses.allow(writable=True)
        except DeviceError:
            with contextlib.suppress(DeviceError):  # the first error is the one to tell
                driver.release(allocation)
            raise
        driver.release(allocation)
        return addresses.address

    def _open_ipc(self, segment: DeviceSegment) -> int:
        assert isinstance(segment.handle, bytes)  # CUDA IPC has no descriptors
        address = driver.open_ipc(segment.handle)
        self._closers.append(lambda: driver.call("cuIpcCloseMemHandle", address))
        return address


class _PinnedBuffer:
    """One piece of a ring of pinned memory, and the event that says when it is free again."""

    def __init__(self, address: int, event: Any) -> None:
        self.address = address
        self.event = event
        self.view = view_at(address, PIECE)


class _CudaStaging:
    """One thread's stream and ring of buffers. Any thread may close it."""

    def __init__(self, io: CudaSegmentIO) -> None:
        self._io = io
        self._undo: list[Callable[[], object]] = []
        self._free: list[_PinnedBuffer] = []
        self._written: deque[_PinnedBuffer] = deque()
        try:
            ring = self._make("cuMemHostAlloc", RING * PIECE, 0, undo="cuMemFreeHost")
            for address in range(ring, ring + RING * PIECE, PIECE):
                event = self._make("cuEventCreate", _WAITING_SLEEPS, undo="cuEventDestroy")
                self._free.append(_PinnedBuffer(address, event))
            self._stream = self._make("cuStreamCreate", _NON_BLOCKING, undo="cuStreamDestroy")
            self._undo.append(self._synchronise)  # first of all: a copy must not outlive its buffer
        except DeviceError:
            with contextlib.suppress(DeviceError):  # the first error is the one to tell
                self.close()
            raise

    def acquire(self) -> _PinnedBuffer:
        """A free buffer, or the one that was written first, when its copy is done. Errors: DeviceError."""
        if self._free:
            return self._free.pop()
        buffer = self._written[0]
        with self._io.errors:
            self._io.wait_for(buffer.event)
        return self._written.popleft()

    def put_back(self, buffer: DeviceStagingBuffer) -> None:
        """Keep it for the next `acquire`."""
        assert isinstance(buffer, _PinnedBuffer)
        self._free.append(buffer)

    def write(self, buffer: DeviceStagingBuffer, size: int, segment: int, offset: int) -> None:
        """Begin the copy. Errors: DeviceError, also of copies before."""
        assert isinstance(buffer, _PinnedBuffer)
        with self._io.errors:
            self._io.copy_in(self._io.address(segment) + offset, buffer.address, size, self._stream)
            self._io.record(buffer.event, self._stream)
        self._written.append(buffer)

    def read(self, buffer: DeviceStagingBuffer, size: int, segment: int, offset: int) -> None:
        """Begin the copy, behind what this thread has written. Errors: DeviceError, also of copies before."""
        with self._io.errors:
            self._io.copy_out(buffer.address, self._io.address(segment) + offset, size, self._stream)

    def synchronize(self) -> None:
        """Wait for the stream. Errors: DeviceError."""
        with self._io.errors:
            self._synchronise()
        self._free += self._written
        self._written.clear()

    def close(self) -> None:
        """Wait for the stream and give everything back. Errors: DeviceError, if it is the first."""
        self._free.clear()
        self._written.clear()
        undo, self._undo = self._undo[::-1], []
        if undo:
            self._io.errors.do_all([self._io.enter, *undo])

    def _make(self, function: str, *arguments: int, undo: str) -> Any:
        made = driver.call(function, *arguments)
        self._undo.append(lambda: driver.call(undo, made))
        return made

    def _synchronise(self) -> None:
        driver.call("cuStreamSynchronize", self._stream)
