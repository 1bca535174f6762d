"""Named points at which a daemon kills itself: the one that a file names, when it is next reached.

They are those of weightd/_failpoints.py, and one that only a test can make: "torn", in the midst of a write to the root
record. tests/failpoints tries errors and delays, too, and all processes, one failure at a time.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from weightd import _failpoints
from weightd_daemon.persistence import root_record

POINTS = (
    "load.grant",
    "load.settle",
    "seal.segment",
    "seal.barrier",
    "seal.books",
    "torn",
    "flip.written",
    "evict.drop",
    "evict.release",
)
"""In the order of a seal, then of an eviction."""


def install(armed: Path) -> None:
    """Look into the file `armed` at every point."""

    def reach(point: str) -> None:
        try:
            if armed.read_text() != point:
                return
            armed.unlink()
        except FileNotFoundError:
            return
        os.kill(os.getpid(), signal.SIGKILL)

    write = root_record._write

    def torn(descriptor: int, data: bytes, offset: int) -> None:
        write(descriptor, data[: len(data) // 2], offset)
        reach("torn")
        write(descriptor, data, offset)

    _failpoints.reach = reach
    root_record._write = torn
