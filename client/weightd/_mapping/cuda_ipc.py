"""GPU memory shared by CUDA IPC, for drivers that cannot export memory otherwise: opens the daemon's 64-byte handles.

Such memory is always mapped as a whole and writable; nothing holds a client off but its own care. It cannot be mapped a
second time either, so a further name for an address gets a copy of its bytes.

Lifetimes are those of `cuda_vmm`. A handle is opened once in a process, whoever attaches to it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any

from . import cuda_driver, cuda_release, cuda_streams
from .cuda_driver import call
from .cuda_segments import MappedCudaSegments
from .ranges import MappedRange

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .segments import SegmentToMap


class MappedIpcSegments(MappedCudaSegments):
    """Map the segments of one attachment by CUDA IPC; see `segments.MappedSegments`."""

    def __init__(self, uuid: str, wanted: Sequence[SegmentToMap], lease: object) -> None:
        super().__init__(uuid)
        self._opened: dict[int, _Memory] = {}
        self._sizes = {one.segment: one.size for one in wanted}
        self._copies: weakref.WeakValueDictionary[tuple[int, int, int, int], _Memory] = weakref.WeakValueDictionary()
        if not wanted:
            return
        self._lease = lease
        with cuda_driver.on_device(self._ordinal), cuda_streams.relaxed():
            cuda_release.prepare(self._ordinal)
        try:
            for one in wanted:
                assert isinstance(one.handle, bytes)  # `open_segments` has looked
                self._opened[one.segment] = _open(self._ordinal, one.handle, one.size)
        except BaseException:
            self._opened.clear()
            raise
        for memory in self._opened.values():
            memory.users.add(id(self))

    def __del__(self, at_exit: Callable[[], bool] = sys.is_finalizing) -> None:
        # Another attachment may keep the handles open. It does not keep our lease, so what reads for us must be done
        # before that goes.
        if self._opened and not at_exit():
            size = 0
            for segment, memory in self._opened.items():
                memory.users.discard(id(self))
                size += 0 if memory.users else self._sizes[segment]
            cuda_release.finish(self._ordinal, self._opened.clear, readers=self._readers, size=size, keeps=self._lease)

    def ranges(self) -> list[MappedRange]:
        """One for each handle. Private copies, which a second name gets, are not among them."""
        owner = weakref.ref(self)
        return [MappedRange(*place, owner) for place in self.places().values()]

    def places(self) -> dict[tuple[int, int], tuple[int, int]]:
        """Address and length of each handle's memory, as copy 0 of its segment."""
        return {(segment, 0): (memory.address, self._sizes[segment]) for segment, memory in self._opened.items()}

    def buffer(self, segment: int, copy: int, offset: int, length: int) -> Any:
        """A `cuda.core.Buffer`: for `copy` 0 of the shared bytes, else of a copy that lasts while it is used."""
        cuda_driver.initialise()  # before any lock, which another thread may have held when this process was forked
        address = self._opened[segment].address + offset
        if not copy:
            self._note_reader()
            return self._make_buffer(self._ordinal, address, length, self)
        key = segment, offset, length, copy  # a tensor, and what is fused from there on, begin at one place
        with _lock:
            owner = self._copies.get(key)
            if owner is None:
                owner = self._copies[key] = _copy(self._ordinal, address, length)
        cuda_release.note_readers(owner.readers, (self._ordinal,))
        return self._make_buffer(self._ordinal, owner.address, length, owner)


class _Memory:
    """Memory that this process has opened or allocated, until nobody uses it any more.

    No `__del__`: while that runs, a weak reference still finds the object, and somebody else would use what is being
    given up. `weakref.finalize` runs when nobody can find it any more.
    """

    def __init__(
        self,
        ordinal: cuda_driver.Ordinal,
        make: Callable[[], int],
        undo: str,
        size: int,
        fill: Callable[[int], object] = lambda address: None,
    ) -> None:
        self.readers: set[cuda_release.Reader] = set()
        """Those for which its users do not wait themselves."""
        self.users: set[int] = set()
        """Identities of the attachments that use it: a set, for finalizers take no lock."""
        with contextlib.ExitStack() as on_error:
            with cuda_driver.on_device(ordinal), cuda_streams.relaxed():
                self.address = make()
                end = weakref.finalize(self, _give_up, ordinal, undo, self.address, self.readers, size)
                end.atexit = False  # the driver may be gone by then
                on_error.callback(end)
                fill(self.address)
            on_error.pop_all()


def _give_up(
    ordinal: cuda_driver.Ordinal, undo: str, address: int, readers: set[cuda_release.Reader], size: int
) -> None:
    cuda_release.finish(ordinal, lambda: call(undo, address), readers=readers, size=size)


# Re-entrant: a finalizer of this module may run while this very thread opens a handle.
_lock = threading.RLock()
_all_opened: weakref.WeakValueDictionary[tuple[cuda_driver.Ordinal, bytes], _Memory] = weakref.WeakValueDictionary()


def _new_lock() -> None:
    """In a forked child, for the thread that had the lock is not there, and finalizers run there too."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_new_lock)


def _open(ordinal: cuda_driver.Ordinal, handle: bytes, size: int) -> _Memory:
    with _lock:
        opened = _all_opened.get((ordinal, handle))
        if opened is None:
            opened = _Memory(ordinal, lambda: cuda_driver.open_ipc(handle), "cuIpcCloseMemHandle", size)
            _all_opened[ordinal, handle] = opened
        return opened


def _copy(ordinal: cuda_driver.Ordinal, source: int, length: int) -> _Memory:
    def make() -> int:
        return int(call("cuMemAlloc", length))

    def fill(address: int) -> None:
        with cuda_streams.own_stream() as stream:  # which is done when torch's streams, which do not wait for it, begin
            call("cuMemcpyDtoDAsync", address, source, length, stream)

    return _Memory(ordinal, make, "cuMemFree", length, fill)
