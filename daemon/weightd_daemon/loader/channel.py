"""The loader's end of its channel to the daemon.

Two socket pairs: a byte stream with length-prefixed JSON messages in both directions, and a SOCK_SEQPACKET on which
the daemon sends descriptors. A message that brings segments lists them in "segments" as [number, bytes, handle]: the
handle is hexadecimal, or null for a segment whose descriptor comes on the other socket.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import threading
from typing import TYPE_CHECKING, Any

from weightd._limits import LOADER, out_of_descriptors
from weightd._transport.protocol import receive_fds
from weightd.errors import DeviceError, ResourceLimitError, ServerError, WeightdError, from_wire
from weightd_daemon.devices.device import SegmentHandle

if TYPE_CHECKING:
    from collections.abc import Iterator

LENGTH = struct.Struct("<I")
BATCH = 250
"""Descriptors in one message; the kernel takes 253."""

Message = dict[str, Any]

UNFIT = (DeviceError, ServerError, ResourceLimitError)
"""After these a loader does no other job: what the driver holds against a process may stay, and so may a bug.

Where descriptors did not come in, those that are still on their way would be taken for the next job's.
"""


class Gone(Exception):  # noqa: N818  # a fact, not an error: the daemon hung up
    """The daemon closed the channel."""


class Channel:
    """Blocking calls to the daemon, from any thread: one call at a time, answered in order.

    Once something could not be received, nothing is received any more: a descriptor that is still on its way would be
    taken for one of a later message, and its memory written to. `receive` and `call` raise the first error from then
    on, in every thread.
    """

    def __init__(self, control: socket.socket, descriptors: socket.socket) -> None:
        self._control = control
        self._reader = control.makefile("rb")
        self._descriptors = descriptors
        self._sending = threading.Lock()
        self._calling = threading.Lock()
        self._failure: Message | None = None
        self.segments: dict[int, SegmentHandle] = {}
        """The segments that this job has seen, by number."""

    @property
    def broken(self) -> bool:
        """Whether something could not be received, so that this channel is of no use any more."""
        return self._failure is not None

    def receive(self) -> Message:
        """The next message. Errors: Gone, ResourceLimitError (this process cannot take its segments), ServerError."""
        with self._breaking():
            return self._receive()

    def receive_descriptor(self) -> int:
        """A descriptor that came with a message of another kind. Errors: as for `receive`."""
        with self._breaking():
            return self._receive_descriptors(1, "receiving an intake")[0]

    @contextlib.contextmanager
    def _breaking(self) -> Iterator[None]:
        """The channel is broken after an error in here. Errors: the one that broke it."""
        self._check()
        try:
            yield
        except Gone:  # nothing is on its way any more
            raise
        except Exception as error:
            # As a message, for the error itself keeps what its traceback reaches: a step's buffers and maps.
            unknown = ServerError(f"the channel to the daemon broke: {type(error).__name__}: {error}")
            self._failure = error_to(error if isinstance(error, WeightdError) else unknown)
            raise

    def _check(self) -> None:
        if self._failure is not None:
            raise error_from(self._failure)

    def _receive(self) -> Message:
        head = self._reader.read(LENGTH.size)
        if len(head) < LENGTH.size:
            raise Gone
        body = self._reader.read(LENGTH.unpack(head)[0])
        message: Message = json.loads(body)
        rows = message.get("segments", ())
        for number, size, handle in rows:
            if handle is not None:
                self.segments[number] = SegmentHandle(number, size, bytes.fromhex(handle))
        described = [(number, size) for number, size, handle in rows if handle is None]
        for start in range(0, len(described), BATCH):
            part = described[start : start + BATCH]
            received = self._receive_descriptors(len(part), "receiving segments")
            for (number, size), descriptor in zip(part, received, strict=True):
                self.segments[number] = SegmentHandle(number, size, descriptor)
        return message

    def _receive_descriptors(self, count: int, what: str) -> list[int]:
        data, received, flags = receive_fds(self._descriptors, 1, count)
        if len(received) == count and not flags & socket.MSG_CTRUNC:
            return received
        limit = out_of_descriptors(what, LOADER)  # asked before any is closed
        for descriptor in received:
            os.close(descriptor)
        if not data:
            raise Gone
        more = " and more" if flags & socket.MSG_CTRUNC else ""
        raise limit or ServerError(f"{what}: {len(received)} descriptors{more} came where {count} were said to come")

    def tell(self, message: Message) -> None:
        """Send a message that has no answer."""
        body = json.dumps(message, separators=(",", ":")).encode()
        with self._sending:
            self._control.sendall(LENGTH.pack(len(body)) + body)

    def call(self, op: str, **arguments: Any) -> Message:
        """Ask the daemon and return its answer; an error in the answer is raised."""
        with self._calling:
            self._check()
            self.tell({"op": op, **arguments})
            answer = self.receive()
        if "error" in answer:
            raise error_from(answer)
        return answer

    def forget_segments(self) -> None:
        """Close the descriptors of this job's segments."""
        for segment in self.segments.values():
            if isinstance(segment.handle, int):
                os.close(segment.handle)
        self.segments.clear()


def error_to(error: WeightdError) -> Message:
    """An error as a message."""
    return {"error": error.reason, "message": error.message, "metadata": error.metadata}


def error_from(message: Message) -> WeightdError:
    """The error that a message carries."""
    return from_wire(message["error"], message["message"], message.get("metadata"))
