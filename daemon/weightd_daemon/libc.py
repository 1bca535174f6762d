"""The libc functions that the daemon and its children need and Python lacks. No other module here uses ctypes."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1
_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)
_libc.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def die_with(parent: int) -> bool:
    """Have this process killed when its parent, the process `parent`, ends. Returns False if that has ended already."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    return os.getppid() == parent


def punch_hole(descriptor: int, offset: int, length: int) -> None:
    """Give the pages of a file's range back; it keeps its size. Errors: OSError."""
    if _libc.fallocate(descriptor, _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE, offset, length):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def filesystem_type(descriptor: int) -> int | None:
    """Return the number of the type of filesystem that a file lies on (statfs(2)); None where it cannot be had."""
    buffer = (ctypes.c_long * 64)()
    return buffer[0] if _libc.fstatfs(descriptor, buffer) == 0 else None


def equal(address: int, other: int, size: int) -> bool:
    """Compare the bytes at two addresses, without the interpreter's lock."""
    return bool(_libc.memcmp(address, other, size) == 0)


def copy(target: int, source: int, size: int) -> None:
    """Copy bytes from one address to another, without the interpreter's lock: slices of views hold it."""
    ctypes.memmove(target, source, size)


def trim() -> None:
    """Give freed memory of this process back to the system, where libc can: glibc keeps what lies between others."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)
