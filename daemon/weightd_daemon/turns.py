"""Turns on the loop, and on Python's interpreter: work on many tensors keeps nobody else waiting for long.

A call passes the loop several times, and each time waits for the step that is under way there. So a task that has much
to do pauses after a millisecond, not after as long as a step may take. Threads with such work do not block the loop,
but only one thread at a time runs Python: another gets the interpreter after the switch interval, which by default is
5 ms, as often as a call passes the loop. See docs/decisions/0042-turns.md.
"""

from __future__ import annotations

import asyncio
import sys
import time

TURN_SECONDS = 0.001
"""How long one task does things on the loop before others have their turn."""
_SWITCH_SECONDS = 0.0005


class LoopTurn:
    """Tells a task that has much to do when it has had the loop for long enough: it begins when this is made."""

    def __init__(self) -> None:
        self._end = time.perf_counter() + TURN_SECONDS

    @property
    def is_over(self) -> bool:
        """Whether others are to have their turn; costs 0.1 µs, so it can be asked for each tensor."""
        return time.perf_counter() > self._end

    async def next(self) -> None:
        """Let others have their turn, and begin the next one."""
        await asyncio.sleep(0)
        self._end = time.perf_counter() + TURN_SECONDS


def share_interpreter() -> None:
    """Have threads of this process hand the interpreter on after a moment; once, before anybody is served."""
    sys.setswitchinterval(_SWITCH_SECONDS)
