"""The loader's end of an intake: receives files as descriptors from a client."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
from typing import TYPE_CHECKING, Final

from weightd._limits import LOADER, out_of_descriptors
from weightd._proto.v1 import handles_pb2
from weightd._transport.protocol import MAX_DESCRIPTORS, MAX_FRAME, receive_fds
from weightd.errors import InvalidReferenceError

from .source import LoaderSource

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

INTAKE_SECONDS: Final = 30.0
"""How long a client may take to send a batch of files, and to have room for its confirmation: it must not keep a loader
for nothing."""
_OWN_DESCRIPTORS: Final = 64
"""What a loader needs beside a load's files: its sockets, segments, the batch that it is receiving."""
_HELD_BYTES: Final = 64 << 20
"""Of how many bytes files are read whole, where there are more files than descriptors."""


def receive_files(intake: socket.socket, names: Sequence[str], files: list[int | LoaderSource]) -> None:
    """Add the files of these names to `files` as the client sends them, in confirmed batches; closes the intake.

    Where this process may not have them all open, short ones are read at once and closed. After an error, `files` has
    what has come. Errors: InvalidReferenceError, ResourceLimitError.
    """
    count, held = len(names), 0
    scarce = count + _OWN_DESCRIPTORS > resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    try:
        with intake:
            intake.settimeout(INTAKE_SECONDS)
            while len(files) < count:
                held += _receive_batch(intake, names, files, _HELD_BYTES - held if scarce else None)
    except TimeoutError:
        raise InvalidReferenceError(
            f"the client sent {len(files)} of {count} files, and then did nothing for {INTAKE_SECONDS:.0f} s"
        ) from None


def _receive_batch(
    intake: socket.socket, names: Sequence[str], files: list[int | LoaderSource], hold: int | None
) -> int:
    """Add a batch to the files, those of at most `hold` bytes together read and closed. Returns the bytes held."""
    count = len(names)
    try:
        data, received, flags = receive_fds(intake, MAX_FRAME, MAX_DESCRIPTORS)
    except ConnectionError:
        data, received, flags = b"", [], 0
    files += received
    if not data:
        raise InvalidReferenceError(f"the client sent {len(files)} of {count} files and left")
    batch = handles_pb2.IntakeBatch()
    try:
        batch.ParseFromString(data)
    except Exception as error:
        raise InvalidReferenceError("the intake got a frame that is no IntakeBatch") from error
    expected = len(files) - len(received)
    if flags & socket.MSG_CTRUNC and (limit := out_of_descriptors(f"receiving {count} files", LOADER)):
        raise limit
    if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC) or batch.descriptors != len(received):
        raise InvalidReferenceError("descriptors were lost on the way; the frame says how many it carries")
    if batch.first != expected or len(files) > count or not received:
        raise InvalidReferenceError(
            f"the intake got {len(received)} files from {batch.first} on; {expected} of {count} had come"
        )
    held = 0
    for at, descriptor in enumerate(received, start=expected):
        source = None if hold is None else LoaderSource(names[at], descriptor, hold=hold - held)
        if source is not None and source.held:
            files[at] = source
            os.close(descriptor)
            held += source.identity.size
    # A client that has left is seen by the next receive; with its last file here it is not needed.
    with contextlib.suppress(ConnectionError):
        intake.send(handles_pb2.IntakeAck(received=len(files)).SerializeToString())
    return held


def close_all(files: Iterable[int | LoaderSource]) -> None:
    """Close the descriptors among the files."""
    for file in files:
        if isinstance(file, int):
            os.close(file)
