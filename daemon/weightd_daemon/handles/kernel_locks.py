"""Read locks of open files (F_OFD_SETLK): how the daemon locks a lease and queries locks.

A lock lives exactly as long as the open file that it was put on, that is as long as any duplicate or mapping of it, in
forked children too, and whether or not the daemon lives.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time

LOOK_SECONDS = 0.2
"""How long `locked_bytes` looks at one file; each lock takes longer, the more there are."""

_FLOCK = struct.Struct("hhqqi4x")


class HandleLocksUnclearError(Exception):
    """The lease locks on a file that was handed to clients cannot be told apart."""


def lock_byte(file: int, at: int) -> int:
    """A fresh read-only descriptor of a file, with a read lock on one byte; the caller closes it. Errors: OSError."""
    descriptor = os.open(f"/proc/self/fd/{file}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, at, 1, 0))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def first_lock(file: int, start: int, end: int) -> tuple[int, int] | None:
    """The part of one lock that lies in the bytes from `start` to before `end`; None where none does."""
    wanted = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, end - start, 0)
    kind, _, low, length, _ = _FLOCK.unpack(fcntl.fcntl(file, fcntl.F_OFD_GETLK, wanted))
    if kind == fcntl.F_UNLCK:
        return None
    return max(start, low), min(end, low + length) if length else end  # 0: to the end of all files


def locked_bytes(file: int, start: int, end: int) -> list[int]:
    """Each locked byte from `start` to before `end`, ascending.

    Errors: HandleLocksUnclearError (a lock on more than one byte hides those under it; or there are very many).
    """
    found: list[int] = []
    spans = [(start, end)]
    end_of_looking = time.monotonic() + LOOK_SECONDS
    while spans:
        low, high = spans.pop()
        lock = first_lock(file, low, high) if low < high else None
        if lock is None:
            continue
        if lock[1] - lock[0] != 1 or time.monotonic() > end_of_looking:
            raise HandleLocksUnclearError
        found.append(lock[0])
        spans += [(low, lock[0]), (lock[1], high)]
    return sorted(found)
