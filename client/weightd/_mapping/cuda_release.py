"""Give GPU memory back when the work that reads it is done, without ending a CUDA graph capture.

CUDA has no call that waits for all work of a process and leaves captures alone, and no call that tells whether anybody
captures. So weightd waits for streams: an event is recorded in each stream to which work that reads the memory may have
been queued, and queried until it is done. Decision 0039 says which calls do what during a capture.

Finalizers call `finish`. It tries once and never waits; what is not done by then is queued, and a thread of this module
tries again until it is.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Final

from weightd.errors import DeviceError, ResourceLimitError

from . import cuda_driver, cuda_streams
from .cuda_driver import Ordinal, call

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

Stream = int
"""The driver's handle of a stream."""

DEFAULT_STREAM: Final[Stream] = 0

_UNTIMED: Final = 2
"""CU_EVENT_DISABLE_TIMING."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.1
"""Seconds between two attempts."""
_SECONDS_TO_STOP: Final = 1.0
_NOT_NOW: Final = {
    "CUDA_ERROR_OUT_OF_MEMORY",  # an event takes some
    "CUDA_ERROR_NOT_READY",
    "CUDA_ERROR_NOT_PERMITTED",  # inside a host function of a stream
    "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
    "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
    "CUDA_ERROR_STREAM_CAPTURE_MERGE",
    "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED",
    "CUDA_ERROR_STREAM_CAPTURE_UNJOINED",
    "CUDA_ERROR_STREAM_CAPTURE_ISOLATION",
    "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT",
    "CUDA_ERROR_CAPTURED_EVENT",
    "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD",
}
"""Errors by which a context lives on, and its kernels with it. After any other, all that was in it is lost."""

_waiting: dict[int, _Release] = {}
"""What could not be given back so far. Only `finish` adds to it, and only the thread takes from it."""
_wake: queue.SimpleQueue[None] = queue.SimpleQueue()  # finalizers may use it, whatever their thread is doing
_lock = threading.Lock()  # never taken by a finalizer
_thread: threading.Thread | None = None
_stopped = False
_markers: dict[Ordinal, Any] = {}
"""A stream of our own for each device, whose events come after all work that was queued to the default stream."""


def prepare(ordinal: Ordinal) -> None:
    """Get ready to give memory of a device back; its context must be current, and the memory not mapped so far.

    Errors: DeviceError, ResourceLimitError (no thread can be started).
    """
    global _thread
    with _lock:
        if _thread is None:
            thread = threading.Thread(target=_run, name="weightd-release", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                raise ResourceLimitError(
                    f"this process cannot start a thread: {error}; raise `ulimit -u`", {"limit": "RLIMIT_NPROC"}
                ) from error
            _thread = thread
        if ordinal not in _markers:
            # Not CU_STREAM_NON_BLOCKING: that is what makes it wait for the default stream, which we must not touch
            # ourselves. Its use ends captures of streams such as this one.
            _markers[ordinal] = call("cuStreamCreate", 0)


def current_stream(ordinal: Ordinal) -> Stream:
    """The stream of torch to which this thread queues work; the default stream without torch.

    Also for a stream that another library has lent to torch, because such a stream may be destroyed at any time.
    """
    torch = sys.modules.get("torch")
    try:
        if torch is None or not torch.cuda.is_initialized():
            return DEFAULT_STREAM
        stream = torch.cuda.current_stream(ordinal)
        is_lent = stream.stream_id == stream.cuda_stream
        return DEFAULT_STREAM if is_lent else int(stream.cuda_stream)
    except (AttributeError, AssertionError, RuntimeError):  # another thread is importing torch; it has no such device
        return DEFAULT_STREAM


def finish(
    ordinal: Ordinal, step: Callable[[], object], *, streams: Collection[Stream], size: int, keeps: object = None
) -> None:
    """For finalizers: take a step once the work is done that `streams` have now; raises nothing, and never waits.

    With no streams nobody can have read the `size` bytes that the step gives back. `keeps` lives until the step is
    taken. In a forked child nothing is called: what the child inherited is its parent's.
    """
    if not cuda_driver.is_ours():
        return
    release = _Release(ordinal, step, {*streams, current_stream(ordinal)} if streams else set(), size, keeps)
    try:
        release.attempt()
    finally:  # also after Ctrl-C
        if not release.is_taken:
            _waiting[id(release)] = release
            _wake.put(None)


def unreleased_bytes() -> int:
    """Bytes of GPU memory that this process uses no more and still maps, because the GPU may be reading them."""
    return sum(release.size for release in list(_waiting.values()))


def wait_until_released(timeout: float | None = None) -> bool:
    """Wait until `unreleased_bytes` is 0, for `timeout` seconds at most; return whether it is. Ends no capture.

    A thread that captures a graph itself must not wait without a timeout: memory may wait for that very stream.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    pause = _FIRST_PAUSE
    while _waiting:
        if deadline is not None and time.monotonic() >= deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
    return True


