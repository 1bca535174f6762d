"""Few descriptors, in a daemon that runs or in this very process; and files that this one cannot write."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def room_for(pid: int, count: int) -> Iterator[None]:
    """Let a process open only `count` more descriptors."""
    folder = f"/proc/{pid}/fd"
    # The descriptor that lists our own is gone when it has.
    names = os.listdir(folder)
    taken = {int(name) for name in names if os.path.lexists(f"{folder}/{name}")}
    limit, free = 0, 0
    while free < count or limit in taken:
        free += limit not in taken
        limit += 1
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


@contextmanager
def nothing_written() -> Iterator[None]:
    """Have every write to a file fail in this process, as without memory for it; Python ignores the signal."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
