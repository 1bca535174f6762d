"""GPU memory shared by CUDA IPC, for GPUs that cannot export VMM memory: a holder owns it, handles are 64 bytes.

Weaker than VMM memory in two ways that users are told of (`note`): clients map it writable, and it is lost when the
holder ends. Then everything on the device is lost, and another holder is started in the background.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, NamedTuple, Never

from weightd.errors import DeviceError

from .cuda_device import CudaDevice
from .cuda_holder import ALLOCATE, FAILED, FREE, MESSAGE_BYTES, OK, REQUEST

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

HOLDER_ARGV = (sys.executable, "-P", "-m", "weightd_daemon.devices.cuda_holder")

_PAGE = 2 << 20
"""Smaller allocations share a block, and a handle opens the whole of a block."""

_NOTE = "shared by CUDA IPC: clients can write to it, and it is lost when its holder process (pid {}) ends"

_START_SECONDS = 60.0
"""A context takes a second, and several on a machine with many GPUs that were idle."""
_ANSWER_SECONDS = 10.0
_END_SECONDS = 10.0


@dataclass(frozen=True)
class CudaHolderContext:
    """What a GPU's holder process needs of the daemon: its loop, a loss callback, descriptors to inherit.

    A holder inherits a lock, so that no daemon starts while the memory of the one before is still taken.
    """

    loop: asyncio.AbstractEventLoop
    on_lost: Callable[[str, str], None]
    inherited: tuple[int, ...] = ()


class _Segment(NamedTuple):
    size: int
    handle: bytes
    holder: _Holder


class CudaIpcDevice(CudaDevice):
    """A GPU whose memory is shared by CUDA IPC. `ordinal` is this process's number of it.

    For the methods see devices/device.py. Made and used on the main thread: a holder's death signal is tied to the
    thread that starts it.
    """

    kind = "cuda_ipc"
    lasting = False
    page = _PAGE

    def __init__(self, ordinal: int, holding: CudaHolderContext) -> None:
        """Starts the holder, and waits for it. Errors: DeviceMismatchError (no such GPU), DeviceError."""
        super().__init__(ordinal)
        self._holding = holding
        self._numbers = count(1)
        self._segments: dict[int, _Segment] = {}
        self._holder: _Holder | None = None
        self.note = ""
        self._ended = ""
        self._start().wait_until_ready()

    def create(self, size: int) -> int:
        """Let the holder allocate `size` bytes of zeroes. While another holder starts, a DeviceError says so."""
        segment, holder = next(self._numbers), self._ready()
        with self._allocating(size):
            handle = holder.allocate(segment, size)
        self._segments[segment] = _Segment(size, handle, holder)
        return segment

    def adopt(self, descriptor: int, size: int) -> Never:
        """Its memory ends with its holder, and there are no descriptors of it. Errors: DeviceError, always."""
        raise DeviceError(f"descriptor {descriptor}: no segment of {self.kind} memory can be taken over")

    def writable(self, segment: int) -> bytes:
        """The handle: whoever opens it may write."""
        return self._segments[segment].handle

    shared = writable

    def allocated(self, segment: int) -> int:
        """All of it, always."""
        return self._segments[segment].size

    def release(self, segment: int) -> None:
        """Let the holder free it. Nothing is left to free where the holder has ended."""
        found = self._segments.pop(segment, None)
        if found is not None:
            found.holder.free(segment)

    def close(self) -> None:
        """End the holder, and with it every segment."""
        self._segments.clear()
        if self._holder is not None:
            self._holder.close()
            self._holder = None

    def _start(self) -> _Holder:
        """Start a holder. Errors: DeviceError."""
        try:
            self._holder = _Holder(self.uuid, self._holding, self._on_end)
        except OSError as error:
            raise DeviceError(f"no process to hold the memory of {self.uuid}: {error.strerror}") from error
        self.note = _NOTE.format(self._holder.pid)
        return self._holder

    def _ready(self) -> _Holder:
        """The holder. One that has ended stays until its end was told: what comes after is not lost with it.

        Errors: DeviceError, while none is ready.
        """
        holder = self._holder or self._start()
        if not holder.ready:
            raise DeviceError(f"{holder} is being started ({self._ended}); try again")
        return holder

    def _on_end(self, reason: str) -> None:
        """Tell of the loss, and only then start another holder. One that was never ready held nothing.

        That one is not followed at once: it might go on for ever. The next `create` starts another.
        """
        ready = self._holder is not None and self._holder.ready
        self._holder = None
        self._ended = reason
        if not ready:
            log.warning("device %s has no holder: %s", self.uuid, reason)
            return
        self._segments.clear()
        self._holding.on_lost(self.uuid, reason)
        try:
            self._start()
        except DeviceError as error:
            log.warning("device %s has no holder: %s", self.uuid, error)


class _Holder:
    """The daemon's side of a holder process. `on_end` is told, on the loop, why it has ended by itself.

    It can be asked from the moment that it is `ready`, which it says itself.
    """

    def __init__(self, uuid: str, holding: CudaHolderContext, on_end: Callable[[str], None]) -> None:
        """Starts the process, and does not wait for it. Errors: OSError."""
        self._uuid = uuid
        self._loop = holding.loop
        self._on_end = on_end
        self._refusal = ""
        self.ready = False
        with contextlib.ExitStack() as undo:
            self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.callback(self._channel.close)
            with theirs:
                self._process = subprocess.Popen(
                    [*HOLDER_ARGV, str(theirs.fileno()), str(os.getpid()), uuid],
                    pass_fds=(theirs.fileno(), *holding.inherited),
                    stdin=subprocess.DEVNULL,
                )
            undo.callback(self._kill)
            self.pid = self._process.pid
            self._pidfd = os.pidfd_open(self.pid)
            undo.callback(os.close, self._pidfd)
            self._loop.add_reader(self._pidfd, self._has_ended)
            self._loop.add_reader(self._channel, self._has_begun)
            undo.pop_all()
        self._late = self._loop.call_later(_START_SECONDS, self._is_late)

    def __str__(self) -> str:
        return f"the process that holds the memory of {self._uuid} (pid {self.pid})"

    def wait_until_ready(self) -> None:
        """Wait on the spot, as long as nothing else is to be done. Errors: DeviceError, and then it is closed."""
        self._stop_waiting()
        try:
            self._answer(_START_SECONDS)
        except BaseException:
            self.close()
            raise
        self.ready = True

    def allocate(self, number: int, size: int) -> bytes:
        """The handle of new memory. Errors: DeviceError."""
        with contextlib.suppress(OSError):  # it has ended, which the answer will say
            self._channel.send(REQUEST.pack(ALLOCATE, number, size))
        return self._answer(_ANSWER_SECONDS)

    def free(self, number: int) -> None:
        """Free memory some time before the next `allocate`. Safe on any thread."""
        try:
            self._channel.send(REQUEST.pack(FREE, number, 0))
        except TimeoutError:
            self._process.kill()  # it hangs, and would keep memory that counts as free
        except OSError:
            pass  # it has ended, and its memory with it

    def close(self) -> None:
        """End the process and wait until it is gone."""
        self._stop_waiting()
        self._loop.remove_reader(self._pidfd)
        self._kill()
        self._drop()

    def _answer(self, seconds: float) -> bytes:
        """What follows OK. A holder that is late is ended: its answer would be taken for the next one."""
        self._channel.settimeout(seconds)
        try:
            message = self._channel.recv(MESSAGE_BYTES)
        except TimeoutError:
            self._process.kill()
            raise DeviceError(f"{self} gave no answer in {seconds:.0f} s; it was ended") from None
        except OSError:
            message = b""
        if message[:1] == FAILED:
            code, call, text = message[1:].decode(errors="replace").split("\0", 2)
            raise DeviceError(text, {"call": call, "code": code})
        if message[:1] != OK:
            raise DeviceError(f"{self} has ended; load again")
        return message[1:]

    def _has_begun(self) -> None:
        """It has said whether it is ready. Where it is not, its end follows."""
        self._stop_waiting()
        try:
            self._answer(_ANSWER_SECONDS)
        except DeviceError as error:
            self._refusal = f": {error.message}" if error.metadata else ""  # else its end says as much
        else:
            self.ready = True

    def _is_late(self) -> None:
        self._stop_waiting()
        self._refusal = f": it was not ready in {_START_SECONDS:.0f} s"
        self._process.kill()

    def _stop_waiting(self) -> None:
        self._late.cancel()
        self._loop.remove_reader(self._channel)

    def _has_ended(self) -> None:
        if not (self.ready or self._refusal):
            self._has_begun()  # what it said last may not have been heard yet
        self._loop.remove_reader(self._pidfd)
        code = self._process.wait()
        self._drop()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        self._on_end(f"{self} {how}{self._refusal}")

    def _kill(self) -> None:
        self._process.kill()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            log.warning("holder of %s (pid %d) does not end", self._uuid, self._process.pid)

    def _drop(self) -> None:
        os.close(self._pidfd)
        self._channel.close()
