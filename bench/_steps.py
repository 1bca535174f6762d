"""What a call costs the loop of this process: CPU time, and the longest step."""

from __future__ import annotations

import asyncio
import time
from asyncio import events
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple


class CallCost(NamedTuple):
    """CPU milliseconds of the loop's thread, of all threads, and of the longest step of the loop."""

    thread_ms: float
    process_ms: float
    step_ms: float


class Steps:
    """The CPU time of the longest step of the loop."""

    def __init__(self) -> None:
        self.longest = 0.0
        run = events.Handle._run

        def timed(handle: events.Handle) -> None:
            began = time.thread_time()
            run(handle)
            self.longest = max(self.longest, time.thread_time() - began)

        events.Handle._run = timed  # type: ignore[method-assign]  # exchanged

    async def of(self, call: Callable[[], Awaitable[Any]]) -> tuple[Any, CallCost]:
        """What a call returns, and what it costs."""
        await asyncio.sleep(0)
        self.longest, thread, process = 0.0, time.thread_time(), time.process_time()
        found = await asyncio.create_task(call())  # type: ignore[arg-type]  # it is a coroutine
        spent = time.thread_time() - thread, time.process_time() - process, self.longest
        return found, CallCost(*(seconds * 1e3 for seconds in spent))
