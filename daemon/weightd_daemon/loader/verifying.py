"""Verifying: hash resident blobs again and say which do not match."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from .copying import pieces

if TYPE_CHECKING:
    from weightd_daemon.core.digest import NewHasher
    from weightd_daemon.devices.segment_io import SegmentIO

    from .channel import Channel, Message

_PROGRESS_SECONDS = 0.1


def verify(channel: Channel, io: SegmentIO, job: Message, new_hasher: NewHasher) -> None:
    """Hash each blob of the job: rows of (number, segment, offset, length, digest). Reports the numbers that differ."""
    rows: list[tuple[int, int, int, int, str]] = job["blobs"]
    bad: list[int] = []
    done_bytes, told = 0, 0.0
    with contextlib.closing(io.staging()) as staging:
        buffer = staging.take()
        for done, (number, segment, offset, length, digest) in enumerate(rows, start=1):
            hasher = new_hasher()
            for position, size in pieces(length):
                staging.read(buffer, size, segment, offset + position)
                staging.settle()
                hasher.update(buffer.view[:size])
            if hasher.digest().hex() != digest:
                bad.append(number)
            done_bytes += length
            now = time.monotonic()
            if now - told >= _PROGRESS_SECONDS:
                told = now
                channel.tell({"op": "progress", "done": done, "done_bytes": done_bytes})
    channel.tell({"op": "verified", "bad": bad})