class _Release:
    """Memory to be given back, and what it waits for. One thread at a time has to do with it."""

    __slots__ = ("_events", "_keeps", "_ordinal", "_step", "_streams", "is_taken", "size")

    def __init__(
        self, ordinal: Ordinal, step: Callable[[], object], streams: set[Stream], size: int, keeps: object
    ) -> None:
        self._ordinal = ordinal
        self._step = step
        self._streams = streams
        self._events: dict[Stream, Any] = {}
        self._keeps = keeps
        self.size = size
        self.is_taken = False
        """The step was taken, or had begun when Ctrl-C came: it is not taken twice."""

    def forget(self) -> None:
        """Keep nothing any more, and do nothing: other references to this may still be there, such as a thread's."""
        self._step, self._keeps = bool, None

    def attempt(self) -> None:
        """Take the step if the streams have passed: `is_taken` says so. Raises nothing of the driver's."""
        device, eased = cuda_driver.on_device(self._ordinal), cuda_streams.relaxed()
        entered = 0
        try:
            try:
                for context in (device, eased):
                    context.__enter__()
                    entered += 1
                if not self._has_passed():
                    return
            except DeviceError as error:
                if error.code in _NOT_NOW:
                    return
            self.is_taken = True
            try:
                self._step()
            except DeviceError as error:
                self.is_taken = error.code not in _NOT_NOW
        finally:  # no ExitStack: its errors are cycles, which would keep what is given back
            for context in (device, eased)[:entered][::-1]:
                with contextlib.suppress(DeviceError):
                    context.__exit__()

    def _has_passed(self) -> bool:
        """Whether the work is done that was queued to the streams before this was first called."""
        for stream in list(self._streams):
            if stream not in self._events:
                event = _record(self._ordinal, stream)
                if event is None:
                    continue
                self._events[stream] = event
            try:
                call("cuEventQuery", self._events[stream])
            except DeviceError as error:
                if error.code == "CUDA_ERROR_NOT_READY":
                    continue
                call("cuEventDestroy", self._events.pop(stream))
                if error.code == "CUDA_ERROR_CAPTURED_EVENT":  # by a capture that has ended: record again
                    continue
                raise
            call("cuEventDestroy", self._events.pop(stream))
            self._streams.discard(stream)
        return not self._streams


def _record(ordinal: Ordinal, stream: Stream) -> Any:
    """An event that is done when the work is done that a stream has now; None while the stream is captured."""
    if stream == DEFAULT_STREAM:
        return _recorded(_markers[ordinal])
    if _is_captured(stream):
        return None
    event = _recorded(stream)
    if _is_captured(stream):  # it may have been when the event was recorded, and to query that would end the capture
        call("cuEventDestroy", event)
        return None
    return event


def _recorded(stream: Any) -> Any:
    event = call("cuEventCreate", _UNTIMED)
    try:
        call("cuEventRecord", event, stream)
    except DeviceError:
        call("cuEventDestroy", event)
        raise
    return event


def _is_captured(stream: Stream) -> bool:
    return bool(call("cuStreamIsCapturing", stream))


# -- the thread --------------------------------------------------------------------------------------------------------


def _run() -> None:
    pause: float | None = None
    while True:
        try:
            _wake.get(timeout=pause)
            pause = _FIRST_PAUSE
        except queue.Empty:
            pause = min(2 * (pause or _FIRST_PAUSE), _LONGEST_PAUSE)
        if _stopped:
            return
        _attempt_all()
        if not _waiting:
            pause = None


def _attempt_all() -> None:
    for key, release in list(_waiting.items()):
        release.attempt()
        if release.is_taken:
            release.forget()  # first: who waits until nothing is waiting finds leases ended, too
            del _waiting[key]


@atexit.register
def _stop() -> None:
    """The driver may be gone soon; the end of the process gives everything back."""
    global _stopped
    _stopped = True
    _wake.put(None)
    if _thread is not None:
        _thread.join(_SECONDS_TO_STOP)


def _after_fork() -> None:
    global _wake, _lock, _thread
    _wake, _lock, _thread = queue.SimpleQueue(), threading.Lock(), None  # which another thread may have held
    for release in _waiting.values():
        release.forget()
    _waiting.clear()


os.register_at_fork(after_in_child=_after_fork)
