"""The loader's end of its channel to the daemon.

Two socket pairs: a byte stream with length-prefixed messages (protos/weightd/internal/loader.proto) in both directions,
and a SOCK_SEQPACKET on which the daemon sends descriptors: of the segments that a message lists without a handle, and
of an intake.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError

from weightd._limits import LOADER, out_of_descriptors
from weightd._transport.protocol import receive_fds
from weightd.errors import DeviceError, ResourceLimitError, ServerError, WeightdError, from_wire
from weightd_daemon.core.digest import DIGEST_BYTES
from weightd_daemon.devices.device import DeviceSegment

from ._proto import loader_pb2 as wire

if TYPE_CHECKING:
    from collections.abc import Iterator

LENGTH = struct.Struct("<I")
MAX_MESSAGE = 256 << 20
"""The longest message in bytes: more than the metadata of any file, or the digests of ten million tensors."""
BATCH = 250
"""Descriptors in one message; the kernel takes 253."""

UNFIT = (DeviceError, ServerError, ResourceLimitError)
"""After these a loader does no other job: what the driver holds against a process may stay, and so may a bug.

Where descriptors did not come in, those that are still on their way would be taken for the next job's.
"""


class LoaderChannelClosedError(Exception):  # a fact, not an error: the daemon hung up
    """The daemon closed the loader's channel."""


class LoaderChannel:
    """The loader's blocking calls to the daemon, from any thread: one call at a time, answered in order.

    Once something could not be received, nothing is received any more: a descriptor that is still on its way would be
    taken for one of a later message, and its memory written to. `receive` and `call` raise the first error from then
    on, in every thread. Once a message was sent in part, nothing is sent any more: the daemon would read the next one
    from the middle of it. `send` and `call` raise LoaderChannelClosedError from then on.
    """

    def __init__(self, control: socket.socket, descriptors: socket.socket) -> None:
        self._control = control
        self._reader = control.makefile("rb")
        self._descriptors = descriptors
        self._sending = threading.Lock()
        self._calling = threading.Lock()
        self._failure: wire.Failure | None = None
        self._cut = False
        self.segments: dict[int, DeviceSegment] = {}
        """The segments that this job has seen, by number."""

    @property
    def broken(self) -> bool:
        """Whether something could not be received, so that this channel is of no use any more."""
        return self._failure is not None

    def receive(self, asked: str | None = None) -> wire.ToLoader:
        """Return the next message: the answer to what was `asked`, or an error, if that is said.

        Errors: LoaderChannelClosedError, ResourceLimitError (this process cannot take its segments), ServerError.
        """
        with self._breaking():
            message = self._receive()
            body = message.WhichOneof("body")
            if asked is not None and body not in (asked, "failed"):
                raise ServerError(f"{asked} was asked, and {body} came")
            return message

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
        except LoaderChannelClosedError:  # nothing is on its way any more
            raise
        except Exception as error:
            # As a message, for the error itself keeps what its traceback reaches: a step's buffers and maps.
            unknown = ServerError(f"the channel to the daemon broke: {type(error).__name__}: {error}")
            self._failure = failure_of(error if isinstance(error, WeightdError) else unknown)
            raise

    def _check(self) -> None:
        if self._failure is not None:
            raise error_of(self._failure)

    def _receive(self) -> wire.ToLoader:
        head = self._reader.read(LENGTH.size)
        if len(head) < LENGTH.size:
            raise LoaderChannelClosedError
        length = length_of(head)
        body = self._reader.read(length)
        if len(body) < length:
            raise LoaderChannelClosedError
        try:
            message = wire.ToLoader.FromString(body)
        except DecodeError:
            raise ServerError(f"{length} bytes came that are no message") from None
        described = []
        for segment in message.segments:
            if segment.HasField("handle"):
                self._enter(DeviceSegment(segment.number, segment.size, segment.handle))
            else:
                described.append(segment)
        for start in range(0, len(described), BATCH):
            part = described[start : start + BATCH]
            received = self._receive_descriptors(len(part), "receiving segments")
            for segment, descriptor in zip(part, received, strict=True):
                self._enter(DeviceSegment(segment.number, segment.size, descriptor))
        return message

    def _enter(self, segment: DeviceSegment) -> None:
        before, self.segments[segment.number] = self.segments.get(segment.number), segment
        if before is not None and isinstance(before.handle, int):
            os.close(before.handle)

    def _receive_descriptors(self, count: int, what: str) -> list[int]:
        data, received, flags = receive_fds(self._descriptors, 1, count)
        if len(received) == count and not flags & socket.MSG_CTRUNC:
            return received
        limit = out_of_descriptors(what, LOADER)  # asked before any is closed
        for descriptor in received:
            os.close(descriptor)
        if not data:
            raise LoaderChannelClosedError
        more = " and more" if flags & socket.MSG_CTRUNC else ""
        raise limit or ServerError(f"{what}: {len(received)} descriptors{more} came where {count} were said to come")

    def send(self, message: wire.ToDaemon) -> None:
        """Send a message that has no answer.

        Errors: LoaderChannelClosedError, ServerError (it is too long; nothing was sent).
        """
        frame = framed(message)
        with self._sending:
            if self._cut:
                raise LoaderChannelClosedError
            try:
                self._control.sendall(frame)
            except OSError as error:
                self._cut = True  # nobody knows how much of it was sent
                raise LoaderChannelClosedError from error

    def call(self, question: wire.ToDaemon) -> wire.ToLoader:
        """Ask the daemon. Returns the answer, whose body has the name of the question's; an error in it is raised."""
        with self._calling:
            self._check()
            self.send(question)
            answer = self.receive(question.WhichOneof("body"))
        if answer.HasField("failed"):
            raise error_of(answer.failed)
        return answer

    def forget_segments(self) -> None:
        """Close the descriptors of this job's segments."""
        for segment in self.segments.values():
            if isinstance(segment.handle, int):
                os.close(segment.handle)
        self.segments.clear()


def framed(message: wire.ToDaemon | wire.ToLoader) -> bytes:
    """Return a message behind its length. Errors: ServerError (too long)."""
    body = message.SerializeToString()
    if len(body) > MAX_MESSAGE:
        raise ServerError(f"{message.WhichOneof('body')} has {len(body)} bytes; a message has at most {MAX_MESSAGE}")
    return LENGTH.pack(len(body)) + body


def length_of(head: bytes) -> int:
    """Return the length of the message behind these LENGTH.size bytes. Errors: ServerError (too long for any)."""
    length = int(LENGTH.unpack(head)[0])
    if length > MAX_MESSAGE:
        raise ServerError(f"a message of {length} bytes came; one has at most {MAX_MESSAGE}")
    return length


def failure_of(error: WeightdError) -> wire.Failure:
    """Return an error as a message."""
    text = error.message.encode(errors="backslashreplace").decode()  # a path may hold bytes that are no text
    return wire.Failure(reason=error.reason, message=text, metadata=error.metadata)


def error_of(failure: wire.Failure) -> WeightdError:
    """Return the error that a message carries."""
    return from_wire(failure.reason, failure.message, dict(failure.metadata))


def split_digests(digests: bytes) -> list[bytes]:
    """Return the digests of a column."""
    return [digests[at : at + DIGEST_BYTES] for at in range(0, len(digests), DIGEST_BYTES)]
