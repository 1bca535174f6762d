"""Which processes a process has started and not yet waited for."""

from __future__ import annotations

import contextlib
from pathlib import Path


def children(pid: int | str = "self") -> set[int]:
    """Process ids of the children of all threads, of those that have ended and wait to be reaped, too."""
    found: set[int] = set()
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended
            found.update(map(int, path.read_text().split()))
    return found
