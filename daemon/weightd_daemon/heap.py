"""Python's own memory in a long-running daemon: freed memory goes back, and no collection of garbage takes long.

A full collection visits every object while the loop stands still: a second if a million blobs are resident, and none of
them is garbage. So objects that survive a collection are *frozen*, that is excluded from all later collections, as soon
as there are many; reference counting still frees them. See docs/decisions/0033-collections-of-garbage.md.
"""

from __future__ import annotations

import asyncio
import gc
from typing import TYPE_CHECKING

from . import libc

if TYPE_CHECKING:
    from collections.abc import Callable

AT_ONCE = 1 << 20
"""Bytes that are freed after which it is worth a look."""
PAUSE_SECONDS = 1.0
"""How long to wait for more to be freed; a look takes some milliseconds, on a thread."""

MOST_SURVIVORS = 10_000
"""Objects that may survive a collection of the oldest generation without being frozen."""
_YOUNG, _MIDDLE, _OLD = 700, 10, 2
"""How many objects, collections of the young and collections of the middle generation lead to the next collection.

The last is less than usual: it collects what has come since the one before, some 20,000 objects.
"""

_waiting: asyncio.TimerHandle | None = None
_thawing: asyncio.TimerHandle | None = None
_frozen = 0
"""How many objects were frozen since `settle`; many of them may be gone."""


def settle() -> None:
    """Freeze what the start has made, and keep every collection short from now on. Once, before anybody is served."""
    gc.collect()
    gc.freeze()
    gc.collect()  # of nothing: the next one is due when a quarter of what was found last has come since
    gc.set_threshold(_YOUNG, _MIDDLE, _OLD)
    gc.callbacks.append(_collected)


def gone(left: Callable[[], int]) -> None:
    """Say that a checkpoint is going; `left` says how many blobs there are. If few, the frozen is collected again.

    Garbage in cycles that was alive when it was frozen has stayed until then. On the loop's thread. Returns at once.
    """
    global _thawing
    if _frozen and _thawing is None:
        _thawing = asyncio.get_running_loop().call_later(PAUSE_SECONDS, _thaw, left)


def _thaw(left: Callable[[], int]) -> None:
    global _frozen, _thawing
    _thawing = None
    if left() < MOST_SURVIVORS // 10:
        _frozen = 0
        gc.unfreeze()


def freed(size: int) -> None:
    """Say that about `size` bytes are being freed; on the loop's thread. Returns at once."""
    global _waiting
    if size >= AT_ONCE and _waiting is None:
        _waiting = asyncio.get_running_loop().call_later(PAUSE_SECONDS, _trim)


def _trim() -> None:
    global _waiting
    _waiting = None
    _ = asyncio.get_running_loop().run_in_executor(None, libc.trim)  # nobody waits for it


def _collected(phase: str, told: dict[str, int]) -> None:
    """Freeze what a collection of the oldest generation has left, if that is much. Python calls this, on any thread."""
    global _frozen
    if phase == "stop" and told["generation"] == 2 and (left := len(gc.get_objects(2))) > MOST_SURVIVORS:
        _frozen += left
        gc.freeze()
