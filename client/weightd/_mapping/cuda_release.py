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
    from collections.abc import Callable, Iterable

Stream = int
"""The driver's handle of a stream."""
Reader = tuple[Ordinal, Stream]
"""Where work may have been queued that reads memory: a stream, and its device."""

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
"""What could not be given back so far. Only `finish` adds to it, and only who has `_turn` takes from it."""
_wake: queue.SimpleQueue[None] = queue.SimpleQueue()  # finalizers may use it, whatever their thread is doing
_lock = threading.Lock()  # never taken by a finalizer
_turn = threading.Lock()  # nor this one
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
        if _thread is None or not _thread.is_alive():
            _thread = threading.Thread(target=_run, name="weightd-release", daemon=True)
            _wake.put(None)  # there may be what one that has died left
            try:
                _thread.start()
            except RuntimeError as error:
                _thread = None
                raise ResourceLimitError(
                    f"this process cannot start a thread: {error}; raise `ulimit -u`", {"limit": "RLIMIT_NPROC"}
                ) from error
    _marker(ordinal)


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


def note_readers(readers: set[Reader], ordinals: Iterable[Ordinal]) -> None:
    """Add the streams to which this thread may queue work on these devices; before memory is handed out."""
    for ordinal in ordinals:
        readers.update([(ordinal, DEFAULT_STREAM), (ordinal, current_stream(ordinal))])


def finish(
    ordinal: Ordinal,
    step: Callable[[], object],
    *,
    readers: set[Reader],
    size: int,
    peers: Iterable[Ordinal] = (),
    keeps: object = None,
) -> None:
    """For finalizers: take a step once the work is done that `readers` have now; raises nothing, and never waits.

    The set is this function's from now on. Without readers nobody can have read the `size` bytes that the step gives
    back; else this thread's streams on the device and on `peers`, which can access the memory, are added. `keeps` lives
    until the step is taken. In a forked child nothing is called: what the child inherited is its parent's.
    """
    if not cuda_driver.is_ours():
        return
    release = _Release(ordinal, step, readers, size, keeps)
    try:
        if readers:
            note_readers(readers, (ordinal, *peers))  # which runs torch's code
        release.attempt()
    finally:  # also after Ctrl-C
        if not release.is_taken:
            _waiting[id(release)] = release
            _wake.put(None)


def unreleased_bytes() -> int:
    """Bytes of GPU memory that this process uses no more and still maps, because the GPU may be reading them.

    CUDA VMM: a segment counts for each dropped attachment. CUDA IPC: one that another attachment uses does not.
    """
    return sum(release.size for release in list(_waiting.values()))


