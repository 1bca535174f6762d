"""Returns freed memory to the system after large amounts were freed, so that the process does not keep it."""

from __future__ import annotations

import asyncio

from . import libc

AT_ONCE = 1 << 20
"""Bytes that are freed after which it is worth a look."""
PAUSE_SECONDS = 1.0
"""How long to wait for more to be freed; a look takes some milliseconds, on a thread."""

_waiting: asyncio.TimerHandle | None = None


def freed(size: int) -> None:
    """Say that about `size` bytes are being freed; on the loop's thread. Returns at once."""
    global _waiting
    if size >= AT_ONCE and _waiting is None:
        _waiting = asyncio.get_running_loop().call_later(PAUSE_SECONDS, _trim)


def _trim() -> None:
    global _waiting
    _waiting = None
    _ = asyncio.get_running_loop().run_in_executor(None, libc.trim)  # nobody waits for it
