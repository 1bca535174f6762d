"""Gives freed memory of this process back to the system: glibc keeps what lies between other things, for good."""

from __future__ import annotations

import asyncio
import ctypes

AT_ONCE = 1 << 20
"""Bytes that were freed after which it is worth a look."""
PAUSE_SECONDS = 1.0
"""How long to wait for more to be freed; a look takes some milliseconds, on a thread."""

_libc = ctypes.CDLL(None)
_waiting: asyncio.TimerHandle | None = None


def freed(size: int) -> None:
    """Say that something of `size` bytes is about to be freed; on the loop's thread. Returns at once."""
    global _waiting
    if size < AT_ONCE or _waiting is not None or not hasattr(_libc, "malloc_trim"):
        return
    _waiting = asyncio.get_running_loop().call_later(PAUSE_SECONDS, _trim)


def _trim() -> None:
    global _waiting
    _waiting = None
    asyncio.get_running_loop().run_in_executor(None, _libc.malloc_trim, 0)