def wait_until_released(timeout: float | None = None) -> bool:
    """Wait until `unreleased_bytes` is 0, for `timeout` seconds at most; return whether it is. Ends no capture.

    A thread that captures a graph itself must not wait without a timeout: memory may wait for that very stream.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    pause = _FIRST_PAUSE
    while _waiting:
        if _thread is None or not _thread.is_alive():  # it ends before the last functions of `atexit` run
            _attempt_all()
        if deadline is not None and time.monotonic() >= deadline:
            return not _waiting
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
    return True


class _Release:
    """Memory to be given back, and what it waits for. One thread at a time has to do with it."""

    __slots__ = ("_events", "_keeps", "_ordinal", "_readers", "_step", "is_taken", "size")

    def __init__(
        self, ordinal: Ordinal, step: Callable[[], object], readers: set[Reader], size: int, keeps: object
    ) -> None:
        self._ordinal = ordinal
        self._step = step
        self._readers = readers
        self._events: dict[Reader, Any] = {}
        self._keeps = keeps
        self.size = size
        self.is_taken = False
        """The step was taken, or had begun when Ctrl-C came: it is not taken twice."""

    def forget(self) -> None:
        """Keep nothing any more, and do nothing: other references to this may still be there, such as a thread's."""
        self._step, self._keeps = bool, None

    def attempt(self) -> None:
        """Take the step if the readers have passed: `is_taken` says so. Raises nothing of the driver's."""
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
        """Whether the work is done that the readers had before this was first called."""
        for reader in list(self._readers):
            try:
                passed = self._is_done(reader)
            except DeviceError as error:
                passed = error.code not in _NOT_NOW
            if passed:
                self._readers.discard(reader)
        return not self._readers

    def _is_done(self, reader: Reader) -> bool:
        ordinal, stream = reader
        if ordinal != self._ordinal and not cuda_driver.is_active(ordinal):
            return True  # nobody can have queued anything there, and we are not to make it active
        with cuda_driver.on_device(ordinal):
            event = self._events.get(reader)
            if event is None:
                event = _record(ordinal, stream)
                if event is None:
                    return False
                self._events[reader] = event
            try:
                call("cuEventQuery", event)
            except DeviceError as error:
                if error.code == "CUDA_ERROR_NOT_READY":
                    return False
                call("cuEventDestroy", self._events.pop(reader))
                if error.code == "CUDA_ERROR_CAPTURED_EVENT":  # by a capture that has ended: record again
                    return False
                raise
            call("cuEventDestroy", self._events.pop(reader))
            return True


def _record(ordinal: Ordinal, stream: Stream) -> Any:
    """An event that is done when the work is done that a stream has now; None while the stream is captured."""
    if stream == DEFAULT_STREAM:
        return _recorded(_marker(ordinal))
    if _is_captured(stream):
        return None
    event = _recorded(stream)
    if _is_captured(stream):  # it may have been when the event was recorded, and to query that would end the capture
        call("cuEventDestroy", event)
        return None
    return event


def _marker(ordinal: Ordinal) -> Any:
    """The stream in `_markers` of the device, whose context must be current. Errors: DeviceError."""
    if ordinal not in _markers:
        # Not CU_STREAM_NON_BLOCKING: that is what makes it wait for the default stream, which we must not touch
        # ourselves. Its use ends captures of streams such as this one.
        made = call("cuStreamCreate", 0)
        if _markers.setdefault(ordinal, made) is not made:  # another thread was faster
            call("cuStreamDestroy", made)
    return _markers[ordinal]


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
    while True:
        _wake.get()
        pause = _FIRST_PAUSE
        while not _stopped:
            if _is_woken():
                pause = _FIRST_PAUSE
            _attempt_all()
            if not _waiting:
                break
            time.sleep(pause)  # whoever comes meanwhile: many come one by one, and each pass goes through all
            pause = min(2 * pause, _LONGEST_PAUSE)
        if _stopped:
            return


def _is_woken() -> bool:
    """Whether anything has come since this was last asked."""
    woken = False
    with contextlib.suppress(queue.Empty):
        while True:
            _wake.get_nowait()
            woken = True
    return woken


def _attempt_all() -> None:
    if not _turn.acquire(blocking=False):  # another thread does it
        return
    try:
        for key, release in list(_waiting.items()):
            release.attempt()
            if release.is_taken:
                release.forget()  # first: who waits until nothing is waiting finds leases ended, too
                del _waiting[key]
    finally:
        _turn.release()


@atexit.register
def _stop() -> None:
    """The driver may be gone soon; the end of the process gives everything back."""
    global _stopped
    _stopped = True
    _wake.put(None)
    if _thread is not None and _thread.is_alive():  # it is not where Ctrl-C came before its start
        _thread.join(_SECONDS_TO_STOP)


def _after_fork() -> None:
    global _wake, _lock, _turn, _thread
    _wake, _thread = queue.SimpleQueue(), None
    _lock, _turn = threading.Lock(), threading.Lock()  # which another thread may have held
    for release in _waiting.values():
        release.forget()
    _waiting.clear()


os.register_at_fork(after_in_child=_after_fork)
