"""The daemon's side of a loader process: spawns it, talks to it, and detects its end reliably."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError

from weightd._limits import DAEMON, limit_error
from weightd.errors import ServerError
from weightd_daemon.loader._proto import loader_pb2 as wire
from weightd_daemon.loader.channel import BATCH, LENGTH, framed, length_of
from weightd_daemon.log_line import Line

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from weightd_daemon.devices.device import DeviceSegment

log = logging.getLogger(__name__)

DEFAULT_ARGV = (sys.executable, "-P", "-m", "weightd_daemon.loader")

_TRIES = 500
"""How often a loader is offered descriptors that its socket has no room for, 10 ms apart."""


class LoadProcessDiedError(Exception):  # a fact that the caller turns into the load's error
    """The process that executes a load ended in the middle of a job."""


class LoadProcess:
    """The daemon's side of a process that executes loads.

    Made with `spawn` on the main thread: its death signal is tied to the thread that starts it.
    """

    def __init__(self, process: subprocess.Popen[bytes], control: socket.socket, descriptors: socket.socket) -> None:
        self._process = process
        self._control = control
        self._descriptors = descriptors
        self._seen: set[int] = set()
        self._writer: asyncio.StreamWriter | None = None
        self.exited = asyncio.get_running_loop().create_future()
        """Done when the kernel says that the process is gone: only then are its extents safe to use again."""
        self._pidfd = os.pidfd_open(process.pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._on_exit)

    @classmethod
    async def spawn(cls, argv: Sequence[str], inherited: Iterable[int]) -> LoadProcess:
        """Start a loader that inherits `inherited` (a lock that says "may still write") beside its own two sockets.

        Errors: ResourceLimitError (no descriptor, process or memory for it), OSError.
        """
        try:
            loader, control = cls._start(argv, inherited)
        except OSError as error:
            if limit := limit_error(error, "starting a loader process", DAEMON):
                raise limit from error
            raise
        try:
            loader._reader, loader._writer = await asyncio.open_connection(sock=control, limit=1 << 20)
        except BaseException:  # cancelled: nobody knows this loader yet, so nobody else would end it
            loader.kill()
            control.close()
            raise
        if loader.exited.done():
            loader._writer.close()
        return loader

    @classmethod
    def _start(cls, argv: Sequence[str], inherited: Iterable[int]) -> tuple[LoadProcess, socket.socket]:
        """The process and our end of its byte stream. Errors: OSError, and then nothing stays."""
        with contextlib.ExitStack() as ours:
            with contextlib.ExitStack() as theirs:
                control, control_child = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
                ours.enter_context(control)
                theirs.enter_context(control_child)
                descriptors, descriptors_child = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                ours.enter_context(descriptors)
                theirs.enter_context(descriptors_child)
                ends = (control_child.fileno(), descriptors_child.fileno())
                process = subprocess.Popen(  # our own module; must be this thread, see the class
                    [*argv, *map(str, ends), str(os.getpid())],
                    pass_fds=(*ends, *inherited),
                    stdin=subprocess.DEVNULL,
                )
            control.setblocking(False)
            try:
                loader = cls(process, control, descriptors)
            except BaseException:
                process.kill()
                process.wait()
                raise
            ours.pop_all()
        return loader, control

    _reader: asyncio.StreamReader

    @property
    def pid(self) -> int:
        return self._process.pid

    async def receive(self) -> wire.ToDaemon:
        """Return the next message. Errors: LoadProcessDiedError; one that sends what is no message is killed."""
        try:
            length = length_of(await self._reader.readexactly(LENGTH.size))
            return wire.ToDaemon.FromString(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise LoadProcessDiedError from error
        except (DecodeError, ServerError) as error:
            log.error(Line("loader", {"pid": self.pid}, "sent what is no message", because=error))  # noqa: TRY400  # it says all
            self.kill()
            raise LoadProcessDiedError from error

    async def send(self, message: wire.ToLoader, segments: Iterable[DeviceSegment] = ()) -> None:
        """Send a message, and list in it those of the segments that the loader has not seen yet.

        Errors: LoadProcessDiedError, ResourceLimitError (too many descriptors are on their way), ServerError (the
        message is too long); it is to be killed then.
        """
        fresh = {segment.number: segment for segment in segments if segment.number not in self._seen}.values()
        self._seen.update(segment.number for segment in fresh)
        for segment in fresh:
            handle = segment.handle if isinstance(segment.handle, bytes) else None
            message.segments.add(number=segment.number, size=segment.size, handle=handle)
        descriptors = [segment.handle for segment in fresh if isinstance(segment.handle, int)]
        frame = framed(message)
        assert self._writer is not None  # spawn returns when it is there
        with _errors("sending segments to a loader process"):
            self._writer.write(frame)
            for start in range(0, len(descriptors), BATCH):
                await self._send_descriptors(descriptors[start : start + BATCH])
            await self._writer.drain()

    async def send_descriptor(self, descriptor: int) -> None:
        """Send one descriptor that belongs to the message sent last: an intake. Errors: as for `send`."""
        with _errors("sending an intake to a loader process"):
            await self._send_descriptors([descriptor])

    def forget_segments(self) -> None:
        """The job is over and the loader has closed the segments it saw."""
        self._seen.clear()

    def kill(self) -> None:
        """End it at once. Where the kernel cannot (a read that hangs), `exited` stays pending."""
        if not self.exited.done():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def hang_up(self) -> None:
        """Let an idle loader end by itself."""
        assert self._writer is not None  # as in `send`
        self._writer.close()

    async def _send_descriptors(self, descriptors: list[int]) -> None:
        # A few descriptors at a time into an otherwise empty socket: it takes them at once unless the loader is stuck,
        # and then waiting would be the wrong thing to do on the daemon's loop.
        for _ in range(_TRIES):
            if self.exited.done():
                break  # and the socket is closed
            self._descriptors.setblocking(False)
            try:
                socket.send_fds(self._descriptors, [b"d"], descriptors)
            except BlockingIOError:
                await asyncio.sleep(0.01)
            else:
                return
        raise LoadProcessDiedError

    def _on_exit(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        self._process.wait()
        self._descriptors.close()
        if self._writer is not None:  # else spawn is still opening it, and closes it
            self._writer.close()
        if not self.exited.done():
            self.exited.set_result(None)


@contextlib.contextmanager
def _errors(what: str) -> Iterator[None]:
    """What fails in here, as LoadProcessDiedError or ResourceLimitError where it is one of these."""
    try:
        yield
    except ConnectionError as error:
        raise LoadProcessDiedError from error
    except OSError as error:
        if limit := limit_error(error, what, DAEMON):
            raise limit from error
        raise
