"""The base of attached GPU segments, whichever way their memory is shared; see `segments.Segments`."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from . import cuda_driver, cuda_release

if TYPE_CHECKING:
    from collections.abc import Callable


class MappedCudaSegments:
    """Map segments on the GPU of that UUID, which this process may number differently, or not see at all."""

    def __init__(self, uuid: str) -> None:
        self._uuid = uuid
        self._peers: tuple[cuda_driver.Ordinal, ...] = ()
        self._readers: set[cuda_release.Reader] = set()

    @property
    def torch_device(self) -> str:
        """What torch calls the device. Errors: DeviceMismatchError."""
        return f"cuda:{self._ordinal}"

    @property
    def peers(self) -> tuple[str, ...]:
        """What torch calls the other devices that can access the memory."""
        return tuple(f"cuda:{ordinal}" for ordinal in self._peers)

    def _note_reader(self) -> None:
        """To be called before a buffer is handed out."""
        cuda_release.note_readers(self._readers, (self._ordinal, *self._peers))

    @cached_property
    def _ordinal(self) -> cuda_driver.Ordinal:
        return cuda_driver.ordinal_of(self._uuid)

    @cached_property
    def _make_buffer(self) -> Callable[[cuda_driver.Ordinal, int, int, object], Any]:
        from .cuda_buffer import make_buffer

        return make_buffer
