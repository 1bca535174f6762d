"""Verifying: hashes resident blobs again and reports mismatches."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from ._proto import loader_pb2 as wire
from .channel import split_digests
from .copying import pieces

if TYPE_CHECKING:
    from weightd_daemon.core.digest import NewHasher
    from weightd_daemon.devices.segment_io import DeviceSegmentIO

    from .channel import LoaderChannel

_PROGRESS_SECONDS = 0.1


def verify(channel: LoaderChannel, io: DeviceSegmentIO, job: wire.Verify, new_hasher: NewHasher) -> None:
    """Hash each blob of the job. Reports how far it is, and the numbers of blobs that do not have their digest."""
    digests = split_digests(job.digests)
    found = wire.Verified()
    told = 0.0
    with contextlib.closing(io.staging()) as staging:
        buffer = staging.acquire()
        for number, segment, offset, length, digest in zip(
            job.blobs, job.segments, job.offsets, job.lengths, digests, strict=True
        ):
            hasher = new_hasher()
            for position, size in pieces(length):
                staging.read(buffer, size, segment, offset + position)
                staging.synchronize()
                hasher.update(buffer.view[:size])
            if hasher.digest() != digest:
                found.bad.append(number)
            found.blobs += 1
            found.bytes += length
            now = time.monotonic()
            if now - told >= _PROGRESS_SECONDS:
                told = now
                channel.send(wire.ToDaemon(verified=found))
                del found.bad[:]
    found.all = True
    channel.send(wire.ToDaemon(verified=found))
