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
import threading
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, NamedTuple, Never

from weightd.errors import DeviceError

from .cuda_device import CudaDevice
from .cuda_holder import ALLOCATE, FAILED, FREE, MESSAGE_BYTES, OK, REQUEST
from .cuda_nvml import names_alike
from .opening_thread import HOLDER_SECONDS, START_SECONDS, next_call

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

HOLDER_ARGV = (sys.executable, "-P", "-m", "weightd_daemon.devices.cuda_holder")

_PAGE = 2 << 20
"""Smaller allocations share a block, and a handle opens the whole of a block."""

_NOTE = "shared by CUDA IPC: clients can write to it, and it is lost when its holder process (pid {}) ends"

_START_SECONDS = START_SECONDS
"""A context takes a second, and several on a machine with many GPUs that were idle."""
_END_SECONDS = 10.0
_STARTS = "the start of its holder"
_ENDS = "the end of its holder"


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

    For the methods see devices/device.py. Holders are started on the device's thread, which lives as long as they do:
    their death signal is tied to it.
    """

    kind = "cuda_ipc"
    lasting = False
    page = _PAGE
    creates_by = "cuMemAlloc"
    releases_by = "cuMemFree"

    def __init__(self, ordinal: int, holding: CudaHolderContext) -> None:
        """Start the holder, and wait for it; on any thread. Errors: DeviceMismatchError (no such GPU), DeviceError."""
        super().__init__(ordinal)
        self._holding = holding
        self._numbers = count(1)
        self._segments: dict[int, _Segment] = {}
        self._holder: _Holder | None = None
        self._starting: asyncio.Future[None] | None = None
        self._closing = threading.Lock()
        self._closed = False
        self.note = ""
        next_call(_STARTS, HOLDER_SECONDS)
        try:
            self.calls.wait_for(_STARTS, self._started)
        except BaseException:
            self.calls.stop()
            raise

    def create(self, size: int) -> int:
        """Let the holder allocate `size` bytes of zeroes; where there is none, another is started first."""
        segment, holder = next(self._numbers), self._started()
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
        """End the holder, and with it every segment. The device's thread waits until it is gone."""
        self._segments.clear()
        if self._starting is not None:
            self._starting.cancel()
        with self._closing:
            self._closed = True
            holder, self._holder = self._holder, None
        if holder is not None:
            holder.kill()  # so that the thread, if it waits for its answer, hears that there is none
            self.calls.post(_ENDS, holder.close)
        self.calls.stop()

    def _started(self) -> _Holder:
        """The holder; a step for `calls`. One that has ended stays until its end was told: what comes after is not
        lost with it. Errors: DeviceError (none can be started).
        """
        if self._holder is None:
            try:
                holder = _Holder(self.uuid, self._holding, self._on_end)
            except OSError as error:
                raise DeviceError(f"no process to hold the memory of {self.uuid}: {error.strerror}") from error
            holder.wait_until_ready()
            with self._closing:
                if self._closed:  # meanwhile
                    holder.close()
                    raise DeviceError(f"device {self.uuid} is closed")
                self.note = _NOTE.format(holder.pid)
                self._holder = holder
            holder.watch()
            return holder
        return self._holder

    def _on_end(self, reason: str) -> None:
        """Tell of the loss, on the loop, and only then start another holder."""
        self._holder = None
        self._segments.clear()
        self._holding.on_lost(self.uuid, reason)
        self._starting = asyncio.ensure_future(self._start_another())

    async def _start_another(self) -> None:
        """Start a holder. One that cannot start is not followed at once: the next `create` starts another."""
        try:
            await self.calls.run(_STARTS, self._started)
        except DeviceError as error:
            log.warning("device %s has no holder: %s", self.uuid, error)


def _environment(uuid: str) -> dict[str, str]:
    """The variables of a holder. It sees its GPU alone if that can be named: cuInit takes time for each one."""
    return {**os.environ, **({"CUDA_VISIBLE_DEVICES": uuid} if names_alike(uuid) else {})}


class _Holder:
    """The daemon's side of a holder process, on the device's thread.

    `on_end` is told, on the loop, why it has ended.
    """

    def __init__(self, uuid: str, holding: CudaHolderContext, on_end: Callable[[str], None]) -> None:
        """Starts the process, and does not wait for it. Errors: OSError."""
        self._uuid = uuid
        self._loop = holding.loop
        self._on_end = on_end
        self._closed = False
        self._watcher: threading.Thread | None = None
        with contextlib.ExitStack() as undo:
            self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.callback(self._channel.close)
            with theirs:
                self._process = subprocess.Popen(
                    [*HOLDER_ARGV, str(theirs.fileno()), str(os.getpid()), uuid],
                    pass_fds=(theirs.fileno(), *holding.inherited),
                    stdin=subprocess.DEVNULL,
                    env=_environment(uuid),
                )
            undo.pop_all()
        self.pid = self._process.pid

    def __str__(self) -> str:
        return f"the process that holds the memory of {self._uuid} (pid {self.pid})"

    def wait_until_ready(self) -> None:
        """Wait until it can be asked. Errors: DeviceError, and then it is closed."""
        self._channel.settimeout(_START_SECONDS)
        try:
            self._answer()
        except TimeoutError:
            self.close()
            raise DeviceError(f"{self} was not ready in {_START_SECONDS:.0f} s; it was ended") from None
        except BaseException:
            self.close()
            raise
        self._channel.settimeout(None)  # whoever waits for a driver that hangs is told by the device's thread

    def watch(self) -> None:
        """Tell of its end from now on."""
        self._watcher = threading.Thread(target=self._wait, name="weightd-holder", daemon=True)
        self._watcher.start()

    def allocate(self, number: int, size: int) -> bytes:
        """The handle of new memory. Errors: DeviceError."""
        with contextlib.suppress(OSError):  # it has ended, which the answer will say
            self._channel.send(REQUEST.pack(ALLOCATE, number, size))
        return self._answer()

    def free(self, number: int) -> None:
        """Free memory some time before the next `allocate`."""
        with contextlib.suppress(OSError):  # it has ended, and its memory with it
            self._channel.send(REQUEST.pack(FREE, number, 0))

    def kill(self) -> None:
        """Have the process end, which is no loss; on any thread."""
        self._closed = True
        self._process.kill()

    def close(self) -> None:
        """End the process and wait until it is gone."""
        self.kill()
        try:
            if self._watcher is None:
                self._process.wait(_END_SECONDS)
            else:
                self._watcher.join(_END_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        if self._process.returncode is None:
            log.warning("holder of %s (pid %d) does not end", self._uuid, self.pid)
        self._channel.close()

    def _answer(self) -> bytes:
        """What follows OK. Errors: DeviceError, TimeoutError."""
        try:
            message = self._channel.recv(MESSAGE_BYTES)
        except TimeoutError:
            raise
        except OSError:
            message = b""
        if message[:1] == FAILED:
            code, call, text = message[1:].decode(errors="replace").split("\0", 2)
            raise DeviceError(text, {"call": call, "code": code})
        if message[:1] != OK:
            raise DeviceError(f"{self} has ended; load again")
        return message[1:]

    def _wait(self) -> None:
        code = self._process.wait()
        if self._closed:
            return
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        with contextlib.suppress(RuntimeError):  # the loop has ended, and the daemon with it
            self._loop.call_soon_threadsafe(self._has_ended, f"{self} {how}")

    def _has_ended(self, reason: str) -> None:
        if self._closed:
            return
        self._channel.close()
        self._on_end(reason)
