"""Private copies of shared weights in processes, read from /proc."""

from __future__ import annotations

import re
from pathlib import Path

_SEGMENT = re.compile(rb"/memfd:weightd-\d")
_COPIED = re.compile(rb"^Anonymous:\s+(\d+) kB$", re.MULTILINE)


def private_bytes(pid: int, proc: Path = Path("/proc")) -> int | None:
    """Return the bytes that a process has copied of weightd's segments in host memory by writing to them.

    None where that is not known: the process is another user's, has gone, or maps no segment, so that the id may mean
    another process here than it does to the daemon.
    """
    try:
        described = (proc / str(pid) / "smaps").read_bytes()
    except OSError:
        return None
    return copied_bytes(described)


def copied_bytes(smaps: bytes) -> int | None:
    """Return the anonymous bytes in mappings of segments, in the text of `smaps`; None without such a mapping."""
    total = None
    for segment in _SEGMENT.finditer(smaps):
        copied = _COPIED.search(smaps, segment.end())
        if copied is not None:
            total = (total or 0) + int(copied[1]) * 1024
    return total
