"""Verifying: hash resident blobs again and say which do not match."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from .copying import Buffer, pieces

if TYPE_CHECKING:
    from weightd_daemon.core.digest import NewHasher

    from .channel import Channel, Message

_PROGRESS_SECONDS = 0.1


def verify(channel: Channel, job: Message, new_hasher: NewHasher) -> None:
    """Hash each blob of the job: rows of (number, segment, offset, length, digest). Reports the numbers that differ."""
    rows: list[tuple[int, int, int, int, str]] = job["blobs"]
    buffer = Buffer()
    bad: list[int] = []
    done_bytes, told = 0, 0.0
    for done, (number, segment, offset, length, digest) in enumerate(rows, start=1):
        hasher = new_hasher()
        for position, size in pieces(length):
            view = buffer.view[:size]
            if os.preadv(channel.segments[segment], [view], offset + position) != size:
                break
            hasher.update(view)
        if hasher.digest().hex() != digest:
            bad.append(number)
        done_bytes += length
        now = time.monotonic()
        if now - told >= _PROGRESS_SECONDS:
            told = now
            channel.tell({"op": "progress", "done": done, "done_bytes": done_bytes})
    channel.tell({"op": "verified", "bad": bad})
