"""The sweep: periodically finds leases that have ended. The kernel does not notify the daemon of released locks."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weightd_daemon.core.lease import LeaseTable

    from .lease_files import HandleLeaseFiles

STEP_LEASES = 256
"""Leases that one step looks at: some milliseconds."""

PAUSE_SECONDS = 1.0
"""Between two steps where one looks at all leases."""

SHORT_PAUSE_SECONDS = 0.05
"""Between two steps where there are more."""

SHORTEST_PAUSE_SECONDS = 0.01
"""Between two steps while there are leases whose connection has ended."""


class HandleLeaseSweep:
    """Checks the locks of all leases in turn, a step at a time, and removes lease files that are no longer needed."""

    def __init__(self, leases: LeaseTable, files: HandleLeaseFiles) -> None:
        self._leases = leases
        self._files = files
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Begin, on the running loop."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """End it."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        tidied = loop.time()
        while True:
            more = self._leases.sweep(STEP_LEASES)
            if loop.time() - tidied >= PAUSE_SECONDS:
                self._files.tidy()
                tidied = loop.time()
            pause = SHORT_PAUSE_SECONDS if more else PAUSE_SECONDS
            await asyncio.sleep(SHORTEST_PAUSE_SECONDS if self._leases.hurries else pause)
