"""Work on a GPU beside whoever captures CUDA graphs in this process: the mode of a thread, and a stream of our own."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Final

from .cuda_driver import call

if TYPE_CHECKING:
    from collections.abc import Iterator

_NON_BLOCKING: Final = 1
"""CU_STREAM_NON_BLOCKING."""


class _Relaxed:
    """Keep this thread's calls from ending stream captures, where CUDA only holds them to be potentially unsafe.

    Every allocating, mapping, opening or asking call is that, beside a capture of this thread or a global one. What
    synchronises the context ends captures all the same: decision 0039. Errors: DeviceError.
    """

    __slots__ = ("_before",)

    def __enter__(self) -> None:
        from cuda.bindings import driver

        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        self._before = call("cuThreadExchangeStreamCaptureMode", mode)

    def __exit__(self, *_: object) -> None:
        call("cuThreadExchangeStreamCaptureMode", self._before)


relaxed = _Relaxed  # a function to its callers, as `cuda_driver.on_device`


@contextlib.contextmanager
def own_stream() -> Iterator[Any]:
    """A stream of the current context on which nobody else waits; on leaving, its work is done. Errors: DeviceError."""
    stream = call("cuStreamCreate", _NON_BLOCKING)
    try:
        yield stream
        call("cuStreamSynchronize", stream)
    finally:
        call("cuStreamDestroy", stream)
